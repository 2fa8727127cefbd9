"""Remove heads and channels: those that are provably dead by default, others only when the user asks by name."""

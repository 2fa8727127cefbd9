"""Write what the passes reason about (linear, attention, rope, norm) as one dialect operation each."""

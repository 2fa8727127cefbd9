"""What the command line does: a file for each command, and what they share (models, systems, figures)."""

"""Fuse operations so that fewer bytes move."""

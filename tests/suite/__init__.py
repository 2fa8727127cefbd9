"""Suites that attack the backend from outside, through `torch.compile` alone."""

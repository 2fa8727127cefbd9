"""The tests of graphopt; each folder or file is named as what it tests."""

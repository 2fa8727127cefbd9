"""The pass library: one folder per stage, one file per pass, imported as `graphopt.passes`."""

if __name__ != "graphopt.passes":
    raise ImportError("this package is graphopt.passes: import graphopt.passes, not passes")

"""The lowerings: one file per kernel family or target, imported as `graphopt.backends`."""

if __name__ != "graphopt.backends":
    raise ImportError("this package is graphopt.backends: import graphopt.backends, not backends")

"""Names of weights as users write them, from the names that Dynamo gives to the inputs of a graph."""

from __future__ import annotations

import re

_BASE = re.compile(r"[LG]\['[^']*'\]")
_STEP = re.compile(r"\.([A-Za-z_]\w*)|\['([^']*)'\]|\[\"([^\"]*)\"\]|\[(\d+)\]")
_CONTAINERS = ("_modules", "_parameters", "_buffers")


def weight_name(source: str) -> str:
    """The dotted name of a weight from its Dynamo source; "" if the source is not a path of attributes and
    items.

    >>> weight_name("L['self']._modules['model']._modules['layers']._modules['0']._parameters['weight']")
    'model.layers.0.weight'

    In a graph that starts inside a submodule (after a graph break) the name starts at that submodule.
    """
    base = _BASE.match(source)
    if base is None:
        return ""
    steps, position = [], base.end()
    while position < len(source):
        step = _STEP.match(source, position)
        if step is None:
            return ""
        steps.append(next(text for text in step.groups() if text is not None))
        position = step.end()
    return ".".join(name for name in steps if name not in _CONTAINERS)

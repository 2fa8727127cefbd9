"""Names of weights from Dynamo's sources."""

from __future__ import annotations

import pytest

from graphopt.quantization.names import weight_name


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("L['self']._modules['model']._modules['layers']._modules['0']._parameters['weight']", "model.layers.0.weight"),
        ("L['self']._modules['a.b']._buffers['scale']", "a.b.scale"),
        ("L['self'].layers[0].weight", "layers.0.weight"),
        ("G['net']._modules['0']._parameters['weight']", "0.weight"),
        ("L['args'][1]", "1"),
        ("L['x']", ""),
        ("", ""),
        ("call(L['x'])", ""),
        ("L['self']._modules[f()]", ""),
    ],
)
def test_name(source: str, name: str) -> None:
    assert weight_name(source) == name

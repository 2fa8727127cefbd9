"""`Quantize`: what is allowed, and what each error says."""

from __future__ import annotations

import pytest

import graphopt
from graphopt import OptionError, Options, Quantize


def test_a_string_is_short_for_the_dataclass() -> None:
    assert Options.parse(None, {"quantize": "int4"}).quantize == Quantize("int4")
    assert Options.parse(None, {"quantize": Quantize("int8")}).quantize == Quantize("int8")
    assert Options().quantize is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("int7",), "did you mean 'int8'"),
        ((8,), r"scheme=8\): allowed are 'int8'"),
        (("int4", 48), r"group_size=48\): allowed are 32, 64, 128"),
        (("int4", True), "group_size=True"),
        (("fp8", 32), "'fp8' has no group size"),
        (("int8", None, True), "symmetric=True.*'int4'"),
        (("int4", None, 1), "symmetric=1.*True or False"),
        (("int8", None, False, "("), "not a regular expression"),
        (("int8", None, False, None, 3), "must be a regular expression"),
        (("int8", None, False, None, None, "yes"), "embeddings='yes'"),
        (("int8", None, False, None, None, False, "int9"), "lm_head='int9'.*allowed are True, False, 'int8'"),
    ],
)
def test_what_is_not_allowed_is_named(arguments: tuple[object, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        Quantize(*arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize("given", [4, True, ["int8"], {"scheme": "int8"}])
def test_other_types_are_refused(given: object) -> None:
    with pytest.raises(OptionError, match="option 'quantize' must be one of 'int8'"):
        Options(quantize=given)  # type: ignore[arg-type]


def test_patterns_choose_by_name() -> None:
    chosen = graphopt.Quantize("int8", modules=r"mlp\.", skip="down")
    assert chosen.wants("layers.0.mlp.up.weight") == ""
    assert "modules=" in chosen.wants("layers.0.attn.q.weight")
    assert "skip=" in chosen.wants("layers.0.mlp.down.weight")

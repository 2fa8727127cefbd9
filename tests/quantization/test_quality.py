"""`graphopt quality`: its figures on a tiny model, and that wrong options are said before a model is
loaded."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import graphopt
from graphopt import OptionError, Quantize
from graphopt.cli import app
from graphopt.commands import quality


@pytest.fixture(scope="module")
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=90,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def ids() -> torch.Tensor:
    return torch.randint(0, 90, (3, 12), generator=torch.Generator().manual_seed(0))


def test_figures_are_those_of_the_definitions(model, ids) -> None:
    found = quality.measure(model, ids, Quantize("int8"), target="reference")
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert found.tokens == 33
    assert found.perplexity_before == pytest.approx(math.exp(loss), rel=1e-5)
    assert 0 < found.kl < 1e-3 and found.same_choice > 0.9
    assert found.perplexity_after == pytest.approx(found.perplexity_before, rel=1e-2)
    assert json.loads(found.to_json())["plan"]["layers"][0]["scheme"] == "int8-g64"
    assert "int8" in str(found.plan)


def test_fewer_bits_diverge_more(model, ids) -> None:
    coarse = quality.measure(model, ids, Quantize("int4", group_size=128), target="reference")
    fine = quality.measure(model, ids, Quantize("int8"), target="reference")
    assert coarse.kl > 10 * fine.kl
    assert coarse.plan.bytes_after < fine.plan.bytes_after


@pytest.mark.rotate(one_in=2)
def test_every_one_of_many_schemes_is_compiled(model, ids) -> None:
    """Dynamo compiles a function no more than eight times, and then runs it as it is: nothing would seem lost."""
    asked = [Quantize(scheme, group_size=group) for scheme in ("int8", "int4", "nf4") for group in (32, 64, 128)]
    found = [quality.measure(model, ids, quantize, target="reference") for quantize in [*asked, Quantize("fp8")]]
    assert min(one.kl for one in found) > 0


def test_nothing_quantised_is_nothing_lost(model, ids) -> None:
    found = quality.measure(model, ids, Quantize("int8", modules="nothing"), target="reference")
    assert abs(found.kl) < 1e-6 and found.plan.bytes_after == found.plan.bytes_before
    calibrated = graphopt.calibrate(model, [{"input_ids": ids}])
    auto = quality.measure(model, ids, Quantize("auto", max_error=0.02, calibration=calibrated), target="reference")
    assert auto.plan.bytes_after < auto.plan.bytes_before
    assert auto.kl < 1e-2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schemes", "int9"], "did you mean 'int8'"),
        (["--rounding", "gptq"], "needs calibration"),
        (["--dtype", "int8"], "dtype must be one of"),
        (["--schemes", "auto"], "takes both or neither"),
        (["--length", "1"], "2 or more"),
        (["--model", "nothing"], "no model 'nothing'"),
    ],
)
def test_wrong_options_are_said_before_any_work(arguments: list[str], message: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("word " * 50)
    result = CliRunner().invoke(app, ["quality", "--text", str(text), *arguments])
    assert isinstance(result.exception, OptionError)
    assert message in str(result.exception)


def test_a_plan_for_each_budget() -> None:
    found = quality.asked(["int4", "auto"], None, "nearest", "0.01, 0.05")
    assert [Quantize(**one) for one in found[1:]] == [Quantize("auto", max_error=error) for error in (0.01, 0.05)]
    assert Quantize(**found[0]) == Quantize("int4")
    with pytest.raises(OptionError, match="must be numbers between 0 and 1"):
        quality.asked(["auto"], None, "nearest", "small")


def test_bytes_and_divergence_are_drawn(model, ids, tmp_path: Path) -> None:
    asked = (Quantize("int4"), Quantize("auto", max_error=0.02), Quantize("auto", max_error=0.1))
    quality.plot([quality.measure(model, ids, each, target="reference") for each in asked], tmp_path / "plot.svg")
    drawn = (tmp_path / "plot.svg").read_text()
    assert drawn.startswith("<?xml") and "<!-- int4-g32 -->" in drawn and "<!-- 0.02 -->" in drawn


class Spelling:
    """A tokenizer whose tokens are characters."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) % 90 for character in text]}


def test_texts_are_cut_into_rows(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("abcdefghij")
    assert quality.tokens_of(Spelling(), path, 3, 8).shape == (2, 3)
    with pytest.raises(OptionError, match="fewer than one piece of 20"):
        quality.tokens_of(Spelling(), path, 20, 100)
    with pytest.raises(OptionError, match="no such file"):
        quality.tokens_of(Spelling(), tmp_path / "absent", 3, 8)

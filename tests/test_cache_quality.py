"""Quality of the forms of caches: what is counted and compared, and what is refused before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from graphopt.commands import cache_quality
from graphopt.commands.models import LoadedModel
from graphopt.commands.progress import steps
from graphopt.errors import OptionError
from tests.kv import scenarios


class Letters:
    """A tokenizer of a few letters."""

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % scenarios.VOCABULARY for letter in text]}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text("What a form of caches costs is read off a text. " * 20)
    return path


def measured(text: Path, **changed: Any) -> list[cache_quality.CacheQuality]:
    asked = {
        "model": "smollm2",
        "dtype": "float32",
        "forms": ["exact"],
        "length": 400,
        "limit": 800,
        "at_once": 16,
        **changed,
    }
    return cache_quality.measure(**asked, text=text, step=steps(Console(quiet=True)))


@pytest.mark.parametrize("target", ["reference", pytest.param("cpu", marks=pytest.mark.slow)])
def test_forms_are_set_against_eager(monkeypatch: pytest.MonkeyPatch, text: Path, target: str) -> None:
    model = scenarios.tiny_llama()
    monkeypatch.setattr(cache_quality, "find_model", lambda name: type("Source", (), {"name": name}))
    monkeypatch.setattr(cache_quality, "load_model", lambda source, dtype: LoadedModel("tiny", model, Letters()))
    monkeypatch.setattr(cache_quality, "_options", lambda form: {"target": target, "kv_dtype": "int4"})
    eager, int4 = measured(text, forms=["int4"])
    assert eager.tokens == int4.tokens == 2 * 399 and eager.kl == 0 and eager.same_choice == 1
    ids = cache_quality.tokens_of(Letters(), text, 400, 800)
    with torch.no_grad():
        loss = sum(model(row[None], labels=row[None]).loss.item() for row in ids) / 2
    assert eager.perplexity == pytest.approx(torch.tensor(loss).exp().item(), rel=1e-2)
    assert eager.exact == 399 * 2 * 2 * 16 * 4 == eager.held  # rows, keys and values, heads, head size, bytes
    assert int4.kl > 0 and int4.perplexity == pytest.approx(eager.perplexity, rel=0.05)
    # By the meaning of the graph, caches are plain tensors of the numbers that attention sees.
    assert int4.held < 0.6 * eager.exact if target == "cpu" else int4.held == eager.exact
    console = Console(width=120, record=True)
    console.print(cache_quality.table([eager, int4], "title"))
    shown = console.export_text()
    assert "int4" in shown and "1.000" in shown


def test_options_of_forms() -> None:
    assert cache_quality._options("exact") == {}
    assert cache_quality._options("paged") == {"kv_cache": "paged"}
    assert cache_quality._options("fp8") == {"kv_dtype": "fp8"}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"dtype": "float64"}, "dtype"),
        ({"forms": ["int3"]}, "forms must be of.*'int3'"),
        ({"at_once": 0}, "at-once"),
        ({"at_once": 400}, "at-once"),
        ({"model": "x"}, "no model"),
    ],
)
def test_wrong_requests_are_refused(text: Path, changed: dict[str, object], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        measured(text, **changed)

"""Saved packs: the same answers in a new process without packing again; damaged and foreign files are refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import graphopt
from graphopt import OptionError, Quantize
from graphopt.backend import graphopt as backend
from graphopt.errors import StoredFileError
from graphopt.quantization import packing, schemes
from graphopt.quantization.release import is_released
from graphopt.runtime import packs

IDS = torch.arange(12).reshape(2, 6)


class Model(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(80, 64)
        self.q, self.k = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.head = nn.Linear(64, 80, bias=False)
        self.register_buffer("offset", torch.randn(64), persistent=False)
        if tied:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids) + self.offset
        return self.head(torch.relu(self.q(x)) * self.k(x))


def make(tied: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(tied)


def run(model: nn.Module, quantize: Quantize) -> torch.Tensor:
    torch._dynamo.reset()
    with torch.no_grad():
        return torch.compile(model, backend=backend, options={"quantize": quantize, "target": "inductor"})(IDS)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, torch.Tensor]:
    model = make()
    answer = run(model, Quantize("int4", lm_head="int8"))
    graphopt.save_quantized(model, tmp_path, Quantize("int4", lm_head="int8"))
    return tmp_path, answer


def packings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the schemes packed from now on."""
    seen: list[str] = []
    real = schemes.Scheme.pack
    monkeypatch.setattr(schemes.Scheme, "pack", lambda self, weight: seen.append(self.name) or real(self, weight))
    return seen


def test_same_answer_without_packing_again(saved, monkeypatch: pytest.MonkeyPatch) -> None:
    path, answer = saved
    packs.refresh()
    model, seen = make(), packings(monkeypatch)
    quantize = graphopt.load_quantized(model, path)
    assert quantize == Quantize("int4", lm_head="int8")
    assert torch.equal(run(model, quantize), answer)
    assert seen == []
    with torch.no_grad():
        model.k.weight.neg_()
    assert torch.allclose(run(model, quantize), -answer, atol=0.2) and seen == ["int4-g32"]


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_without_weights_is_filled(tied: bool, tmp_path: Path) -> None:
    model = make(tied)
    answer = run(model, Quantize("int8"))
    graphopt.save_quantized(model, tmp_path, Quantize("int8"))
    packs.refresh()
    with torch.device("meta"):
        empty = Model(tied)
    quantize = graphopt.load_quantized(empty, tmp_path)
    assert is_released(empty.q.weight) and is_released(empty.head.weight) is not tied
    assert not any(tensor.is_meta for tensor in (*empty.parameters(), *empty.buffers()))
    assert torch.equal(run(empty, quantize), answer)


def test_other_weights_give_way_only_when_asked(saved) -> None:
    path, answer = saved
    torch.manual_seed(7)
    other = Model()
    with pytest.raises(StoredFileError, match="'q.weight' of the model is not the one that was packed"):
        graphopt.load_quantized(other, path)
    quantize = graphopt.load_quantized(other, path, release_weights=True)
    assert torch.equal(run(other, quantize), answer)


@pytest.mark.parametrize(("scheme", "rounding"), [("int4", "gptq"), ("int4", "awq"), ("int8-dynamic", "smoothquant")])
def test_calibrated_packs_are_kept(scheme: str, rounding: str, tmp_path: Path) -> None:
    model = make()
    found = graphopt.calibrate(model, [IDS])
    quantize = Quantize(scheme, calibration=found, rounding=rounding)
    answer = run(model, quantize)
    graphopt.save_quantized(model, tmp_path, quantize)
    packs.refresh()
    fresh = make()
    loaded = graphopt.load_quantized(fresh, tmp_path)
    assert loaded == quantize
    before = len(packs._packs)
    assert torch.equal(run(fresh, loaded), answer) and len(packs._packs) == before


def test_in_a_new_process(saved, tmp_path: Path) -> None:
    path, answer = saved
    script = (
        "import sys, torch, graphopt\n"
        "sys.path.insert(0, sys.argv[1])\n"
        "from tests.quantization.test_store import make, run\n"
        "model = make()\n"
        "quantize = graphopt.load_quantized(model, sys.argv[2], release_weights=True)\n"
        "torch.save(run(model, quantize), sys.argv[3])\n"
    )
    root, out = str(Path(__file__).parents[2]), tmp_path / "answer.pt"
    subprocess.run([sys.executable, "-c", script, root, str(path), str(out)], check=True, cwd=root, timeout=300)
    assert torch.equal(torch.load(out), answer)


def test_nothing_packed_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="no weight of Model has been packed"):
        graphopt.save_quantized(make(), tmp_path, "int8")


def test_damaged_and_foreign_files_are_refused(saved) -> None:
    path, _ = saved
    stored, description = path / "packs.safetensors", path / "quantized.json"
    good, text = stored.read_bytes(), description.read_text()

    def refused(message: str) -> None:
        model = make()
        with pytest.raises(StoredFileError, match=message):
            graphopt.load_quantized(model, path)
        assert torch.equal(model.q.weight, make().q.weight)

    for damaged in (good[:-1], b"", good[:100] + b"x" + good[101:]):
        stored.write_bytes(damaged)
        refused("damaged or from elsewhere")
    save_file({"a": torch.ones(1)}, stored)
    refused("damaged or from elsewhere")
    stored.write_bytes(good)
    for broken in (text[:-20], "", "[]", '{"format": "other"}'):
        description.write_text(broken)
        refused("damaged|not of the format")
    for change in (
        lambda c: c.pop("records"),
        lambda c: c["records"][0].update(makes="magic"),
        lambda c: c["records"][0]["from"].__setitem__(0, "absent.weight"),
        lambda c: c["records"][0].update(parts=9),
        lambda c: c["quantize"].update(scheme="int5"),
        lambda c: c["quantize"].update(colour="red"),
        lambda c: c["weights"].update({"nothing.weight": {}}),
    ):
        content = json.loads(text)
        change(content)
        description.write_text(json.dumps(content))
        refused("does not describe this model|unknown")
    content = json.loads(text)
    content["weights"]["q.weight"]["shape"] = [64, 32]
    description.write_text(json.dumps(content))
    refused(r"'q.weight' is torch.float32 \[64, 64\] in the model but was")
    content = json.loads(text)
    for record in content["records"]:
        record["constants"][0][1] = "nf4-g32"
    description.write_text(json.dumps(content))
    refused("not laid out as nf4-g32")
    description.unlink()
    refused("holds no quantized.json")


def test_packs_stay_those_of_the_runtime() -> None:
    # The names in stored files are labels, not paths of functions.
    assert packs.name_of(packing.pack_weight).endswith("packing.pack_weight")

"""GGUF files: their blocks become packs exactly, in whatever row order, and only for the weights that they hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import graphopt
from graphopt import OptionError, Quantize
from graphopt.backend import graphopt as backend
from graphopt.errors import StoredFileError
from graphopt.quantization import schemes

gguf = pytest.importorskip("gguf")

KINDS = {"Q8_0": "int8-g32", "Q4_0": "int4-g32-sym", "Q4_1": "int4-g32"}
NAMES = {
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
}


def make():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def write(path: Path, model, kind: str) -> None:
    """A file with blocks of three weights; the model then gets the values that the blocks stand for."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    quantised = gguf.GGMLQuantizationType[kind]
    for name, stored in NAMES.items():
        weight = model.get_parameter(name)
        blocks = gguf.quants.quantize(weight.detach().numpy(), quantised)
        values = torch.from_numpy(gguf.quants.dequantize(blocks, quantised))
        if "q_proj" in name:
            order = torch.randperm(weight.shape[0])
            values = values[order]
        with torch.no_grad():
            weight.copy_(values)
        writer.add_tensor(stored, blocks, raw_dtype=quantised)
    writer.add_tensor("output_norm.weight", np.ones(64, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("kind", list(KINDS))
def test_blocks_are_taken_without_rounding(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = make(), tmp_path / "model.gguf"
    write(path, model, kind)
    quantize = graphopt.load_gguf(model, path)
    assert {name: scheme for name, scheme in quantize.assigned if scheme} == dict.fromkeys(NAMES, KINDS[kind])

    def never(*_: object) -> None:
        raise AssertionError("packed again")

    monkeypatch.setattr(schemes.Scheme, "pack", never)
    ids = torch.arange(6)[None]
    with torch.no_grad():
        program = torch.compile(model, backend=backend, options={"quantize": quantize, "target": "inductor"})
        torch.testing.assert_close(program(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


def test_weights_with_other_values_are_left(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "model.gguf"
    write(path, model, "Q4_1")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] += 1
    quantize = graphopt.load_gguf(model, path, Quantize("int8"))
    assert sorted(name for name, _ in quantize.assigned) == sorted(name for name in NAMES if "up_proj" not in name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    with pytest.raises(OptionError, match="no block of .* holds the values"):
        graphopt.load_gguf(model, path)


def test_damaged_and_foreign_files_are_refused(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "model.gguf"
    write(path, model, "Q8_0")
    content = path.read_bytes()
    for damaged in (content[:40], b"", b"GGUF", b"\x00" * 64):
        path.write_bytes(damaged)
        with pytest.raises(StoredFileError, match="damaged or no GGUF"):
            graphopt.load_gguf(model, path)
    with pytest.raises(FileNotFoundError):
        graphopt.load_gguf(model, tmp_path / "absent.gguf")

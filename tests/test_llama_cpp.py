"""llama.cpp beside the other systems: the files that are written for it, and, where it is installed, its answers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GgufConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from graphopt.commands import bench, systems
from graphopt.commands.llama_cpp import LlamaCpp, write_gguf
from graphopt.commands.models import ModelSource
from graphopt.errors import GraphoptError, OptionError

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES | changes)).bfloat16().eval()


def written_and_read(model: LlamaForCausalLM, folder: Path, kind: str) -> Any:
    write_gguf(model, folder / "model.gguf", kind)
    return AutoModelForCausalLM.from_pretrained(
        folder, gguf_file="model.gguf", dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "error"), [("BF16", 0.0), ("F16", 1e-3), ("Q8_0", 1e-2), ("Q4_0", 0.15), ("Q4_1", 0.1)]
)
def test_transformers_reads_what_is_written(tmp_path: Path, kind: str, error: float, tied: bool) -> None:
    """Also the order of the rows of queries and keys, which the two libraries do not share."""
    rotary = {"rope_type": "default", "rope_theta": 5e4}
    model = llama(tie_word_embeddings=tied, rms_norm_eps=1e-4, rope_parameters=rotary)
    read = written_and_read(model, tmp_path, kind)
    assert read.config.rms_norm_eps == pytest.approx(1e-4) and read.config.rope_parameters["rope_theta"] == 5e4
    found = read.state_dict()
    for name, weight in model.state_dict().items():
        spread = weight.float().std().item() if weight.dim() > 1 else 0.0
        assert (found[name].float() - weight.float()).abs().max() <= 4 * error * spread, name


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    model = Qwen2ForCausalLM(Qwen2Config(**SIZES))
    with pytest.raises(OptionError, match="only plain Llamas are written for llama.cpp, not 'qwen2'"):
        write_gguf(model, tmp_path / "model.gguf", "Q8_0")


def test_scaled_rotary_embeddings_are_refused(tmp_path: Path) -> None:
    model = llama(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0})
    with pytest.raises(OptionError, match="not 'linear'"):
        write_gguf(model, tmp_path / "model.gguf", "Q8_0")


def test_rows_that_are_no_whole_number_of_blocks_are_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=r"'model\.layers\.0\.mlp\.down_proj\.weight' can't be written in Q8_0"):
        write_gguf(llama(intermediate_size=80), tmp_path / "model.gguf", "Q8_0")


@pytest.mark.parametrize("name", ["llama.cpp", "graphopt-gguf"])
def test_a_model_without_a_file_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *arguments: object())
    with pytest.raises(OptionError, match=f"system '{name}': model 'llama:64x1' comes from no .gguf file"):
        bench.plan("llama:64x1", "decode", f"eager,{name}", "float32", 1, {"decode": 8})


def test_an_unknown_kind_of_blocks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *arguments: object())
    with pytest.raises(OptionError, match=r"unknown kind of blocks 'Q8' \(did you mean 'Q8_0'\?\); known are F16"):
        systems.parse_systems("llama.cpp:Q8", ModelSource("any"))


def test_encoding_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda *arguments: object())
    with pytest.raises(OptionError, match="work 'encode' is not for llama.cpp"):
        bench.plan("llama:64x1", "encode", "eager,llama.cpp:Q8_0", "float32", 1, {"encode": 8})


def test_blocks_of_the_file_become_the_options(tmp_path: Path) -> None:
    read, source = written_and_read(llama(), tmp_path, "Q8_0"), ModelSource("model", tmp_path, gguf="model.gguf")
    (system,) = systems.parse_systems("graphopt-gguf", source)
    given: dict[str, Any] = {}
    read.compile = given.update  # type: ignore[method-assign,assignment]
    assert system.prepared(read, source) is read
    assigned = dict(given["options"]["quantize"].assigned)
    assert given["backend"] == "graphopt" and assigned["model.layers.0.self_attn.q_proj.weight"] == "int8-g32"


@pytest.mark.skipif(importlib.util.find_spec("llama_cpp") is None, reason="llama.cpp is not installed")
def test_llama_cpp_answers_as_the_model_does() -> None:
    model = llama()
    runs = LlamaCpp(model, None, "BF16")
    assert runs.config is model.config
    for rows in (1, 3):
        ids = torch.randint(0, 96, (rows, 9))
        with torch.no_grad():
            wanted = model(input_ids=ids).logits[:, -3:].float()
        prompt = runs(ids[:, :7], torch.arange(7).expand(rows, -1)).logits[:, 0]
        steps = [runs(ids[:, [at]], torch.full((rows, 1), at)).logits[:, 0] for at in (7, 8)]
        torch.testing.assert_close(torch.stack([prompt, *steps], 1), wanted, rtol=0.05, atol=0.02)
    with pytest.raises(GraphoptError, match="llama.cpp has room for 519 tokens, 512 behind the prompt of 7"):
        runs(ids[:, [0]], torch.full((3, 1), 519))

"""GGUF files: their blocks become packs exactly, in whatever row order, and only for the weights that they hold."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphopt
from graphopt import OptionError, Quantize
from graphopt.backend import graphopt as backend
from graphopt.errors import StoredFileError
from graphopt.quantization import gguf_file, schemes
from graphopt.quantization.release import is_released
from graphopt.runtime import packs

gguf = pytest.importorskip("gguf")

KINDS = {"Q8_0": "int8-g32", "Q4_0": "int4-g32-sym", "Q4_1": "int4-g32", "Q4_K": "q4_k"}
NAMES = {
    "model.layers.0.self_attn.q_proj.weight": "blk.0.attn_q.weight",
    "model.layers.0.self_attn.v_proj.weight": "blk.0.attn_v.weight",
    "model.layers.0.mlp.up_proj.weight": "blk.0.ffn_up.weight",
}


def make(hidden: int = 64):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=hidden, intermediate_size=96, num_hidden_layers=1, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def blocks_of(rows: int, columns: int, kind: str, *, seed: int = 0) -> np.ndarray:
    """Blocks of any codes and counts under scales that give weights of ordinary size: uint8 [rows, bytes]."""
    length, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (rows, columns // length, size), dtype=np.uint8)
    for place, most in {"Q4_K": {0: 2e-4, 2: 2e-3}, "Q5_K": {0: 1e-4, 2: 2e-3}, "Q6_K": {-2: 2e-5}}[kind].items():
        scales = generator.uniform(-most, most, blocks.shape[:2]).astype(np.float16)
        blocks[..., place % size : place % size + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(rows, -1)


def write(path: Path, model, kind: str, others: dict[str, str] | None = None) -> None:
    """A file with blocks of three weights; the model then gets the values that the blocks stand for. others: another
    kind for some of them."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    for seed, (name, stored) in enumerate(NAMES.items()):
        weight = model.get_parameter(name)
        own = (others or {}).get(name, kind)
        quantised = gguf.GGMLQuantizationType[own]
        if own.endswith("K"):
            blocks = blocks_of(*weight.shape, own, seed=seed)
        else:
            blocks = gguf.quants.quantize(weight.detach().float().numpy(), quantised)
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


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("kind", list(KINDS))
def test_blocks_are_taken_without_rounding(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = make(256 if kind == "Q4_K" else 64), tmp_path / "model.gguf"
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


def assert_refused_for_other_weights(model: torch.nn.Module, path: Path) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    with pytest.raises(OptionError, match="no block of .* holds the values"):
        graphopt.load_gguf(model, path)


def test_weights_with_other_values_are_left(tmp_path: Path) -> None:
    model, path = make(), tmp_path / "model.gguf"
    write(path, model, "Q4_1")
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3, 3] += 1
    quantize = graphopt.load_gguf(model, path, Quantize("int8"))
    assert sorted(name for name, _ in quantize.assigned) == sorted(name for name in NAMES if "up_proj" not in name)
    assert_refused_for_other_weights(model, path)


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


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 5), superblocks=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_a_superblock_means_what_the_gguf_package_says(rows: int, superblocks: int, seed: int) -> None:
    blocks = blocks_of(rows, 256 * superblocks, "Q4_K", seed=seed)
    expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_K)
    packed = gguf_file._q4_k(torch.from_numpy(blocks).reshape(rows, superblocks, 144))
    scheme, columns = schemes.named("q4_k"), 256 * superblocks
    assert [(tuple(part.shape), part.dtype) for part in packed] == scheme.layout(rows, columns)
    assert torch.equal(scheme.unpack(packed, columns), torch.from_numpy(expected))


def test_a_mixture_of_kinds_keeps_what_has_a_scheme(tmp_path: Path) -> None:
    left = {"model.layers.0.self_attn.v_proj.weight": "Q6_K", "model.layers.0.mlp.up_proj.weight": "Q5_K"}
    model, path = make(256).bfloat16(), tmp_path / "model.gguf"
    write(path, model, "Q4_K", left)
    quantize = graphopt.load_gguf(model, path)
    taken = "model.layers.0.self_attn.q_proj.weight"
    assert {name: scheme for name, scheme in quantize.assigned if scheme} == {taken: "q4_k"}
    program = torch.compile(model, backend=backend, options={"quantize": quantize, "target": "reference"})
    ids = torch.arange(6)[None]
    with torch.no_grad():
        expected = model(ids).logits
        torch.testing.assert_close(program(ids).logits, expected, rtol=2e-2, atol=2e-2)
        report = graphopt.explain(model, ids, options={"quantize": quantize, "target": "reference"})
    told = {refusal.reason for entry in report.graphs[0].passes for refusal in entry.refusals}
    for name, kind in left.items():
        reason = f"its blocks are of the kind {kind}, which is no scheme here, so that it stays in torch.bfloat16"
        assert f"{name}: {reason}" in told
    # What is left may have a scheme of its own, by name.
    both = graphopt.load_gguf(model, path, Quantize("int8"))
    assert both.assigned == ((taken, "q4_k"),) and both.scheme == "int8" and both.reasons == ()


def write_whole(path: Path) -> None:
    """A Llama of kinds as in a "Q4_K_M" file, with all that transformers wants to read."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(256)
    writer.add_feed_forward_length(512)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(64)
    writer.add_vocab_size(64)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{index}" for index in range(64)])
    writer.add_token_merges([])
    shapes = {
        "attn_q": (256, 256, "Q4_K"), "attn_k": (128, 256, "Q4_K"), "attn_v": (128, 256, "Q6_K"),
        "attn_output": (256, 256, "Q4_K"), "ffn_gate": (512, 256, "Q4_K"), "ffn_up": (512, 256, "Q4_K"),
        "ffn_down": (256, 512, "Q5_K"),
    }  # fmt: skip
    tensors = {"token_embd": (64, 256, "Q6_K"), "output": (64, 256, "Q6_K")}
    tensors |= {f"blk.0.{name}": shape for name, shape in shapes.items()}
    for seed, (name, shape) in enumerate(tensors.items()):
        blocks = blocks_of(*shape, seed=seed)
        writer.add_tensor(f"{name}.weight", blocks, raw_dtype=gguf.GGMLQuantizationType[shape[2]])
    for name in ("blk.0.attn_norm", "blk.0.ffn_norm", "output_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(256, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.usefixtures("cpp_library")
def test_what_transformers_reads_runs_by_the_kernels(tmp_path: Path) -> None:
    from transformers import GgufConfig, LlamaForCausalLM

    path, ids = tmp_path / "model.gguf", torch.arange(9)[None]
    write_whole(path)
    plain = {"gguf_file": path.name, "quantization_config": GgufConfig(dequantize=True)}
    model = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, **plain).eval()
    quantize = graphopt.load_gguf(model, path)
    # Rows of query and key stand in another order in the file.
    kept = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    names = {f"model.layers.0.{name}.weight" for name in kept}
    assert {name for name, scheme in quantize.assigned if scheme == "q4_k"} == names
    assert len(quantize.reasons) == 4
    with torch.no_grad():
        expected = model(ids).logits
        report = graphopt.explain(model, ids, options={"quantize": quantize, "target": "cpu"})
        graphopt.release_weights(model)
        program = torch.compile(model, backend=backend, options={"quantize": quantize, "target": "cpu"})
        torch.testing.assert_close(program(ids).logits, expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(program(ids[:, :1]).logits, expected[:, :1], rtol=1e-3, atol=1e-3)
    chosen = [choice for choice in report.graphs[0].lowerings if "quantized" in choice.op]
    assert {choice.lowering for choice in chosen} == {"cpp.quantized_linear", "cpp.parallel_quantized_linear"}


def test_a_file_without_any_scheme_is_no_error(tmp_path: Path) -> None:
    model, path = make(256), tmp_path / "model.gguf"
    write(path, model, "Q6_K")
    quantize = graphopt.load_gguf(model, path)
    assert {scheme for _, scheme in quantize.assigned} == {""}
    assert dict(quantize.reasons).keys() == NAMES.keys()
    assert_refused_for_other_weights(model, path)


def test_blocks_are_saved_and_stand_in_for_their_weights(tmp_path: Path) -> None:
    model, path, ids = make(256), tmp_path / "model.gguf", torch.arange(6)[None]
    write(path, model, "Q4_K", {"model.layers.0.mlp.up_proj.weight": "Q6_K"})
    quantize = graphopt.load_gguf(model, path)

    def run(given, options: Quantize) -> torch.Tensor:
        torch._dynamo.reset()
        with torch.no_grad():
            program = torch.compile(given, backend=backend, options={"quantize": options, "target": "inductor"})
            return program(ids).logits

    answer = run(model, quantize)
    graphopt.save_quantized(model, tmp_path / "saved", quantize)
    assert graphopt.release_weights(model).released == tuple(NAMES)[:2]
    assert torch.equal(run(model, quantize), answer)
    packs.refresh()
    with torch.device("meta"):
        empty = make(256)
    loaded = graphopt.load_quantized(empty, tmp_path / "saved")
    assert loaded == quantize and is_released(empty.get_parameter(next(iter(NAMES))))
    assert torch.equal(run(empty, loaded), answer)


def test_a_weight_that_changes_is_packed_again(tmp_path: Path) -> None:
    model, path, ids = make(256), tmp_path / "model.gguf", torch.arange(6)[None]
    write(path, model, "Q4_K")
    quantize = graphopt.load_gguf(model, path)
    program = torch.compile(model, backend=backend, options={"quantize": quantize, "target": "reference"})
    with torch.no_grad():
        torch.testing.assert_close(program(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        model.model.layers[0].mlp.up_proj.weight.mul_(-3)
        changed = model(ids).logits
        assert (program(ids).logits - changed).norm() < 0.05 * changed.norm()


def test_blocks_that_end_too_soon_are_refused(tmp_path: Path) -> None:
    model, path = make(256), tmp_path / "model.gguf"
    write(path, model, "Q4_K")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - 4000])
    with pytest.raises(StoredFileError, match="damaged or no GGUF"):
        graphopt.load_gguf(model, path)

"""Tiny models whose masks are computed from positions: sliding windows, padding on the left, prefixes, documents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from graphopt import backend, pipeline
from graphopt.options import Options
from graphopt.passes.fuse.attention_regions import ATTENTIONS
from tests.backends.graphs import run
from tests.backends.test_triton_models import decoder

transformers = pytest.importorskip("transformers")

QUERIES = 70
SLIDING = {
    "Mistral": decoder("Mistral", sliding_window=9),
    "Gemma2": decoder("Gemma2", head_dim=16, sliding_window=9),
    "Llama": decoder("Llama"),
}


def build(name: str) -> nn.Module:
    torch.manual_seed(0)
    if name == "Gemma3":
        config = transformers.Gemma3TextConfig(
            hidden_size=32, intermediate_size=48, num_attention_heads=4, num_key_value_heads=2, vocab_size=99,
            num_hidden_layers=2, head_dim=16, sliding_window=9, layer_types=["sliding_attention", "full_attention"],
        )  # fmt: skip
        return transformers.Gemma3ForCausalLM(config).eval()  # type: ignore[no-any-return]
    if name == "Bloom":
        config = transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=99)
        return transformers.BloomForCausalLM(config).eval()  # type: ignore[no-any-return]
    if name == "Mpt":
        config = transformers.MptConfig(d_model=32, n_layers=2, n_heads=4, vocab_size=99, max_seq_len=128)
        return transformers.MptForCausalLM(config).eval()  # type: ignore[no-any-return]
    return SLIDING[name](2)


def masks_read(graph_module: GraphModule) -> list[int]:
    """For each attention region how many tensors it reads that hold an element for each query and key."""
    found = []
    for region in graph_module.children():
        nodes = list(region.graph.nodes)  # type: ignore[union-attr, arg-type]
        for attention in (node for node in nodes if node.target in ATTENTIONS):
            queries, keys = (x.meta["val"].shape[-2] for x in attention.args[:2])
            values = [node.meta["val"] for node in nodes if node.op == "placeholder"]
            read = [x for x in values if isinstance(x, Tensor) and x.shape[-2:] == (queries, keys)]
            found.append(sum(x.numel() > keys for x in read))
    return found


def agrees(function: Callable[..., Tensor], *inputs: Tensor, rows: Tensor | None = None) -> list[int]:
    """Check a function against eager where rows count; for each attention what it reads of its mask."""
    kept: list[GraphModule] = []

    def prepare(graph_module: GraphModule) -> None:
        options = Options(target="triton")
        pipeline.run(graph_module, backend.arranged(options, "triton"), options)
        kept.append(graph_module)

    with torch.no_grad():
        want = function(*inputs)
    got, (compiled,) = run(function, *inputs, prepare=prepare)
    rows = torch.ones(want.shape[:2], dtype=torch.bool) if rows is None else rows
    torch.testing.assert_close(got[rows], want[rows], rtol=1e-3, atol=1e-4)
    assert got[rows].argmax(-1).equal(want[rows].argmax(-1))
    return masks_read(kept[0])


def logits(model: nn.Module) -> Callable[..., Tensor]:
    def function(ids: Tensor, mask: Tensor | None = None) -> Tensor:
        result: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return result

    return function


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize("name", ["Mistral", "Gemma2", "Gemma3", "Llama"])
def test_prompts(name: str, padded: bool) -> None:
    ids = torch.randint(0, 99, (2, QUERIES))
    mask = (torch.arange(QUERIES) >= torch.tensor([[0], [11]])).long()
    inputs = (ids, mask) if padded else (ids,)
    assert agrees(logits(build(name)), *inputs, rows=mask.bool() if padded else None) == [0, 0]


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "left-padded"])
@pytest.mark.parametrize(("name", "masks"), [("Bloom", [0, 0]), ("Mpt", [])])
def test_alibi_added_between_two_products(name: str, masks: list[int], padded: bool) -> None:
    """BLOOM's mask and bias are computed from positions; MPT fills hidden scores, which is no mask that is added."""
    ids = torch.randint(0, 99, (2, QUERIES))
    mask = (torch.arange(QUERIES) >= torch.tensor([[0], [11]])).long()
    inputs = (ids, mask) if padded else (ids,)
    assert agrees(logits(build(name)), *inputs, rows=mask.bool() if padded else None) == masks


def test_a_prefix_that_sees_all_of_itself() -> None:
    model = build("Llama")

    def function(ids: Tensor, lengths: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1])
        mask = (place <= place[:, None]) | (place < lengths[:, None, None, None])
        result: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return result

    assert agrees(function, torch.randint(0, 99, (2, QUERIES)), torch.tensor([5, 40])) == [0, 0]


def test_documents_packed_into_one_row() -> None:
    model = build("Llama")

    def function(ids: Tensor, document: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1])
        mask = (place <= place[:, None]) & (document[:, None, :, None] == document[:, None, None])
        result: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        return result

    documents = torch.randint(0, 4, (2, QUERIES)).sort(-1).values
    assert agrees(function, torch.randint(0, 99, (2, QUERIES)), documents) == [0, 0]


@pytest.mark.parametrize("name", ["Mistral", "Llama"])
def test_a_step_after_a_padded_prompt(name: str) -> None:
    model = build(name)
    ids, mask = torch.randint(0, 99, (2, QUERIES)), (torch.arange(QUERIES + 1) >= torch.tensor([[0], [11]])).long()
    with torch.no_grad():
        past = model(input_ids=ids, attention_mask=mask[:, :-1], use_cache=True).past_key_values
    rows = [x for layer in past.layers for x in (layer.keys, layer.values)]

    def step(ids: Tensor, mask: Tensor, *rows: Tensor) -> Tensor:
        cache: Any = transformers.DynamicCache()
        for layer in range(len(rows) // 2):
            cache.update(*rows[2 * layer : 2 * layer + 2], layer)
        result: Tensor = model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True).logits
        return result

    assert agrees(step, ids[:, :1], mask, *rows) == [0, 0]

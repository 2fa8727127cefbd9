"""How many graphs `generate` costs: prompts of three lengths and batches of two sizes share them."""

from typing import Any

import pytest
import torch

from tests.suite import architectures, door


def _generate(model: Any, batch: int, length: int, **settings: Any) -> torch.Tensor:
    torch.manual_seed(length)
    prompt = torch.randint(3, architectures.VOCABULARY, (batch, length))
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, **settings}
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


def _subject(name: str, target: str) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = architectures.BY_NAME[name].build().eval()
    torch.manual_seed(0)
    subject = architectures.BY_NAME[name].build().eval()
    subject.forward = door.compiled(subject.forward, target=target)
    return model, subject


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_one_generate_is_at_most_three_graphs(name: str) -> None:
    """One prefill graph and at most two decode graphs."""
    model, subject = _subject(name, "reference")
    assert torch.equal(_generate(subject, 2, 7), _generate(model, 2, 7))
    assert door.graphs_compiled() <= 3
    assert door.graph_breaks() == {}


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_lengths_and_batches_share_graphs(cache: str, record_property: Any) -> None:
    """Three prompt lengths and two batch sizes: the graphs stop growing, and Dynamo's limit of eight stays away."""
    model, subject = _subject("llama", "reference")
    settings = {"cache_implementation": "static"} if cache == "static" else {}
    counts = []
    for batch in (1, 3):
        for length in (5, 9, 17):
            got, want = (_generate(side, batch, length, **settings) for side in (subject, model))
            assert torch.equal(got, want), (batch, length)
            counts.append(door.graphs_compiled())
    record_property("graphs", counts)
    print(f"{cache} cache: graphs after each of six generates {counts}, graph breaks {door.graph_breaks()}")
    assert counts[-1] <= 8, counts
    assert door.graph_breaks() == {}
    settled = door.graphs_compiled()
    for batch, length in ((1, 9), (3, 5), (3, 13)):
        assert torch.equal(
            _generate(subject, batch, length, **settings), _generate(model, batch, length, **settings)
        )
    assert door.graphs_compiled() <= settled + (cache == "static")

"""Edge programs: empty tensors, no dimensions, sizes that change, and how many graphs that costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.suite import compare, door
from tests.suite.compare import assert_like_eager


class _Block(torch.nn.Module):
    """A small pre-norm block with grouped heads: the shape of a decoder layer."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = torch.nn.RMSNorm(16)
        self.q, self.k, self.v = (torch.nn.Linear(16, width, bias=False) for width in (16, 8, 8))
        self.up, self.gate = torch.nn.Linear(16, 24), torch.nn.Linear(16, 24)
        self.down = torch.nn.Linear(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, _ = x.shape
        h = self.norm(x)
        widths = ((self.q, 4), (self.k, 2), (self.v, 2))
        q, k, v = (proj(h).view(batch, length, heads, 4).transpose(1, 2) for proj, heads in widths)
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, length, 16)
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


SHAPES_OF_EMPTY = [(0,), (0, 4), (3, 0), (2, 0, 4)]

OF_EMPTY: dict[str, Callable[[torch.Tensor], Any]] = {
    "pointwise": lambda x: (x * 2 + 1).exp(),
    "sum": lambda x: (x.sum(), x.sum(-1), x.prod()),
    "mean": lambda x: x.mean(),
    "softmax": lambda x: x.softmax(-1),
    "matmul": lambda x: x @ torch.ones(x.shape[-1], 3),
    "cat": lambda x: torch.cat([x, x, torch.ones(1, *x.shape[1:])]),
    "view": lambda x: (x.flatten(), x.unsqueeze(0), x.expand(2, *x.shape)),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]) if x.shape[-1] else x,
    "mutation": lambda x: x.add_(1),
    "any": lambda x: (x.bool().any(), x.bool().all()),
    "index": lambda x: x[..., :1] + 1,
}


@pytest.mark.parametrize("shape", SHAPES_OF_EMPTY, ids=str)
@pytest.mark.parametrize("name", OF_EMPTY)
def test_empty(name: str, shape: tuple[int, ...], target: str) -> None:
    assert_like_eager(OF_EMPTY[name], torch.empty(shape), target=target)


@pytest.mark.parametrize("batch, length", [(0, 3), (2, 0)])
def test_empty_block(batch: int, length: int, target: str) -> None:
    with torch.no_grad():
        assert_like_eager(_Block(), torch.empty(batch, length, 16), target=target)


def test_empty_linear_on_both_sides(target: str) -> None:
    with torch.no_grad():
        assert_like_eager(torch.nn.Linear(4, 0), torch.randn(3, 4), target=target)
        assert_like_eager(torch.nn.Linear(0, 4), torch.randn(3, 0), target=target)


def test_empty_attention_keys(target: str) -> None:
    q, k = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 0, 4)
    assert_like_eager(lambda q, k: F.scaled_dot_product_attention(q, k, k), q, k, target=target)


def test_no_dimensions(target: str) -> None:
    def program(x: torch.Tensor, y: torch.Tensor) -> Any:
        return x + y, x * 2, x.sum(), x.expand(3), x.view(1, 1), y[None], torch.stack([x, y]), x.softmax(0), x.item()

    assert_like_eager(program, torch.tensor(2.0), torch.tensor(3.0), target=target)


def test_no_dimensions_mixed_dtypes(target: str) -> None:
    def program(x: torch.Tensor, zero: torch.Tensor) -> Any:
        return x * zero, x + zero.double(), zero.to(torch.int64) + x

    assert_like_eager(program, torch.randn(4).to(torch.bfloat16), torch.tensor(2.0), target=target)


@pytest.mark.parametrize("shape", [(1,), (1, 1), (2, 1, 3), (1, 5, 1)], ids=str)
def test_dimensions_of_size_one(shape: tuple[int, ...], target: str) -> None:
    def program(x: torch.Tensor) -> Any:
        broadcast = x + torch.ones(4, *([1] * x.dim()))
        return x.squeeze(), x.sum(0, keepdim=True), broadcast, x.flip(0), x.std(unbiased=False)

    assert_like_eager(program, torch.randn(shape), target=target)


def test_sizes_share_graphs(target: str) -> None:
    """Many batch and sequence sizes: 0 and 1 may have graphs of their own, all others share one."""
    block = _Block().eval()
    subject = door.compiled(block, target=target)
    sizes = [(2, 5), (3, 7), (4, 4), (9, 2), (2, 3), (5, 33), (3, 3), (7, 16)]
    with torch.no_grad():
        for batch, length in sizes:
            x = torch.randn(batch, length, 16)
            compare.assert_same(subject(x), block(x))
        assert door.graphs_compiled() <= 3  # static, one size dynamic, both dynamic
        for batch, length in [(1, 5), (2, 1), (1, 1), (0, 4), (3, 0)]:
            x = torch.randn(batch, length, 16)
            compare.assert_same(subject(x), block(x))
        settled = door.graphs_compiled()
        for batch, length in [*sizes, (1, 9), (6, 1), (1, 1), (0, 2), (2, 0)]:
            x = torch.randn(batch, length, 16)
            compare.assert_same(subject(x), block(x))
        assert door.graphs_compiled() <= settled + 1
    assert settled <= 8


def test_dynamic_from_the_start(target: str) -> None:
    block = _Block().eval()
    subject = door.compiled(block, target=target, dynamic=True)
    with torch.no_grad():
        for batch, length in [(2, 5), (3, 7), (4, 4), (9, 2)]:
            x = torch.randn(batch, length, 16)
            compare.assert_same(subject(x), block(x))
    assert door.graphs_compiled() == 1


def test_marked_dynamic(target: str) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        return torch.cat([x, x * 2]).softmax(-1).sum(0)

    subject = door.compiled(program, target=target)
    for rows in (4, 2, 9):
        x = torch.randn(rows, 5)
        torch._dynamo.mark_dynamic(x, 0)
        compare.assert_same(subject(x), program(x))
    assert door.graphs_compiled() == 1


def test_symbolic_arithmetic_on_sizes(target: str) -> None:
    def program(x: torch.Tensor) -> Any:
        rows, columns = x.shape
        pad = (-columns) % 8
        padded = F.pad(x, (0, pad))
        return padded.view(rows, -1, 8).mean(-1), rows * columns + 1, x.numel(), torch.arange(columns) // 2

    subject = assert_like_eager(program, torch.randn(3, 13), target=target, dynamic=True)
    for shape in [(2, 16), (5, 9), (4, 31)]:
        x = torch.randn(shape)
        compare.assert_same(subject(x), program(x))


def test_equal_sizes_are_not_the_same_size(target: str) -> None:
    """Two dimensions that happened to be equal at the first call differ at the second."""

    def program(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sum(1, keepdim=True) + y.t().sum(0, keepdim=True).t()

    subject = door.compiled(program, target=target, dynamic=True)
    for shape in [(4, 4), (4, 6), (4, 3)]:
        x, y = torch.randn(shape), torch.randn(4, shape[1] + 1)
        compare.assert_same(subject(x, y), program(x, y))


def test_strides_change_between_calls(target: str) -> None:
    def program(x: torch.Tensor) -> Any:
        return x * 2, x.contiguous(), x.sum(-1), x.clone()

    subject = door.compiled(program, target=target)
    whole = torch.randn(4, 8)
    for x in (whole, whole[:, :4], whole.t(), whole[::2], whole[:1].expand(4, 8), torch.randn(8, 4).t()):
        compare.assert_same(subject(x), program(x))


def test_channels_last(target: str) -> None:
    module = torch.nn.Conv2d(3, 4, 3, padding=1)
    with torch.no_grad():
        assert_like_eager(module, torch.randn(2, 3, 5, 5).to(memory_format=torch.channels_last), target=target)


def test_long_reduction(target: str) -> None:
    assert_like_eager(lambda x: (x.sum(), x.softmax(0), x.cumsum(0)[-1]), torch.rand(100_003), target=target)


def test_many_arguments(target: str) -> None:
    assert_like_eager(lambda *xs: sum(xs), *[torch.full((3,), float(n)) for n in range(70)], target=target)


def test_symbolic_window_of_pooling(target: str) -> None:
    """Inductor cannot compile it: the graph runs by its meaning."""

    def program(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(x, (height, width))

    subject = door.compiled(program, target=target, dynamic=True)
    x = torch.randn(1, 8, 8, 8)
    for height, width in [(5, 7), (3, 2)]:
        compare.assert_same(subject(x, height, width), program(x, height, width))


@pytest.mark.parametrize("stride", [2, 3])
def test_gradient_of_padded_pooling(stride: int, target: str) -> None:
    pool = torch.nn.AvgPool1d(7, stride=stride, padding=3, ceil_mode=True)
    assert_like_eager(pool, torch.randn(1, 2, 9, requires_grad=True), target=target, backward=True)


def test_unpooling_in_channels_last(target: str) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        values, places = torch.nn.functional.max_pool2d(x, 3, (2, 1), return_indices=True)
        return torch.nn.functional.max_unpool2d(values, places, 3, (2, 1))

    for batch in (1, 2):
        assert_like_eager(program, torch.randn(batch, 2, 3, 6).to(memory_format=torch.channels_last), target=target)

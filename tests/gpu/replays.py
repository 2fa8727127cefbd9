"""What a recorded graph can get wrong: other inputs, other sizes, updates, random numbers, answers that are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.suite import compare, door

CALLS = 4


def _compiled(function: Callable[..., Any], target: str) -> Callable[..., Any]:
    return door.compiled(function, target=target, mode="reduce-overhead")


def other_inputs(device: str, target: str) -> None:
    """Each call sees its own inputs, and earlier answers stay as they were."""
    weight = torch.randn(64, 48, device=device)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        y = (x @ weight.t()).relu()
        return y, y.softmax(-1)

    call = _compiled(function, target)
    given = [torch.randn(5, 48, device=device) for _ in range(CALLS)]
    with torch.no_grad():
        kept = [call(x) for x in given]
        for x, answer in zip(given, kept, strict=True):
            compare.assert_same(answer, function(x))


def other_sizes(device: str, target: str) -> None:
    """Sizes that come back, and sizes that were not seen before."""
    call = _compiled(lambda x: (x * 2).sum(-1), target)
    with torch.no_grad():
        for rows in (3, 5, 3, 7, 5, 3, 9):
            x = torch.randn(rows, 40, device=device)
            compare.assert_same(call(x), (x * 2).sum(-1))


class Counting(nn.Module):
    """Adds to a buffer at each call."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16, device=device)
        self.register_buffer("total", torch.zeros(16, device=device))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        self.total += y.sum(0)
        return y + self.total


def updated_buffers(device: str, target: str) -> None:
    """A buffer is updated once for each call, those that record included; a new weight is seen."""
    mine, eager = Counting(device), Counting(device)
    eager.load_state_dict(mine.state_dict())
    call = _compiled(mine, target)
    with torch.no_grad():
        for number in range(CALLS + 2):
            x = torch.randn(4, 16, device=device)
            compare.assert_same(call(x), eager(x))
            compare.assert_same(mine.total, eager.total)
            if number == CALLS:
                for module in (mine, eager):
                    module.linear.weight.mul_(2)


def updated_inputs(device: str, target: str) -> None:
    """An input is updated in place, at other addresses each time."""

    def function(x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2

    call = _compiled(function, target)
    with torch.no_grad():
        for _ in range(CALLS):
            mine = torch.randn(8, 8, device=device)
            eager = mine.clone()
            compare.assert_same(call(mine), function(eager))
            compare.assert_same(mine, eager)


def random_numbers(device: str, target: str) -> None:
    """Every replay draws new numbers, and the seed decides which."""

    def function(x: Tensor) -> Tensor:
        return x + torch.rand_like(x)

    call, x = _compiled(function, target), torch.zeros(64, device=device)
    with torch.no_grad():
        call(x), call(x)
        answers = []
        for _ in range(2):
            torch.manual_seed(7)
            answers.append([call(x) for _ in range(CALLS)])
    for first, again in zip(*answers, strict=True):
        compare.assert_same(first, again)
    assert len({float(answer.sum()) for answer in answers[0]}) == CALLS, "a replay drew the numbers of another"


def long_reductions(device: str, target: str) -> None:
    """Scratch memory between kernels lies in the recording's own pool."""

    def function(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return x.softmax(-1), x.argmax(-1), x[:, :9001] @ w

    call, w = _compiled(function, target), torch.randn(9001, 24, device=device) / 90
    with torch.no_grad():
        for _ in range(CALLS):
            x = torch.randn(2, 80_003, device=device)
            exact = function(x.double(), w.double())
            compare.assert_same(call(x, w), function(x, w), oracle=lambda e=exact: e)  # type: ignore[misc]


def many_keys(device: str, target: str) -> None:
    """Programs count themselves in memory that each replay finds as the recording found it."""

    def function(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        first = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        return F.scaled_dot_product_attention(first, v, k, enable_gqa=True)

    call = _compiled(function, target)
    with torch.no_grad():
        for _ in range(CALLS):
            q, k, v = (torch.randn(2, *shape, 64, device=device) for shape in ((8, 1), (2, 1500), (2, 1500)))
            exact = function(q.double(), k.double(), v.double())
            compare.assert_same(call(q, k, v), function(q, k, v), oracle=lambda e=exact: e)  # type: ignore[misc]


CHECKS: dict[str, Callable[[str, str], None]] = {
    "other inputs": other_inputs,
    "other sizes": other_sizes,
    "updated buffers": updated_buffers,
    "updated inputs": updated_inputs,
    "random numbers": random_numbers,
    "long reductions": long_reductions,
    "many keys": many_keys,
}

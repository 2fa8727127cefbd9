"""A dead head that comes alive is back on the next call, however the weight was changed; through torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

import graphopt
from graphopt.testing.blocks import Block, BlockShape
from tests.suite import door

HEAD = 8


@pytest.fixture
def block() -> Block:
    torch.manual_seed(0)
    made = Block(BlockShape(heads=4, kv_heads=2, head_size=HEAD, hidden=32)).eval().requires_grad_(False)
    made.o.weight[:, HEAD : 2 * HEAD] = 0
    made.v.weight[HEAD:] = 0
    made.down.weight[:, 8:24] = 0
    return made


def _in_place(weight: nn.Parameter) -> None:
    weight.normal_()


def _on_a_slice(weight: nn.Parameter) -> None:
    weight[0, HEAD + 1] = 1.0
    weight[HEAD + 1, 0] = 1.0


def _data_swap(weight: nn.Parameter) -> None:
    weight.data = torch.randn_like(weight)


def _transposed_data(weight: nn.Parameter) -> None:
    weight.data = torch.randn(weight.shape[1], weight.shape[0]).t()


def _through_data(weight: nn.Parameter) -> None:
    weight.data.normal_()


CHANGES = (_in_place, _on_a_slice, _data_swap, _transposed_data, _through_data)


@pytest.mark.rotate(one_in=2)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("name", ["o", "v", "down"])
def test_alive_on_the_next_call(block: Block, change: Callable[[nn.Parameter], None], name: str) -> None:
    x = torch.randn(2, 5, 32)
    subject = door.compiled(block, target="reference")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(subject(x), block(x))
        before, revived = block(x)[0], graphopt.counters["revived"]
        change(getattr(block, name).weight)
        assert not torch.allclose(before, block(x)[0]), "the change must matter"
        for _ in range(3):
            torch.testing.assert_close(subject(x), block(x))
        # Other strides make Dynamo compile again by itself.
        noticed = int(change is not _transposed_data)
        assert graphopt.counters["revived"] == revived + noticed, "the second call after it is compiled again"


def test_load_state_dict(block: Block) -> None:
    x = torch.randn(1, 3, 32)
    subject = door.compiled(block, target="reference")
    with torch.no_grad():
        for assign in (False, True):
            torch.testing.assert_close(subject(x), block(x))
            state = {name: torch.randn_like(value) for name, value in block.state_dict().items()}
            block.load_state_dict(state, assign=assign)
            torch.testing.assert_close(subject(x), block(x))


def test_a_change_that_keeps_it_dead_compiles_nothing(block: Block) -> None:
    x = torch.randn(2, 5, 32)
    subject = door.compiled(block, target="reference")
    with torch.no_grad():
        torch.testing.assert_close(subject(x), block(x))
        graphs, revived = door.graphs_compiled(), graphopt.counters["revived"]
        block.o.weight.mul_(2)
        block.q.weight.normal_()
        torch.testing.assert_close(subject(x), block(x))
        assert (door.graphs_compiled(), graphopt.counters["revived"]) == (graphs, revived)


def test_two_models_of_one_class(block: Block) -> None:
    """One model's heads are dead, the other's are not: both may be served by one compiled graph."""
    other = copy.deepcopy(block)
    for parameter in other.parameters():
        parameter.normal_()
    x = torch.randn(2, 5, 32)
    subjects = [door.compiled(model, target="reference") for model in (block, other)]
    with torch.no_grad():
        for _ in range(2):
            for subject, model in zip(subjects, (block, other), strict=True):
                torch.testing.assert_close(subject(x), model(x))

"""Weights are runtime inputs: however they change between two calls, the next call uses the new ones."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize

from tests.suite import compare, door


class _Layer(torch.nn.Module):
    """A block with everything that might be packed, merged or folded: parallel linears, biases, a norm, a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(32, 16)
        self.norm = torch.nn.RMSNorm(16)
        self.q, self.k = torch.nn.Linear(16, 16, bias=False), torch.nn.Linear(16, 8)
        self.gate, self.up = torch.nn.Linear(16, 24, bias=False), torch.nn.Linear(16, 24, bias=False)
        self.down = torch.nn.Linear(24, 16)
        self.head = torch.nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("shift", torch.randn(16))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.embedding(ids)) + self.shift
        x = x + self.q(x) + self.k(x).repeat(1, 1, 2)
        x = x + self.down(F.silu(self.gate(x)) * self.up(x))
        return self.head(x)


def _fresh_like(value: torch.Tensor) -> torch.Tensor:
    return torch.randn(value.shape, dtype=value.dtype)


def _in_place(layer: _Layer) -> None:
    layer.q.weight.copy_(_fresh_like(layer.q.weight))
    layer.k.bias.add_(1)


def _in_place_on_a_slice(layer: _Layer) -> None:
    layer.gate.weight[3:5].zero_()


def _data_in_place(layer: _Layer) -> None:
    """Writes through `.data` do not bump the version counter that a guard might read."""
    layer.q.weight.data.copy_(_fresh_like(layer.q.weight))
    layer.down.weight.data[0].zero_()


def _data_swap(layer: _Layer) -> None:
    layer.up.weight.data = _fresh_like(layer.up.weight)
    layer.norm.weight.data = _fresh_like(layer.norm.weight)


def _data_swap_transposed(layer: _Layer) -> None:
    layer.q.weight.data = torch.randn(16, 16).t()


def _through_numpy(layer: _Layer) -> None:
    """Writes through a numpy alias are seen by nobody but the memory."""
    layer.down.weight.detach().numpy()[:] = 0.25


def _parameter_swap(layer: _Layer) -> None:
    layer.q.weight = torch.nn.Parameter(_fresh_like(layer.q.weight))
    layer.k.bias = torch.nn.Parameter(_fresh_like(layer.k.bias))


def _module_swap(layer: _Layer) -> None:
    layer.down = torch.nn.Linear(24, 16)


def _module_swap_without_bias(layer: _Layer) -> None:
    layer.down = torch.nn.Linear(24, 16, bias=False)


def _load_state_dict(layer: _Layer) -> None:
    layer.load_state_dict({name: _fresh_like(value) for name, value in layer.state_dict().items()})


def _load_state_dict_assign(layer: _Layer) -> None:
    state = {name: _fresh_like(value) for name, value in layer.state_dict().items()}
    state["head.weight"] = state["embedding.weight"]
    layer.load_state_dict(state, assign=True)


def _tied_through_one_name(layer: _Layer) -> None:
    layer.embedding.weight.mul_(2)


def _untie(layer: _Layer) -> None:
    layer.head.weight = torch.nn.Parameter(_fresh_like(layer.head.weight))


def _tie_gate_and_up(layer: _Layer) -> None:
    layer.up.weight = layer.gate.weight


def _exchange(layer: _Layer) -> None:
    """The same objects in other places: identity alone does not tell which weight is which."""
    layer.gate.weight, layer.up.weight = layer.up.weight, layer.gate.weight
    layer.gate.weight.mul_(2)


def _buffer_in_place(layer: _Layer) -> None:
    layer.shift.add_(1)


def _buffer_swap(layer: _Layer) -> None:
    layer.shift = torch.randn(16)


def _free_and_reuse_memory(layer: _Layer) -> None:
    """A new weight may lie at the address, and even have the id, of one that died."""
    for _ in range(4):
        layer.q.weight = None
        layer.q.weight = torch.nn.Parameter(torch.randn(16, 16))


def _optimizer_step(layer: _Layer) -> None:
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    with torch.enable_grad():
        layer(torch.tensor([[1, 2, 3]])).square().mean().backward()
    optimizer.step()
    layer.zero_grad()


def _add_lora(layer: _Layer) -> None:
    class LowRank(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = torch.nn.Parameter(torch.randn(2, 16)), torch.nn.Parameter(torch.randn(16, 2))

        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight + self.b @ self.a

    parametrize.register_parametrization(layer.q, "weight", LowRank())


def _add_weight_norm(layer: _Layer) -> None:
    parametrizations.weight_norm(layer.gate)


def _cast(layer: _Layer) -> None:
    layer.to(torch.bfloat16)


def _cast_to_double(layer: _Layer) -> None:
    layer.double()


CHANGES = [value for name, value in list(globals().items()) if name.startswith("_") and name[1:2].islower()
           and callable(value) and name != "_fresh_like"]  # fmt: skip


@pytest.mark.rotate(one_in=3)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
def test_next_call_after(change: Callable[[_Layer], Any], target: str) -> None:
    torch.manual_seed(3)
    layer = _Layer().eval()
    subject = door.compiled(layer, target=target)
    ids = torch.randint(0, 32, (2, 5))
    with torch.no_grad():
        for batch in (ids, ids[:1, :1]):
            compare.assert_same(subject(batch), layer(batch))
            compare.assert_same(subject(batch), layer(batch))
        before = layer(ids)
        change(layer)
        want = layer(ids)
        assert before.dtype != want.dtype or not torch.equal(before, want), "the change must matter"
        compare.assert_same(subject(ids), want, oracle=lambda: copy.deepcopy(layer).double()(ids))
        # The other shape has code of its own over the same weights.
        small = ids[:1, :1]
        compare.assert_same(subject(small), layer(small), oracle=lambda: copy.deepcopy(layer).double()(small))


@pytest.mark.parametrize("change", [_in_place, _data_swap, _parameter_swap, _load_state_dict, _module_swap],
                         ids=lambda change: change.__name__.strip("_"))  # fmt: skip
def test_changes_again_and_again(change: Callable[[_Layer], Any], target: str) -> None:
    layer = _Layer().eval()
    subject = door.compiled(layer, target=target)
    ids = torch.randint(0, 32, (1, 1))
    with torch.no_grad():
        for _ in range(5):
            compare.assert_same(subject(ids), layer(ids))
            change(layer)
        compare.assert_same(subject(ids), layer(ids))
    assert door.graphs_compiled() <= 3


def test_lora_is_trained_between_calls(target: str) -> None:
    layer = _Layer()
    _add_lora(layer)
    subject = door.compiled(layer, target=target)
    ids = torch.randint(0, 32, (2, 3))
    optimizer = torch.optim.SGD(layer.q.parametrizations.parameters(), lr=0.5)
    for _ in range(3):
        optimizer.zero_grad()
        subject(ids).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            compare.assert_same(subject(ids), layer(ids))


def test_two_models_share_a_weight(target: str) -> None:
    one, two = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
    two.weight = one.weight
    subjects = [door.compiled(model, target=target) for model in (one, two)]
    x = torch.randn(3, 8)
    with torch.no_grad():
        for _ in range(3):
            compare.assert_same([subject(x) for subject in subjects], [one(x), two(x)])
            one.weight.mul_(2)


def test_model_dies_and_another_takes_its_place(target: str) -> None:
    """Nothing kept for a dead model is served to the next one, wherever its weights lie."""
    x = torch.randn(2, 8)
    with torch.no_grad():
        for _ in range(6):
            model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8))
            compare.assert_same(door.compiled(model, target=target)(x), model(x))
            del model


def test_weight_given_as_an_argument(target: str) -> None:
    def program(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.linear(x, weight)

    subject = door.compiled(program, target=target)
    x, weight = torch.randn(2, 8), torch.randn(4, 8)
    with torch.no_grad():
        for _ in range(3):
            compare.assert_same(subject(x, weight), program(x, weight))
            weight.mul_(-1)
            compare.assert_same(subject(x, weight), program(x, weight))
            weight = torch.randn(4, 8)
        wide = torch.randn(8, 4).t()
        compare.assert_same(subject(x, wide), program(x, wide))


def test_weights_are_not_modified(target: str) -> None:
    layer = _Layer().eval()
    kept = copy.deepcopy(layer.state_dict())
    addresses = {name: value.data_ptr() for name, value in layer.state_dict().items()}
    subject = door.compiled(layer, target=target)
    with torch.no_grad():
        subject(torch.randint(0, 32, (2, 5)))
        subject(torch.randint(0, 32, (1, 1)))
    compare.assert_same(dict(layer.state_dict()), dict(kept))
    assert addresses == {name: value.data_ptr() for name, value in layer.state_dict().items()}

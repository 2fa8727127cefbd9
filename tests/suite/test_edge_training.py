"""Edge programs: gradients, custom functions, checkpointing, double backward, optimizers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint

from tests.suite import compare, door
from tests.suite.compare import assert_like_eager


def _leaf(*shape: int) -> torch.Tensor:
    return torch.randn(shape, requires_grad=True)


def test_gradients_of_inputs(target: str) -> None:
    assert_like_eager(lambda x, y: (x @ y).softmax(-1), _leaf(3, 4), _leaf(4, 5), target=target, backward=True)


def test_only_one_input_needs_gradients(target: str) -> None:
    assert_like_eager(lambda x, y: x * y.exp(), _leaf(3, 4), torch.randn(3, 4), target=target, backward=True)


def test_unused_input(target: str) -> None:
    assert_like_eager(lambda x, y: x * 2, _leaf(3), _leaf(3), target=target, backward=True)


def test_some_outputs_need_no_gradient(target: str) -> None:
    assert_like_eager(lambda x: (x * 2, x.argmax(), x.detach() + 1), _leaf(5), target=target, backward=True)


def test_view_of_a_leaf_returned(target: str) -> None:
    assert_like_eager(lambda x: (x.view(-1), x.t(), x), _leaf(3, 4), target=target, backward=True)


def test_mutated_intermediate(target: str) -> None:
    def program(x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        y[0] = 3
        y.sigmoid_()
        return y

    assert_like_eager(program, _leaf(3, 4), target=target, backward=True)


def test_gradients_accumulate(target: str) -> None:
    x, twin = _leaf(4), _leaf(4)
    twin.data.copy_(x.data)
    subject = door.compiled(lambda x: (x**3).sum(), target=target)
    for _ in range(3):
        subject(x).backward()
        (twin**3).sum().backward()
    compare.assert_same(x.grad, twin.grad)


def test_retain_graph(target: str) -> None:
    x = _leaf(4)
    y = door.compiled(lambda x: x.sin() * x, target=target)(x).sum()
    (first,) = torch.autograd.grad(y, x, retain_graph=True)
    (second,) = torch.autograd.grad(y, x)
    compare.assert_same(first, second)


def test_double_backward_is_right_or_refused(target: str) -> None:
    """AOTAutograd cannot differentiate twice: an error is allowed, a wrong second derivative is not."""
    x = _leaf(4)
    (first,) = torch.autograd.grad(door.compiled(lambda x: x**3, target=target)(x).sum(), x, create_graph=True)
    try:
        (second,) = torch.autograd.grad(first.sum(), x)
    except RuntimeError as error:
        assert "double backward" in str(error) or "does not require grad" in str(error)
    else:
        compare.assert_same(second, 6 * x)


class _Clip(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, limit: float) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.limit = limit
        return x * 2

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (x,) = ctx.saved_tensors
        return gradient.clamp(-ctx.limit, ctx.limit) * x, None


def test_custom_function(target: str) -> None:
    assert_like_eager(lambda x: _Clip.apply(x.sin(), 0.7) + 1, _leaf(5), target=target, backward=True)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, target: str) -> None:
    first, second = torch.randn(4, 4), torch.randn(4, 4)

    def inner(x: torch.Tensor) -> torch.Tensor:
        return F.gelu(x @ first) @ second

    def program(x: torch.Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(inner, x * 2, use_reentrant=reentrant)

    assert_like_eager(program, _leaf(3, 4), target=target, backward=True)


def test_checkpointing_with_dropout(target: str) -> None:
    def program(x: torch.Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(lambda h: F.dropout(h.exp(), 0.5) * h, x, use_reentrant=False)

    assert_like_eager(program, _leaf(64), target=target, backward=True, calls=3)


@pytest.mark.parametrize("name", ["SGD", "AdamW", "RMSprop"])
def test_training_steps(name: str, target: str) -> None:
    """Ten steps of an optimizer leave the same weights as ten eager steps."""
    torch.manual_seed(1)
    module = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 3))
    twin = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.LayerNorm(8), torch.nn.GELU(), torch.nn.Linear(8, 3))
    twin.load_state_dict(module.state_dict())
    subject = door.compiled(module, target=target)
    optimizers = [getattr(torch.optim, name)(model.parameters(), lr=1e-2) for model in (module, twin)]
    for _ in range(10):
        x, labels = torch.randn(4, 6), torch.randint(0, 3, (4,))
        for run, optimizer in zip((subject, twin), optimizers, strict=True):
            optimizer.zero_grad()
            F.cross_entropy(run(x), labels).backward()
            optimizer.step()
    for got, want in zip(module.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_compiled_loss_and_step(target: str) -> None:
    weight = _leaf(3, 6)
    labels = torch.tensor([0, 1, 2, 0])
    assert_like_eager(lambda w: F.cross_entropy(torch.ones(4, 6) @ w.t(), labels), weight, target=target, backward=True)


def test_frozen_weights_get_no_gradient(target: str) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    module[0].requires_grad_(False)
    door.compiled(module, target=target)(torch.randn(2, 4)).sum().backward()
    assert module[0].weight.grad is None and module[1].weight.grad is not None


def test_requires_grad_toggles(target: str) -> None:
    module = torch.nn.Linear(4, 4)
    subject = door.compiled(module, target=target)
    x = torch.randn(2, 4)
    for needs in (True, False, True):
        module.requires_grad_(needs)
        module.zero_grad()
        assert subject(x).requires_grad == needs
        if needs:
            subject(x).sum().backward()
            compare.assert_same(module.bias.grad, torch.full((4,), 2.0))


def test_attention_gradients(target: str) -> None:
    def program(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    assert_like_eager(program, _leaf(2, 4, 5, 8), _leaf(2, 2, 5, 8), _leaf(2, 2, 5, 8), target=target, backward=True)


def test_norm_and_embedding_gradients(target: str) -> None:
    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.norm = torch.nn.Embedding(10, 8, padding_idx=0), torch.nn.RMSNorm(8)

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.norm(self.embedding(ids)) @ self.embedding.weight.t()

    assert_like_eager(Net(), torch.tensor([[0, 3, 3, 9]]), target=target, backward=True)


def test_anomaly_and_nan_gradients(target: str) -> None:
    x = torch.tensor([-1.0, 0.0, 1.0], requires_grad=True)
    assert_like_eager(lambda x: (x - x).sqrt() * x.log(), x, target=target, backward=True)

"""Compare what a compiled program did with what eager did: values, metadata, aliasing, mutation, errors."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils import _pytree as pytree

from tests.suite import door

# Relative and absolute tolerance. float32: sums of some hundred terms in another order. The 16-bit types: one unit in
# the last place, for code that keeps float32 between two operations where eager rounds to 16 bits.
TOLERANCE = {
    torch.float64: (1e-9, 1e-9),
    torch.complex128: (1e-9, 1e-9),
    torch.float32: (2e-5, 2e-5),
    torch.complex64: (2e-5, 2e-5),
    torch.float16: (2e-3, 2e-3),
    torch.bfloat16: (1.6e-2, 1.6e-2),
}
EXACT = (0.0, 0.0)
# With an oracle at hand, an error of this many times eager's own error is another order of the same arithmetic.
ERROR_RATIO = 4.0


class Mismatch(AssertionError):
    """A difference from eager; `kind` is one of type, dtype, shape, stride, grad, value, alias, mutation."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors of a nested structure, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def assert_same(actual: Any, expected: Any, *, strides: bool = True, oracle: Callable[[], Any] | None = None) -> None:
    """Raise `Mismatch` unless `actual` has the structure, types, metadata and values of `expected`.

    `oracle` computes the same structure in float64; it is asked only when the tolerance is exceeded.
    """
    actual_leaves, actual_spec = pytree.tree_flatten(actual)
    expected_leaves, expected_spec = pytree.tree_flatten(expected)
    if actual_spec != expected_spec:
        raise Mismatch("type", f"structure {actual_spec}, eager {expected_spec}")
    truth: list[Any] | None = None
    for index, (got, want) in enumerate(zip(actual_leaves, expected_leaves, strict=True)):
        where = f"leaf {index}"
        if not isinstance(want, torch.Tensor):
            _same_plain(got, want, where)
            continue
        _same_metadata(got, want, where, strides)
        if _close(got, want):
            continue
        if oracle is not None and truth is None:
            truth = pytree.tree_leaves(oracle())
        if truth is None or not _as_good_as_eager(got, want, truth[index]):
            raise Mismatch("value", f"{where}: {_difference(got, want)}")


def aliases(inputs: Iterable[torch.Tensor], outputs: Iterable[torch.Tensor]) -> list[tuple[str, int]]:
    """For every output: the first input or earlier output that it is, or that shares its memory."""
    earlier = list(inputs)
    pattern = []
    for output in outputs:
        relation = ("own", -1)
        for index, other in enumerate(earlier):
            if output is other:
                relation = ("is", index)
                break
            if relation[0] == "own" and _share_memory(output, other):
                relation = ("view", index)
        pattern.append(relation)
        earlier.append(output)
    return pattern


def assert_like_eager(
    program: Callable[..., Any],
    *inputs: Any,
    target: str | None = None,
    backward: bool = False,
    strides: bool = True,
    dynamic: bool | None = None,
    calls: int = 2,
    **options: Any,
) -> Any:
    """Call `program` eagerly and compiled on copies of `inputs`, `calls` times, and require the same of everything.

    Compared are outputs, their aliasing, the inputs afterwards (mutation), the program's own state when it is a
    module, and with `backward` the gradients of all leaves. Returns the compiled program for further calls.
    """
    eager_program = copy.deepcopy(program) if isinstance(program, torch.nn.Module) else program
    subject = door.compiled(program, target=target, dynamic=dynamic, **options)
    for call in range(calls):
        eager_inputs, subject_inputs = copy.deepcopy(inputs), copy.deepcopy(inputs)
        torch.manual_seed(call)
        expected = eager_program(*eager_inputs)
        torch.manual_seed(call)
        actual = subject(*subject_inputs)
        assert_same(actual, expected, strides=strides)
        got_aliases = aliases(tensors_in(subject_inputs), tensors_in(actual))
        want_aliases = aliases(tensors_in(eager_inputs), tensors_in(expected))
        if got_aliases != want_aliases:
            raise Mismatch("alias", f"outputs are {got_aliases}, eager's {want_aliases}")
        if backward:
            _backward(actual)
            _backward(expected)
        _same_state(subject_inputs, eager_inputs, strides)
        if isinstance(program, torch.nn.Module) and isinstance(eager_program, torch.nn.Module):
            _same_state(_state(program), _state(eager_program), strides)
    return subject


def assert_both_raise(program: Callable[..., Any], *inputs: Any, target: str | None = None) -> None:
    """Require that `program` raises eagerly and compiled, and that the next good call is not needed to recover."""
    for door_side in (program, door.compiled(program, target=target)):
        try:
            door_side(*copy.deepcopy(inputs))
        except Exception:  # any error will do: compiled code may raise another class than eager
            continue
        raise Mismatch("type", f"{door_side} did not raise")


def _state(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _same_state(got: Any, want: Any, strides: bool) -> None:
    try:
        assert_same(got, want, strides=strides)
        assert_same(_gradients(got), _gradients(want), strides=False)
    except Mismatch as mismatch:
        raise Mismatch("mutation", f"after the call, {mismatch}") from mismatch


def _gradients(tree: Any) -> list[torch.Tensor | None]:
    return [tensor.grad for tensor in tensors_in(tree) if tensor.is_leaf]


def _backward(outputs: Any) -> None:
    differentiable = [tensor for tensor in tensors_in(outputs) if tensor.requires_grad]
    seeds = [torch.linspace(0.5, 1.5, root.numel()).reshape(root.shape).to(root.dtype) for root in differentiable]
    torch.autograd.backward(differentiable, seeds)


def _same_plain(got: Any, want: Any, where: str) -> None:
    if type(got) is not type(want):
        raise Mismatch("type", f"{where}: {type(got).__name__}, eager {type(want).__name__}")
    if isinstance(want, float | complex):
        if not _close(torch.tensor(got), torch.tensor(want)):
            raise Mismatch("value", f"{where}: {got}, eager {want}")
    elif got != want:
        raise Mismatch("value", f"{where}: {got}, eager {want}")


def _same_metadata(got: Any, want: torch.Tensor, where: str, strides: bool) -> None:
    if type(got) is not type(want):
        raise Mismatch("type", f"{where}: {type(got).__name__}, eager {type(want).__name__}")
    for name in ("dtype", "shape", "layout", "device"):
        if getattr(got, name) != getattr(want, name):
            kind = name if name in ("dtype", "shape") else "type"
            raise Mismatch(kind, f"{where}: {name} {getattr(got, name)}, eager {getattr(want, name)}")
    if got.requires_grad != want.requires_grad:
        raise Mismatch("grad", f"{where}: requires_grad {got.requires_grad}, eager {want.requires_grad}")
    if strides and want.layout == torch.strided and _strides(got) != _strides(want):
        raise Mismatch("stride", f"{where}: {got.stride()} of {tuple(got.shape)}, eager {want.stride()}")


def _strides(tensor: torch.Tensor) -> list[int]:
    """The strides that address memory: none of an empty tensor, none of dimensions of size 1."""
    if tensor.numel() == 0:
        return []
    return [stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1]


def _plain(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.to_dense()
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    tensor = tensor.resolve_conj().resolve_neg()
    return tensor.float() if tensor.is_floating_point() and tensor.element_size() == 1 else tensor


def _close(got: torch.Tensor, want: torch.Tensor) -> bool:
    rtol, atol = TOLERANCE.get(want.dtype, EXACT)
    got, want = _plain(got), _plain(want)
    return bool(torch.allclose(got, want, rtol=rtol, atol=atol, equal_nan=True))


def _as_good_as_eager(got: torch.Tensor, want: torch.Tensor, truth: Any) -> bool:
    """Whether the error against float64 is at most a few times eager's, element by element or in the largest."""
    if not isinstance(truth, torch.Tensor) or not (want.is_floating_point() or want.is_complex()):
        return False
    got, want = _plain(got), _plain(want)
    exact = _plain(truth)
    if exact.shape != want.shape:
        return False
    wide = exact.dtype
    got, want = got.to(wide), want.to(wide)
    if not torch.equal(got.isfinite(), want.isfinite()) and not torch.equal(got.isfinite(), exact.isfinite()):
        return False
    finite = got.isfinite() & want.isfinite() & exact.isfinite()
    got_error, want_error = (got - exact).abs()[finite], (want - exact).abs()[finite]
    if got_error.numel() == 0:
        return True
    rtol, atol = TOLERANCE.get(want.dtype, EXACT)
    return bool(got_error.max() <= ERROR_RATIO * want_error.max() + atol + rtol * exact[finite].abs().max())


def _difference(got: torch.Tensor, want: torch.Tensor) -> str:
    got, want = _plain(got), _plain(want)
    wide = torch.complex128 if want.is_complex() else torch.float64
    distance = (got.to(wide) - want.to(wide)).abs().nan_to_num(nan=float("inf")).reshape(-1)
    worst = int(distance.argmax())
    pair = f"{got.reshape(-1)[worst].item()}, eager {want.reshape(-1)[worst].item()}"
    return f"element {worst} of {tuple(want.shape)} {want.dtype} is {pair}"


def _share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    if one.layout != torch.strided or other.layout != torch.strided or not one.numel() or not other.numel():
        return False
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()

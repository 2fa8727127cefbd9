"""Cases made from PyTorch's own operator database: one case is one operator, one dtype and one way to call it.

All samples of a case run in one compiled program, because compiling is what costs; when that program differs from
eager, each sample is compiled alone to name the one that fails.
"""

import dataclasses
import functools
import itertools
import warnings
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils import _pytree as pytree

from tests.suite import compare, door

KINDS = ("forward", "backward", "inplace", "noncontiguous", "dynamic")
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool)
DEVICE = "cpu"
# What these return is whatever the memory held: only the metadata can be compared.
UNINITIALISED = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided")

Call = tuple[Any, tuple[Any, ...], dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator called one way with one dtype."""

    op: str
    kind: str
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.op}-{self.kind}-{str(self.dtype).removeprefix('torch.')}"

    @classmethod
    def parse(cls, text: str) -> "Case":
        """Read back what `str` wrote."""
        op, kind, dtype = text.rsplit("-", 2)
        return cls(op, kind, getattr(torch, dtype))


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a case; `status` is passed, or vacuous when eager accepts no sample."""

    status: str
    samples: int = 0
    graphs: int = 0


@functools.cache
def operators() -> dict[str, OpInfo]:
    """Every operator of the database by its full name."""
    return {op.full_name: op for op in op_db}


@functools.cache
def cases() -> list[Case]:
    """Every case there is, in the order of the database."""
    return [
        Case(name, kind, dtype)
        for name, op in operators().items()
        for kind, dtype in itertools.product(KINDS, DTYPES)
        if _applies(op, kind, dtype)
    ]


def check(case: Case, *, target: str | None, most: int = 6, **options: Any) -> Outcome:
    """Run up to `most` samples of `case` eagerly and compiled; raise `compare.Mismatch` or the compiler's error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        calls = _calls(case, most)
        if not calls:
            return Outcome("vacuous")
        door.fresh()
        try:
            _compare(case, calls, target, options)
        except Exception:
            if len(calls) > 1:
                _name_the_sample(case, calls, target, options)
            raise
        return Outcome("passed", samples=len(calls), graphs=door.graphs_compiled())


def _applies(op: OpInfo, kind: str, dtype: torch.dtype) -> bool:
    if dtype not in op.supported_dtypes("cpu"):
        return False
    if kind == "backward":
        return dtype == torch.float32 and op.supports_autograd and dtype in op.supported_backward_dtypes("cpu")
    if kind == "inplace":
        return dtype == torch.float32 and op.get_inplace() is not None
    return kind == "forward" or dtype == torch.float32


def _calls(case: Case, most: int) -> list[Call]:
    """Up to `most` samples, spread over all there are, that eager accepts."""
    op = operators()[case.op]
    torch.manual_seed(zlib.crc32(case.op.encode()))
    samples = list(op.sample_inputs(DEVICE, case.dtype, requires_grad=case.kind == "backward"))
    if case.kind == "inplace":
        samples = [sample for sample in samples if not sample.broadcasts_input]
    if case.kind == "noncontiguous":
        strided = [sample for sample in samples if all(map(_is_strided, compare.tensors_in(_call(sample))))]
        samples = [sample.noncontiguous() for sample in strided]
    step = max(1, -(-len(samples) // most))
    return [_call(sample) for sample in samples[::step] if _eager_accepts(case, _call(sample))]


def _is_strided(tensor: torch.Tensor) -> bool:
    return tensor.layout == torch.strided


def _call(sample: SampleInput) -> Call:
    return sample.input, tuple(sample.args), dict(sample.kwargs)


def _eager_accepts(case: Case, call: Call) -> bool:
    try:
        outputs = _run(case, _program(case), [_copy(call)])
    except Exception:  # eager's own refusal, of whatever class
        return False
    return case.kind != "backward" or bool(outputs["gradients"])


def _program(case: Case) -> Callable[[list[Call]], list[Any]]:
    op = operators()[case.op]
    function: Callable[..., Any] = op.op
    if case.kind == "inplace":
        function = op.get_inplace()

    def program(calls: list[Call]) -> list[Any]:
        return [function(value, *args, **kwargs) for value, args, kwargs in calls]

    return program


def _run(case: Case, program: Callable[[list[Call]], list[Any]], calls: list[Call]) -> dict[str, Any]:
    torch.manual_seed(0)
    outputs = program(calls)
    if case.kind == "backward":
        return {"outputs": outputs, "gradients": _gradients(calls, outputs)}
    if case.kind == "inplace":
        return {"outputs": outputs, "inputs": compare.tensors_in(calls)}
    return {"outputs": outputs}


def _gradients(calls: list[Call], outputs: list[Any]) -> list[Any]:
    leaves = [tensor for tensor in compare.tensors_in(calls) if tensor.requires_grad]
    roots = [tensor for tensor in compare.tensors_in(outputs) if tensor.requires_grad]
    if not leaves or not roots:
        return []
    seeds = [torch.linspace(0.5, 1.5, root.numel()).reshape(root.shape).to(root.dtype) for root in roots]
    return list(torch.autograd.grad(roots, leaves, seeds, allow_unused=True))


def _compare(case: Case, calls: list[Call], target: str | None, options: dict[str, Any]) -> None:
    program = _program(case)
    eager_calls, subject_calls = _copy(calls), _copy(calls)
    expected = _run(case, program, eager_calls)
    dynamic = True if case.kind == "dynamic" else None
    actual = _run(case, door.compiled(program, target=target, dynamic=dynamic, **options), subject_calls)
    if operators()[case.op].name in UNINITIALISED:
        actual, expected = (pytree.tree_map_only(torch.Tensor, torch.zeros_like, side) for side in (actual, expected))
    compare.assert_same(actual["outputs"], expected["outputs"], oracle=lambda: _in_float64(case, calls)["outputs"])
    for rest in actual.keys() - {"outputs"}:
        compare.assert_same(
            actual[rest], expected[rest], strides=False, oracle=lambda rest=rest: _in_float64(case, calls)[rest]
        )
    got = compare.aliases(compare.tensors_in(subject_calls), compare.tensors_in(actual["outputs"]))
    want = compare.aliases(compare.tensors_in(eager_calls), compare.tensors_in(expected["outputs"]))
    if got != want:
        raise compare.Mismatch("alias", f"outputs are {got}, eager's {want}")


def _name_the_sample(case: Case, calls: list[Call], target: str | None, options: dict[str, Any]) -> None:
    for index, call in enumerate(calls):
        door.fresh()
        try:
            _compare(case, [call], target, options)
        except Exception as error:
            error.add_note(f"{case}, sample {index}: {_describe(call)}")
            raise


def _describe(call: Call) -> str:
    def shown(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return f"{str(leaf.dtype).removeprefix('torch.')}{list(leaf.shape)}{list(leaf.stride())}"
        return leaf

    return str(pytree.tree_map(shown, call))


def _copy(tree: Any) -> Any:
    def copied(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.layout != torch.strided:
            return tensor.detach().clone().requires_grad_(tensor.requires_grad)
        twin = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        twin.untyped_storage().fill_(0)  # as_strided reads what lies between the elements
        twin = twin.copy_(tensor.detach()) if _dense(tensor) else tensor.detach().clone()
        return twin.requires_grad_(tensor.requires_grad)

    return pytree.tree_map_only(torch.Tensor, copied, tree)


def _dense(tensor: torch.Tensor) -> bool:
    """Whether no two elements share a place, so that a copy with the same strides can be written."""
    return not any(stride == 0 and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _in_float64(case: Case, calls: list[Call]) -> dict[str, Any]:
    def widen(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
            return leaf.detach().double().requires_grad_(leaf.requires_grad)
        return torch.float64 if leaf is case.dtype and case.dtype.is_floating_point else leaf

    return _run(case, _program(case), pytree.tree_map(widen, _copy(calls)))

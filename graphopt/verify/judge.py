"""Compare what two graphs computed, as strictly as the declared exactness of a rewrite demands.

bitwise: the same bits; only the payload of a NaN is free.
rounding: the error against a float64 run of the old graph may not exceed a small multiple of the old graph's
own error (taken over each row) plus a few units in the last place. Where the old graph itself overflowed,
anything goes.
lossy: only dtype, shape and stride are compared.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch

_ERROR_FACTOR = 6.0
_ULPS = 4.0
_LAYOUT_ONLY = "lossy"


@dataclasses.dataclass(frozen=True)
class Difference:
    """How a result differs from what it should be.

    kinds: in what ways, without numbers and places ("another dtype", "finite became nan"): a failure that is made
    smaller must stay of the kinds that it began with.
    """

    message: str
    kinds: frozenset[str]

    def __str__(self) -> str:
        return self.message

    def of(self, what: str) -> Difference:
        """The same, said of a part."""
        return Difference(f"{what}: {self.message}", self.kinds)


def different(kind: str, detail: str = "") -> Difference:
    """A difference of one kind."""
    return Difference(kind + detail, frozenset({kind}))


def difference(old: Any, new: Any, reference: Any, exactness: str, *, layout: bool = True) -> Difference | None:
    """What is wrong with `new`, or None.

    old, new: tensors, numbers, or sequences of these. reference: the same in float64, or None if there is
    none; then the old values stand in for it and the tolerance is that of the dtype.
    layout: whether strides are compared too.
    """
    if isinstance(old, (list, tuple)):
        if not isinstance(new, (list, tuple)) or len(old) != len(new):
            count = len(new) if isinstance(new, (list, tuple)) else 1
            return different("another number of values", f": {len(old)} and {count}")
        references = reference if isinstance(reference, (list, tuple)) else [None] * len(old)
        for index, (a, b, c) in enumerate(zip(old, new, references, strict=True)):
            found = difference(a, b, c, exactness, layout=layout)
            if found:
                return found.of(f"value {index}") if len(old) > 1 else found
        return None
    if not isinstance(old, torch.Tensor) or not isinstance(new, torch.Tensor):
        same = type(old) is type(new) and old == new
        return None if same else different("another value", f": {old!r} became {new!r}")
    return layout_difference(old, new, layout) or _value_difference(old, new, reference, exactness)


def layout_difference(old: torch.Tensor, new: torch.Tensor, strides: bool = True) -> Difference | None:
    """How two tensors differ in dtype, device, shape or stride (of dimensions longer than one), or None."""
    for name in ("dtype", "device", "shape"):
        if getattr(old, name) != getattr(new, name):
            return different(f"another {name}", f": {getattr(old, name)} became {getattr(new, name)}")
    if not strides or old.numel() == 0 or old.layout != torch.strided:
        return None
    lying = [(a, b) for size, a, b in zip(old.shape, old.stride(), new.stride(), strict=True) if size > 1]
    if any(a != b for a, b in lying):
        return different("another stride", f": {old.stride()} became {new.stride()}")
    return None


def _value_difference(old: torch.Tensor, new: torch.Tensor, reference: Any, exactness: str) -> Difference | None:
    if exactness == _LAYOUT_ONLY or old.numel() == 0:
        return None
    old, new = old.detach(), new.detach()
    if exactness == "bitwise" or not old.dtype.is_floating_point:
        wrong = ~_same_bits(old, new)
    elif isinstance(reference, torch.Tensor) and reference.shape == old.shape:
        wrong = _beyond_rounding(old, new, reference.detach())
    else:
        wrong = _beyond_tolerance(old, new)
    if not bool(wrong.any()):
        return None
    index = tuple(int(part) for part in wrong.nonzero()[0])
    count = int(wrong.sum())
    exact = f", in float64 {reference[index].item()!r}" if isinstance(reference, torch.Tensor) else ""
    return Difference(
        f"{count} of {wrong.numel()} elements differ; at {list(index)} {old[index].item()!r}"
        f" became {new[index].item()!r}{exact}",
        _changes(old[wrong], new[wrong]),
    )


def _changes(old: torch.Tensor, new: torch.Tensor) -> frozenset[str]:
    """What became of what, over all elements: "finite became nan", "zero became a zero of the other sign"."""
    if not old.dtype.is_floating_point:
        return frozenset({"another value"})
    zeros = (old == 0) & (new == 0)
    found = {"zero became a zero of the other sign"} if bool(zeros.any()) else set()
    classes = (torch.where(t.isnan(), 2, t.isinf().long())[~zeros].tolist() for t in (old, new))
    return frozenset(found | {f"{_CLASSES[a]} became {_CLASSES[b]}" for a, b in set(zip(*classes, strict=True))})


_CLASSES = ("finite", "infinite", "nan")


def _same_bits(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    if old.is_complex():
        return _same_bits(torch.view_as_real(old), torch.view_as_real(new)).all(-1)
    if not old.dtype.is_floating_point:
        return old == new
    same = (old == new) & (old.signbit() == new.signbit())
    return same | (old.isnan() & new.isnan())


def _beyond_rounding(old: torch.Tensor, new: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    a, b, exact = old.double(), new.double(), reference.double()
    finite = exact.isfinite()
    own_error = torch.where(finite, (a - exact).abs().nan_to_num(torch.inf, torch.inf), 0.0)
    error = torch.where(finite, (b - exact).abs().nan_to_num(torch.inf, torch.inf), 0.0)
    row_error = own_error.amax(-1, keepdim=True) if own_error.dim() else own_error
    info = torch.finfo(old.dtype)
    ulp = torch.where(finite, exact.abs(), 0.0) * info.eps + info.smallest_normal * info.eps
    too_far = finite & (error > _ERROR_FACTOR * row_error + _ULPS * ulp)
    # Without a finite reference only what the old graph had in common with float64 is demanded: NaN or inf.
    lost = ~finite & torch.where(exact.isnan(), a.isnan() & ~b.isnan(), (a == exact) & (b != exact))
    return too_far | lost


def _beyond_tolerance(old: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    a, b = old.double(), new.double()
    scale = torch.where(a.isfinite(), a.abs(), 0.0)
    row = scale.amax(-1, keepdim=True) if scale.dim() else scale
    allowed = 16 * torch.finfo(old.dtype).eps * (scale + row)
    close = ((a - b).abs() <= allowed) & a.isfinite()
    return ~(close | (a == b) | (a.isnan() & b.isnan()))


def alias_sets(outputs: Sequence[Any], inputs: Sequence[Any]) -> dict[tuple[int, str], bool]:
    """Which outputs share memory with which inputs ("input 0") and earlier outputs ("output 0")."""
    aliases = {}
    for number, output in enumerate(outputs):
        others = [(f"input {index}", tensor) for index, tensor in enumerate(inputs)]
        others += [(f"output {index}", tensor) for index, tensor in enumerate(outputs[:number])]
        for name, other in others:
            if _has_memory(output) and _has_memory(other):
                shared = output.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
                aliases[number, name] = shared
    return aliases


def alias_difference(eager: Mapping[tuple[int, str], bool], found: Mapping[tuple[int, str], bool]) -> str:
    """The first result that shares memory otherwise than eager's, as text; "" if there is none."""
    for (output, other), shared in found.items():
        if shared != eager.get((output, other), shared):
            return f"result {output} {'shares' if shared else 'does not share'} memory with {other}, unlike eager's"
    return ""


def _has_memory(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.layout == torch.strided and value.numel() > 0

"""Tensors derived from weights (packed, quantised, merged): made at the first call, kept while the weights stay.

Weights are inputs of every call, so a derived tensor is only valid for the tensors it was made from. Each one is kept
under a guard on (identity, data_ptr, version counter) of its sources; on any difference it is made again. One pack is
shared by all graphs and shapes that ask for it, and it dies with its weights. Writes through `weight.data` or a NumPy
alias are not counted by torch; of weights in the CPU's memory the bits of 32 elements are compared as well, which sees
every write to a whole weight or to a good part of one. Call `refresh()` after smaller ones, or on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt import _compat


@dataclasses.dataclass
class _Pack:
    sources: tuple[weakref.ref[torch.Tensor], ...]
    states: tuple[tuple[object, ...], ...]
    result: Any


_packs: dict[Any, _Pack] = {}
_lock = threading.RLock()
_generation = [0]
_SAMPLES = 32
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_compare: list[Callable[..., bool]] = []
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def packed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Make a pure function of weights a guarded pack: computed on the first call and whenever a weight has changed.

    Arguments are tensors, lists of tensors and hashable constants; the constants are part of the pack's identity.
    """
    name = name_of(function)

    @functools.wraps(function)
    def lookup(*args: Any, **kwargs: Any) -> Any:
        tensors: list[torch.Tensor] = []
        constants = _split((args, tuple(sorted(kwargs.items()))), tensors)
        key = (name, constants, tuple(map(id, tensors)))
        states = tuple(map(_state, tensors))
        pack = _packs.get(key)
        if pack is not None and pack.states == states and _alive(pack, tensors):
            return pack.result
        with _lock, torch.no_grad():
            result = function(*args, **kwargs)
            drop = functools.partial(_drop, key)
            sources = tuple(weakref.ref(tensor, drop) for tensor in tensors)
            _packs[key] = _Pack(sources, states, result)
        return result

    return lookup


def name_of(function: Callable[..., Any]) -> str:
    """How packs name the function that makes them."""
    return f"{function.__module__}.{function.__qualname__}"


@dataclasses.dataclass(frozen=True)
class Made:
    """A pack as plain data: the function that made it, its constants, the tensors it was made from, and itself."""

    function: str
    constants: Any
    sources: tuple[torch.Tensor, ...]
    result: Any


def made_from(tensor: torch.Tensor) -> list[Made]:
    """The packs that were made from a tensor as it is now, alone or with others."""
    found = []
    with _lock:
        for (function, constants, identities), pack in _packs.items():
            sources = [source() for source in pack.sources]
            if id(tensor) not in identities or any(source is None for source in sources):
                continue
            alive = tuple(source for source in sources if source is not None)
            if pack.states == tuple(map(_state, alive)):
                found.append(Made(function, constants, alive, pack.result))
    return found


def restore(made: Made) -> None:
    """Take a pack as made from its sources as they are now, so that the next look-up finds it."""
    key = (made.function, made.constants, tuple(map(id, made.sources)))
    drop = functools.partial(_drop, key)
    with _lock:
        sources = tuple(weakref.ref(tensor, drop) for tensor in made.sources)
        _packs[key] = _Pack(sources, tuple(map(_state, made.sources)), made.result)


class Snapshot:
    """Tensors as they are now, to tell in one sweep whether any has changed since.

    on_death: called when one of them dies.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], on_death: Callable[[], None]) -> None:
        self._sources = [weakref.ref(tensor, lambda _: on_death()) for tensor in tensors]
        self._generation = _generation[0]
        self._states = [_counted(tensor) for tensor in tensors]
        with torch.no_grad(), torch.inference_mode(False):
            self._samples = [_sample(tensor) for tensor in tensors]
            self._seen = _bytes(self._samples)
            self._table = self._states_as_table(tensors)

    def holds(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Whether these are the same tensors, unchanged, and `refresh` has not been called."""
        if self._generation != _generation[0]:
            return False
        if _compare and self._table is not None:
            # While the snapshot stands none of its tensors is dead: an address is the same tensor.
            return _compare[0](tensors, self._table, self._seen)
        for tensor, source, state in zip(tensors, self._sources, self._states, strict=True):
            if source() is not tensor or _counted(tensor) != state:
                return False
        return torch.equal(_bytes(self._samples), self._seen)

    def _states_as_table(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
        """The rows of `backends/cpp/src/unchanged.h`; None with tensors of which only Python can tell."""
        if any(tensor.is_inference() or type(tensor) not in _PLAIN for tensor in tensors):
            return None
        rows = []
        for tensor, sample, (address, version) in zip(tensors, self._samples, self._states, strict=True):
            step = (0, 0, 0) if sample is None else (len(sample), sample.stride(0) * sample.itemsize, sample.itemsize)
            rows.append((_compat.address(tensor), address, version, *step))
        return torch.tensor(rows, dtype=torch.int64).reshape(-1, 6)


def compare_with(function: Callable[..., bool]) -> None:
    """Have snapshots compared by a compiled function (tensors, states, samples) from now on."""
    _compare[:] = [function]


def refresh() -> None:
    """Forget all packs, so that the next call makes them anew from the weights as they are then."""
    with _lock:
        _packs.clear()
        _generation[0] += 1


def packed_bytes() -> int:
    """Bytes held by all packs of this process."""
    with _lock:
        results = [pack.result for pack in _packs.values()]
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for result in results
        for tensor in (result if isinstance(result, (list, tuple)) else (result,))
        if isinstance(tensor, torch.Tensor)
    }
    return sum(storages.values())


def _split(value: Any, tensors: list[torch.Tensor]) -> Any:
    """`value` with each tensor replaced by its position in `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return ("tensor", len(tensors))
    if isinstance(value, (list, tuple)):
        return tuple(_split(item, tensors) for item in value)
    return value


def _state(tensor: torch.Tensor) -> tuple[object, ...]:
    with torch.no_grad():
        sample = _sample(tensor)
    return *_counted(tensor), None if sample is None else tuple(sample.tolist())


def _sample(tensor: torch.Tensor) -> torch.Tensor | None:
    """A view of the bits of some elements, spread over rows and columns; None where looking would cost too much."""
    if type(tensor) not in _PLAIN or tensor.layout != torch.strided:
        return None
    if tensor.device.type != "cpu" or tensor.is_inference() or tensor.numel() == 0 or tensor.is_complex():
        return None
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    count = min(_SAMPLES, extent)
    # An odd step below the even spread: else all samples could lie in one column.
    even = extent // count
    step = (even - 1) | 1 if even > 2 else even
    return tensor.detach().view(_BITS[tensor.itemsize]).as_strided((count,), (step,))


def _bytes(samples: Sequence[torch.Tensor | None]) -> torch.Tensor:
    """A copy of what the samples hold now, one behind the other."""
    held = [sample.contiguous().view(torch.uint8) for sample in samples if sample is not None]
    return torch.cat([torch.empty(0, dtype=torch.uint8), *held])


def _counted(tensor: torch.Tensor) -> tuple[int, int]:
    # Inference tensors have no version counter: only their content tells whether they changed.
    return tensor.data_ptr(), _content(tensor) if tensor.is_inference() else tensor._version


def _content(tensor: torch.Tensor) -> int:
    """A number that follows every element, and some of them by their place.

    torch's hash is the exclusive or of all elements, which an even number of equal ones leaves at zero: the sum of
    their bits counts them.
    """
    if tensor.is_complex():
        return _content(torch.view_as_real(tensor))
    bits = tensor.view(_BITS[tensor.itemsize]) if tensor.dtype is not torch.bool else tensor
    flat = bits.reshape(-1)
    some = flat[:: max(1, len(flat) // _SAMPLES)]
    return hash((int(torch.hash_tensor(tensor)), int(bits.sum(dtype=torch.int64)), tuple(some.tolist())))


def _alive(pack: _Pack, tensors: list[torch.Tensor]) -> bool:
    # An id may be used again after its tensor died; the weak reference tells.
    return all(source() is tensor for source, tensor in zip(pack.sources, tensors, strict=True))


def _drop(key: Any, _: weakref.ref[torch.Tensor]) -> None:
    # Runs inside garbage collection: the lock is reentrant, and a lost race only costs a rebuilt pack.
    _packs.pop(key, None)

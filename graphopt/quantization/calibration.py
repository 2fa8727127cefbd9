"""What the inputs of linears look like on given data: `graphopt.calibrate(model, inputs)` -> `Calibration`.

For each weight of a matrix product the largest and mean magnitude of each input channel are kept, and a
sample of the input's rows: enough for SmoothQuant, AWQ, GPTQ, and for the error of a layer's output. A
`Calibration` is saved as safetensors and loaded without the model and the data.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from graphopt.errors import OptionError, StoredFileError

_FORMAT = "graphopt calibration 1"


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The inputs of one or more weights: `rows` [R, K] sampled evenly, `largest` and `mean` magnitude of each
    channel [K]."""

    rows: Tensor
    largest: Tensor
    mean: Tensor


@dataclasses.dataclass(frozen=True, repr=False)
class Calibration:
    """Statistics of inputs by the dotted name of the weight. Equal content has an equal `digest`."""

    inputs: Mapping[str, Inputs]

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the content; part of the keys of caches."""
        digest = hashlib.sha256()
        for name in sorted(self.inputs):
            found = self.inputs[name]
            digest.update(name.encode())
            for tensor in (found.rows, found.largest, found.mean):
                digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()[:32]

    def __repr__(self) -> str:
        return f"Calibration({len(self.inputs)} weights, {self.digest})"

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Calibration) and self.digest == other.digest

    def find(self, name: str) -> Inputs | None:
        """The inputs of a weight. A graph that starts inside a submodule knows only the end of the name."""
        if name in self.inputs:
            return self.inputs[name]
        longer = [known for known in self.inputs if name and known.endswith("." + name)]
        return self.inputs[longer[0]] if len(longer) == 1 else None

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; weights that share inputs (query, key and value) share one entry."""
        from safetensors.torch import save_file

        entries: dict[int, str] = {}
        tensors: dict[str, Tensor] = {}
        for found in self.inputs.values():
            if id(found) not in entries:
                entry = entries[id(found)] = str(len(entries))
                fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(found)}
                tensors.update({f"{entry}.{field}": value for field, value in fields.items()})
        names = {name: entries[id(found)] for name, found in self.inputs.items()}
        save_file(tensors, path, metadata={"format": _FORMAT, "names": json.dumps(names), "digest": self.digest})

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        """Read a file that `save` wrote. Raises StoredFileError for a damaged or foreign file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != _FORMAT:
                    raise StoredFileError(f"{path} is not a graphopt calibration (expected format {_FORMAT!r})")
                names = json.loads(metadata["names"])
                fields = [field.name for field in dataclasses.fields(Inputs)]
                entries = {
                    entry: Inputs(*(file.get_tensor(f"{entry}.{field}") for field in fields))
                    for entry in sorted(set(names.values()))
                }
        except (SafetensorError, KeyError, ValueError, AttributeError) as error:
            raise StoredFileError(f"{path} is damaged or no safetensors file: {error}") from error
        loaded = cls({name: entries[entry] for name, entry in names.items()})
        if loaded.digest != metadata.get("digest"):
            raise StoredFileError(f"{path} is damaged: its content does not have the digest written in it")
        return loaded


def calibrate(
    model: torch.nn.Module,
    inputs: Iterable[Any],
    *,
    rows: int = 512,
    run: Callable[[torch.nn.Module, Any], Any] | None = None,
) -> Calibration:
    """Run `model` on each of `inputs` (without gradients) and record what its matrix products read.

    inputs: one element for each call: a tensor, a tuple of arguments, or a dict of keyword arguments. rows:
        how many
    rows of each input are kept, sampled evenly over all calls. run: how to call the model on an element if
    not so. Weights are those parameters that stand on the right of linear, addmm, mm or matmul.
    """
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 1:
        raise OptionError(f"calibrate(rows={rows!r}): must be a whole number, 1 or more")
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    recorder = _Recorder(names, rows)
    calls = 0
    with torch.no_grad(), recorder:
        for element in inputs:
            (run or _call)(model, element)
            recorder.forget_last()
            calls += 1
    if not calls:
        raise OptionError("calibrate() got no inputs: give at least one call's arguments")
    if not recorder.streams:
        raise OptionError(f"calibrate(): no matrix product with a parameter of {type(model).__name__} was seen")
    finished = {id(stream): stream.finish() for stream in recorder.streams.values()}
    return Calibration({name: finished[id(stream)] for name, stream in recorder.streams.items()})


def _call(model: torch.nn.Module, element: Any) -> Any:
    if isinstance(element, Mapping):
        return model(**element)
    return model(*element) if isinstance(element, tuple) else model(element)


class _Stream:
    """Statistics of one input over all calls; rows by reservoir sampling (Vitter, 1985) with a fixed seed."""

    def __init__(self, rows: int, columns: int) -> None:
        self.rows = torch.zeros(rows, columns, dtype=torch.bfloat16)
        self.largest, self.total = torch.zeros(columns), torch.zeros(columns, dtype=torch.float64)
        self.count = 0
        self.generator = torch.Generator().manual_seed(0)

    def add(self, x: Tensor) -> None:
        found = x.detach().reshape(-1, x.shape[-1]).float().cpu()
        capacity = self.rows.shape[0]
        free = min(max(capacity - self.count, 0), found.shape[0])
        self.rows[self.count : self.count + free] = found[:free].bfloat16()
        late = torch.arange(self.count + free, self.count + found.shape[0])
        places = (torch.rand(late.shape, generator=self.generator, dtype=torch.float64) * (late + 1)).long()
        kept = places < capacity
        self.rows[places[kept]] = found[free:][kept].bfloat16()
        self.count += found.shape[0]
        if found.shape[0]:
            self.largest = torch.maximum(self.largest, found.abs().amax(0))
            self.total += found.abs().sum(0, dtype=torch.float64)

    def finish(self) -> Inputs:
        rows = self.rows[: self.count].clone()
        return Inputs(rows, self.largest, (self.total / max(self.count, 1)).float())


class _Recorder(TorchFunctionMode):
    """Sees each matrix product with a parameter, whatever module or function makes it."""

    def __init__(self, names: Mapping[int, Sequence[str]], rows: int) -> None:
        super().__init__()
        self.names, self.capacity = names, rows
        self.streams: dict[str, _Stream] = {}
        self._last: tuple[Tensor, _Stream] | None = None

    def forget_last(self) -> None:
        """Called between calls of the model: the next input is another one, even at the same address."""
        self._last = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = _operands(func, args, kwargs)
        if operands is not None and id(operands[1]) in self.names:
            self._record(self.names[id(operands[1])], operands[0])
        return func(*args, **kwargs)

    def _record(self, names: Sequence[str], x: Tensor) -> None:
        if self._last is not None and self._last[0] is x:
            # Query, key and value read one tensor: it is counted once, and they share its statistics.
            known = self.streams.get(names[0])
            if known is None or known is self._last[1]:
                self.streams.update(dict.fromkeys(names, self._last[1]))
                return
        stream = self.streams.get(names[0]) or _Stream(self.capacity, x.shape[-1])
        self.streams.update(dict.fromkeys(names, stream))
        stream.add(x)
        self._last = x, stream


def _operands(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Tensor, Tensor] | None:
    """The left and right operand if `func` is a matrix product."""
    if func is F.linear:
        found = [*args, *(kwargs[name] for name in ("input", "weight") if name in kwargs)][:2]
    elif func in (torch.addmm, Tensor.addmm):
        found = list(args[1:3])
    elif func in (torch.mm, torch.matmul, Tensor.mm, Tensor.matmul, Tensor.__matmul__):
        found = list(args[:2])
    else:
        return None
    return (found[0], found[1]) if len(found) == 2 else None

"""The quantisation schemes: what the bits of a packed weight mean and how they lie in memory.

A weight [N, K] is cut along K into groups (a whole row counts as one group of K); each group has its
parameters, each element a code. `pack` gives the tensors below, `unpack` the float32 weight that they stand
for. G is ceil(K / group). All tensors are contiguous and row-major, so that a kernel streams row after row.

    name             packed[0]               packed[1]          packed[2]          weight
    int8             int8 [N, K]             float32 [N]        -                  code * scale
    int4-gB          uint8 [N, G * B / 2]    float16 [N, G]     float16 [N, G]     code * scale + offset
    int4-gB-sym      uint8 [N, G * B / 2]    float16 [N, G]     -                  (code - 8) * scale
    fp8              float8_e4m3fn [N, K]    float32 [N]        -                  code * scale
    nf4-gB           uint8 [N, G * B / 2]    float16 [N, G]     -                  NF4[code] * scale
    mxfp4            uint8 [N, G * 16]       uint8 [N, G]       -                  E2M1[code] * 2**(scale - 127)
    int8-gB          int8 [N, G * B]         float16 [N, G]     -                  code * scale
    q4_k             uint8 [N, G * 16]       uint8 [N, G]       uint8 [N, G]       code * (d * scale) - e * minimum
    int8-dynamic     as int8; x is rounded too: round(x / s) with s = max|x| / 127 of each of its rows
    fp8-dynamic      as fp8; x is rounded to e4m3 with s = max|x| / 448 of each of its rows

Four-bit codes: each run of 32 elements of a row takes 16 bytes; byte j holds element j in its low and element
16 + j in its high nibble. Where K is no multiple of the group, the last group is filled with copies of the
row's last element: a kernel must multiply them by zeros. E2M1 (OCP Microscaling 1.0): bit 3 is the sign, bits
0-2 count through 0, 0.5, 1, 1.5, 2, 3, 4, 6. NF4 is the table of Dettmers et al., QLoRA, 2023. A group with
an infinity or NaN becomes NaN as a whole.

q4_k is GGUF's Q4_K: groups of 32, scale and minimum of six bits, and for each eight groups (256 elements) what these
count in: packed[3], d, and packed[4], e, both float16 [N, ceil(G / 8)]. A byte for each count instead of six bits makes
4.625 bits to a weight of GGUF's 4.5; int4-g32 takes 5.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphopt import _compat
from graphopt.quantization import codecs
from graphopt.quantize_options import DEFAULT_GROUP_SIZE


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One scheme with its group size. group: 0 means a whole row. activations: "" or the codec of the rounded
    input.

    parameters: groups [N, G, B] in float32 -> the parameters of each group, [N, G] each, as they are stored.
    encode: groups and parameters -> codes [N, G, B]. decode: codes and parameters -> float32 [N, G, B].
    step: parameters -> the largest |weight - decoded weight| that may occur in each group, [N, G] in float32.
    dtype, parameter_dtypes: of the packed tensors. shared: how many neighbouring groups have one number of each
    parameter, () if none do; the functions above see such numbers repeated for each group.
    """

    name: str
    bits: int
    group: int
    parameters: Callable[[Tensor], list[Tensor]]
    encode: Callable[[Tensor, Sequence[Tensor]], Tensor]
    decode: Callable[[Tensor, Sequence[Tensor]], Tensor]
    step: Callable[[Sequence[Tensor]], Tensor]
    dtype: torch.dtype
    parameter_dtypes: tuple[torch.dtype, ...]
    activations: str = ""
    shared: tuple[int, ...] = ()

    def groups(self, weight: Tensor) -> Tensor:
        """The weight [N, K] in float32 as [N, G, B]; the last group is filled with the row's last element."""
        rows, columns = weight.shape
        size = self.group or columns
        count = -(-columns // size)
        if count * size != columns:
            weight = weight[:, torch.arange(count * size, device=weight.device).clamp(max=columns - 1)]
        return weight.float().reshape(rows, count, size)

    def pack(self, weight: Tensor) -> list[Tensor]:
        """The packed tensors of a floating-point weight [N, K]."""
        groups = self.groups(weight)
        parameters = self.parameters(groups)
        return self.store(self.encode(groups, parameters), parameters)

    def store(self, codes: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
        """Codes [N, G, B] and parameters [N, G] as they lie in memory."""
        flat = codes.flatten(1)
        data = codecs.nibbles(flat) if self.bits == 4 else flat
        if not self.group:
            return [data.contiguous(), *(part[:, 0].contiguous() for part in parameters)]
        stored = zip(parameters, self._every, strict=True)
        return [data.contiguous(), *(part[:, ::every].contiguous() for part, every in stored)]

    def load(self, packed: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Codes [N, G, B] and parameters [N, G] of packed tensors."""
        data, *parameters = packed
        flat = codecs.from_nibbles(data) if self.bits == 4 else data
        if not self.group:
            return flat[:, None], [part[:, None] for part in parameters]
        count = flat.shape[1] // self.group
        repeated = [
            part[..., None].expand(*part.shape, every).flatten(1)[:, :count]
            for part, every in zip(parameters, self._every, strict=True)
        ]
        return flat.unflatten(1, (count, self.group)), repeated

    def unpack(self, packed: Sequence[Tensor], columns: int) -> Tensor:
        """The weight [N, K] in float32 that packed tensors stand for; `columns` is K."""
        codes, parameters = self.load(packed)
        return self.decode(codes, parameters).flatten(1)[:, :columns]

    def bound(self, packed: Sequence[Tensor], columns: int) -> Tensor:
        """For each element [N, K] the largest error that rounding to the nearest code can make, float32."""
        codes, parameters = self.load(packed)
        return self.step(parameters)[..., None].expand(codes.shape).flatten(1)[:, :columns]

    def layout(self, rows: int, columns: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each tensor of a packed weight [rows, columns]."""
        if not self.group:
            return [((rows, columns), self.dtype), *(((rows,), dtype) for dtype in self.parameter_dtypes)]
        groups = -(-columns // self.group)
        data = (rows, groups * self.group * self.bits // 8), self.dtype
        sizes = zip(self._every, self.parameter_dtypes, strict=True)
        return [data, *(((rows, -(-groups // every)), dtype) for every, dtype in sizes)]

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a packed weight [rows, columns]."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout(rows, columns))

    def can_pack(self, weight: Tensor) -> bool:
        """Whether all elements are finite, and small enough that scales and offsets are finite as they are stored."""
        limit = 6e4 if torch.float16 in self.parameter_dtypes else 1e37
        with _compat.real_execution():
            low, high = weight.detach().aminmax()
            return bool(-limit < low.item() and high.item() < limit)

    @property
    def parts(self) -> int:
        """How many tensors a packed weight is."""
        return 1 + len(self.parameter_dtypes)

    @property
    def span(self) -> int:
        """How many columns have their parameters chosen together; 0 means a whole row."""
        return self.group * max(self._every)

    @property
    def _every(self) -> tuple[int, ...]:
        return self.shared or (1,) * len(self.parameter_dtypes)


@functools.cache
def named(name: str) -> Scheme:
    """The scheme of a canonical name as in the table above ("int8", "int4-g32", "int4-g128-sym", "nf4-g64")."""
    scheme = _by_name().get(name)
    if scheme is None:
        raise ValueError(f"no quantisation scheme {name!r}; there are {', '.join(_by_name())}")
    return scheme


@functools.cache
def _by_name() -> dict[str, Scheme]:
    half, byte = torch.float16, torch.uint8
    found = [
        Scheme("mxfp4", 4, 32, *codecs.MXFP4, byte, (byte,)),
        Scheme("q4_k", 4, 32, *codecs.Q4_K, byte, (byte, byte, half, half), shared=(1, 1, 8, 8)),
    ]
    for kind, codec, dtype in (("int8", codecs.INT8, torch.int8), ("fp8", codecs.FP8, torch.float8_e4m3fn)):
        found.append(Scheme(kind, 8, 0, *codec, dtype, (torch.float32,)))
        found.append(Scheme(f"{kind}-dynamic", 8, 0, *codec, dtype, (torch.float32,), kind))
    for size in (32, 64, 128):
        found.append(Scheme(f"int8-g{size}", 8, size, *codecs.INT8_HALF, torch.int8, (half,)))
        found.append(Scheme(f"int4-g{size}", 4, size, *codecs.INT4, byte, (half, half)))
        found.append(Scheme(f"int4-g{size}-sym", 4, size, *codecs.INT4_SYMMETRIC, byte, (half,)))
        found.append(Scheme(f"nf4-g{size}", 4, size, *codecs.NF4, byte, (half,)))
    return {scheme.name: scheme for scheme in found}


def canonical(scheme: str, group_size: int | None = None, symmetric: bool = False) -> str:
    """The canonical name of a user's scheme: "int4" with its default group is "int4-g32"; group size 0 is a row."""
    group = DEFAULT_GROUP_SIZE.get(scheme) if group_size is None else group_size
    return scheme + (f"-g{group}" if group else "") + ("-sym" if symmetric else "")

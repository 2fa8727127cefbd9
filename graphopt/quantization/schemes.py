"""The quantisation schemes: what the bits of a packed weight mean and how they lie in memory.

A weight [N, K] is cut along K into groups (a whole row counts as one group of K); each group has its
parameters, each element a code. `pack` gives the tensors below, `unpack` the float32 weight that they stand
for. G is ceil(K / group). All tensors are contiguous and row-major, so that a kernel streams row after row.

    name             packed[0]               packed[1]          packed[2]          weight
    int8             int8 [N, K]             float32 [N]        -                  code * scale
    int4-gB          uint8 [N, G * B / 2]    bfloat16 [N, G]    bfloat16 [N, G]    code * scale + offset
    int4-gB-sym      uint8 [N, G * B / 2]    bfloat16 [N, G]    -                  (code - 8) * scale
    fp8              float8_e4m3fn [N, K]    float32 [N]        -                  code * scale
    nf4-gB           uint8 [N, G * B / 2]    bfloat16 [N, G]    -                  NF4[code] * scale
    mxfp4            uint8 [N, G * 16]       uint8 [N, G]       -                  E2M1[code] * 2**(scale -
    127) int8-dynamic     as int8; the input is rounded too: round(x / s) with s = max|x| / 127 of each row of
    x fp8-dynamic      as fp8; the input is rounded to e4m3 with s = max|x| / 448 of each row of x

Four-bit codes: each run of 32 elements of a row takes 16 bytes; byte j holds element j in its low and element
16 + j in its high nibble. Where K is no multiple of the group, the last group is filled with copies of the
row's last element: a kernel must multiply them by zeros. E2M1 (OCP Microscaling 1.0): bit 3 is the sign, bits
0-2 count through 0, 0.5, 1, 1.5, 2, 3, 4, 6. NF4 is the table of Dettmers et al., QLoRA, 2023. A group with
an infinity or NaN becomes NaN as a whole.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphopt import _compat
from graphopt.quantization import codecs
from graphopt.quantize_options import DEFAULT_GROUP_SIZE, Quantize


@dataclasses.dataclass(frozen=True)
class Scheme:
    """One scheme with its group size. group: 0 means a whole row. activations: "" or the codec of the rounded
    input.

    parameters: groups [N, G, B] in float32 -> the parameters of each group, [N, G] each, as they are stored.
    encode: groups and parameters -> codes [N, G, B]. decode: codes and parameters -> float32 [N, G, B].
    step: parameters -> the largest |weight - decoded weight| that may occur in each group, [N, G] in float32.
    dtype, parameter_dtypes: of the packed tensors.
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
        return [data.contiguous(), *(part if self.group else part[:, 0].contiguous() for part in parameters)]

    def load(self, packed: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Codes [N, G, B] and parameters [N, G] of packed tensors."""
        data, *parameters = packed
        flat = codecs.from_nibbles(data) if self.bits == 4 else data
        if not self.group:
            return flat[:, None], [part[:, None] for part in parameters]
        return flat.reshape(flat.shape[0], -1, self.group), parameters

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
        return [data, *(((rows, groups), dtype) for dtype in self.parameter_dtypes)]

    def nbytes(self, rows: int, columns: int) -> int:
        """Bytes of a packed weight [rows, columns]."""
        return sum(math.prod(shape) * dtype.itemsize for shape, dtype in self.layout(rows, columns))

    @property
    def parts(self) -> int:
        """How many tensors a packed weight is."""
        return 1 + len(self.parameter_dtypes)


_NAME = re.compile(
    r"(int8|fp8|mxfp4|int8-dynamic|fp8-dynamic)|(?:(int4)-g(32|64|128)(-sym)?)|(?:(nf4)-g(32|64|128))"
)


@functools.cache
def named(name: str) -> Scheme:
    """The scheme of a canonical name as in the table above ("int8", "int4-g32", "int4-g128-sym",
    "nf4-g64")."""
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"no quantisation scheme {name!r}")
    plain, int4, int4_group, symmetric, nf4, nf4_group = match.groups()
    if int4 and symmetric:
        return Scheme(name, 4, int(int4_group), *codecs.INT4_SYMMETRIC, torch.uint8, (torch.bfloat16,))
    if int4:
        return Scheme(name, 4, int(int4_group), *codecs.INT4, torch.uint8, (torch.bfloat16, torch.bfloat16))
    if nf4:
        return Scheme(name, 4, int(nf4_group), *codecs.NF4, torch.uint8, (torch.bfloat16,))
    if plain == "mxfp4":
        return Scheme(name, 4, 32, *codecs.MXFP4, torch.uint8, (torch.uint8,))
    kind, _, dynamic = plain.partition("-")
    codec, dtype = (codecs.INT8, torch.int8) if kind == "int8" else (codecs.FP8, torch.float8_e4m3fn)
    return Scheme(name, 8, 0, *codec, dtype, (torch.float32,), kind if dynamic else "")


def canonical(scheme: str, group_size: int | None = None, symmetric: bool = False) -> str:
    """The canonical name of a user's scheme: "int4" with its default group is "int4-g32"."""
    group = group_size or DEFAULT_GROUP_SIZE.get(scheme)
    return scheme + (f"-g{group}" if group else "") + ("-sym" if symmetric else "")


def chosen(quantize: Quantize, *, lm_head: bool) -> Scheme | None:
    """The scheme that the options give to a weight; None if it stays as it is. lm_head: whether it is the
    head's."""
    if lm_head and quantize.lm_head is False:
        return None
    if lm_head and isinstance(quantize.lm_head, str):
        return named(canonical(quantize.lm_head))
    return named(canonical(quantize.scheme, quantize.group_size, quantize.symmetric))


def is_packable(weight: Tensor) -> bool:
    """Whether every element is finite and so far from float32's end that differences and scales are finite
    too."""
    with _compat.real_execution():
        low, high = weight.detach().aminmax()
        return bool(-1e37 < low.item() and high.item() < 1e37)

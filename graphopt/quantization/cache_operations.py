"""Quantised KV caches: how rows of keys and values lie in memory, and the dialect operations on them.

Keys are quantised per channel, values per token (KIVI, Liu et al. 2024): keys have channels that are large for all
tokens, values have not. `GROUP` keys in a row share the parameters of a channel, so keys are packed in whole groups;
the newest rows (at least `RECENT`, fewer than RECENT + GROUP) stay in full precision, the tail. How many rows are
packed is a function of the length alone (`packed_rows`), so that it is known while a graph is compiled.

A part is three tensors, for rows [B, H, S, D] of which P are packed:

    codes [B, H, P, D] or, for int4, [B, H, P, D / 2], uint8    int4: channel j in the low, j + D / 2 in the high nibble
    params [B, H, P / GROUP, n * D] (keys) or [B, H, P, n] (values), float16    n = 2 (scale, offset) for int4, else 1
    tail [B, H, TAIL + new, D]    in the dtype of the model; the last S - P rows count, those before mean nothing

A row is code * scale + offset. int8 codes are two's complement within [-127, 127], fp8 ones e4m3fn.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt import ops
from graphopt.errors import OptionError
from graphopt.ops import operation

GROUP = 32
RECENT = 16
TAIL = RECENT + GROUP - 1
KINDS = ("int8", "fp8", "int4")
_LARGEST = {"int8": 127.0, "fp8": 448.0, "int4": 15.0}


def packed_rows(length: int) -> int:
    """How many of `length` rows are packed: whole groups, and never the most recent rows."""
    count: int = torch.sym_max(length - RECENT, 0) // GROUP * GROUP
    return count


def columns(kind: str, size: int) -> int:
    """Bytes of codes for one row of `size` numbers."""
    return size // 2 if kind == "int4" else size


def unsupported_reason(rows: Tensor, kind: str) -> str:
    """Why rows [B, H, S, D] (real or fake) cannot be quantised, or ""."""
    if rows.dim() != 4:
        return "the cache is not [batch, heads, length, size]"
    if rows.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"the cache is of {str(rows.dtype).removeprefix('torch.')}"
    if not isinstance(rows.shape[3], int) or (kind == "int4" and rows.shape[3] % 2):
        return f"heads of {rows.shape[3]} numbers cannot be packed in pairs"
    return ""


def check_devices(kind: str | None, inputs: Sequence[object]) -> None:
    """Raise OptionError if caches of this kind cannot live on the devices of these inputs (None: any can)."""
    for device in {value.device for value in inputs if isinstance(value, Tensor)} if kind == "fp8" else ():
        if device.type != "cuda" or torch.version.hip is not None:
            continue
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 9):
            found = ".".join(map(str, capability))
            raise OptionError(
                f"option 'kv_dtype' got 'fp8', which needs compute capability 8.9; {device} has {found}: use 'int8' or"
                " 'int4'"
            )


def quantize_rows(rows: Tensor, kind: str, keys: bool) -> tuple[Tensor, Tensor]:
    """The codes and params of rows [B, H, P, D]; for keys P is a multiple of GROUP. NaN or infinity gives NaN."""
    wide = rows.float()
    grouped = wide.unflatten(2, (wide.shape[2] // GROUP, GROUP)) if keys else wide.unsqueeze(3)
    over = 3 if keys else 4
    low, high = grouped.amin(over, keepdim=True), grouped.amax(over, keepdim=True)
    if kind == "int4":
        offset = low.half()
        scale = ((high - offset.float()) / _LARGEST[kind]).half()
        params = [scale, offset]
    else:
        offset = torch.zeros_like(low, dtype=torch.float16)
        scale = (torch.maximum(-low, high) / _LARGEST[kind]).half()
        params = [scale]
    steps = torch.where(scale == 0, 0.0, (grouped - offset.float()) / scale.float()).reshape(wide.shape)
    if kind == "fp8":
        codes = steps.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        lowest = 0.0 if kind == "int4" else -_LARGEST[kind]
        whole = steps.nan_to_num().round().clamp(lowest, _LARGEST[kind])
        codes = whole.to(torch.uint8) if kind == "int4" else whole.to(torch.int8).view(torch.uint8)
    if kind == "int4":
        first, second = codes.chunk(2, -1)
        codes = first | second << 4
    return codes, torch.cat([param.squeeze(3) for param in params], -1)


def dequantize_rows(codes: Tensor, params: Tensor, kind: str, keys: bool, dtype: torch.dtype) -> Tensor:
    """The rows [B, H, P, D] that the codes and params stand for, computed in float32."""
    if kind == "int4":
        steps = torch.cat([codes & 15, codes >> 4], -1).float()
    else:
        steps = codes.view(torch.int8 if kind == "int8" else torch.float8_e4m3fn).float()
    wide = params.float()
    if keys:
        wide = wide.repeat_interleave(GROUP, 2)
    scale, *offset = wide.chunk(2, -1) if kind == "int4" else (wide,)
    return (steps * scale + offset[0] if offset else steps * scale).to(dtype)


def whole(codes: Tensor, params: Tensor, tail: Tensor, length: int, kind: str, keys: bool) -> Tensor:
    """All `length` rows of a part, in the dtype of its tail."""
    packed = dequantize_rows(codes, params, kind, keys, tail.dtype)
    recent = tail.narrow(2, tail.shape[2] - (length - codes.shape[2]), length - codes.shape[2])
    return torch.cat([packed, recent], 2)


def _part_shape(past: Tensor, count: int, kind: str, keys: bool) -> list[Tensor]:
    batch, heads, length, size = past.shape
    packed, numbers = packed_rows(length), 2 if kind == "int4" else 1
    parameters = (packed // GROUP, numbers * size) if keys else (packed, numbers)

    def lying(rows: int, row: int, dtype: torch.dtype) -> Tensor:
        return past.new_empty((rows, batch, heads, row), dtype=dtype).permute(1, 2, 0, 3)

    return [
        lying(packed, columns(kind, size), torch.uint8),
        lying(*parameters, torch.float16),
        lying(TAIL + count, size, past.dtype),
    ]


@operation("(Tensor past, SymInt count, str kind, bool keys) -> Tensor[]", _part_shape, repeatable=False)
def kv_quantized_reserve(past: Tensor, count: int, kind: str, keys: bool) -> list[Tensor]:
    """The part (see above) of a cache `past` [B, H, S, D], its tail with `count` more rows that hold nothing yet.

    Lies in memory as [rows, B, H, ...]. At call time `past` may be a `runtime.kv_quantized.QuantizedCache`: then
    only the rows that have left the tail are quantised.
    """
    length = past.shape[2]
    packed = packed_rows(length)
    codes, params, tail = _part_shape(past, count, kind, keys)
    for made, given in zip((codes, params), quantize_rows(past[:, :, :packed], kind, keys), strict=True):
        made.copy_(given)
    tail.zero_().narrow(2, TAIL - (length - packed), length - packed).copy_(past[:, :, packed:])
    return [codes, params, tail]


def _whole_shape(codes: Tensor, params: Tensor, tail: Tensor, length: int, kind: str, keys: bool) -> Tensor:
    return tail.new_empty((tail.shape[0], tail.shape[1], length, tail.shape[3]))


@operation("(Tensor codes, Tensor params, Tensor tail, SymInt length, str kind, bool keys) -> Tensor", _whole_shape)
def kv_quantized_cache(codes: Tensor, params: Tensor, tail: Tensor, length: int, kind: str, keys: bool) -> Tensor:
    """A part as the cache [B, H, length, D] that a graph returns; at call time a `QuantizedCache` of the same rows."""
    return whole(codes, params, tail, length, kind, keys)


def _same_shape(rows: Tensor, kind: str, keys: bool) -> Tensor:
    return torch.empty_like(rows, memory_format=torch.contiguous_format)


@operation("(Tensor rows, str kind, bool keys) -> Tensor", _same_shape)
def kv_quantize(rows: Tensor, kind: str, keys: bool) -> Tensor:
    """A new cache [B, H, S, D] as it reads once quantised; at call time a `QuantizedCache`."""
    codes, params, tail = kv_quantized_reserve(rows, 0, kind, keys)
    return whole(codes, params, tail, rows.shape[2], kind, keys)


@ops.attention_over(("codes", "params", "tail"), ", str kind")
def attention_quantized(codes: Tensor, params: Tensor, tail: Tensor, length: int, kind: str, *, keys: bool) -> Tensor:
    """`graphopt.attention` of q [B, H, S, D] over `length` quantised keys and values, given as their parts."""
    return whole(codes, params, tail, length, kind, keys)


OPERATIONS = ops.CacheOperations(kv_quantized_reserve, kv_quantized_cache, kv_quantize, attention_quantized, TAIL)

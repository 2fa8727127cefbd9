"""Weights that come out of a GGUF file keep that file's blocks: `graphopt.load_gguf(model, path)`.

Loading a GGUF checkpoint blows its blocks up to floating point. Blocks of four kinds say exactly what a scheme of
`schemes` says, so that they become packs without rounding anything a second time:

    Q8_0  32 codes in eight bits and a float16 scale                            int8-g32
    Q4_0  32 codes in four bits and a float16 scale                             int4-g32-sym
    Q4_1  32 codes in four bits, a float16 scale and minimum                    int4-g32
    Q4_K  256 codes in four bits, for each 32 a scale and a minimum in six,     q4_k
          both in units of a float16 number

A block is taken for a weight only if it stands for that weight's very values; rows may stand in another order
(llama.cpp reorders the rows of query and key). Weights in blocks of other kinds stay in the dtype that they were loaded
in: a "Q4_K_M" file has some in Q6_K.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import OptionError, StoredFileError
from graphopt.quantization import codecs, packing, schemes
from graphopt.quantize_options import Quantize
from graphopt.runtime import packs

_PLAIN = ("F64", "F32", "F16", "BF16")


def load_gguf(model: nn.Module, path: str | Path, quantize: Quantize | None = None) -> Quantize:
    """Take the blocks of a GGUF file as the packs of `model`, which was loaded from that file.

    quantize: what to do with all other weights; by default they stay as they are. Returns the options to compile the
    model with: `assigned` names the weights whose blocks were taken, `reasons` says why others were not. Raises
    StoredFileError for a file that is no GGUF file, OptionError if not one of its blocks belongs to the model.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(path)
        stored = {tensor.name: tensor for tensor in reader.tensors}
        layers = int(reader.fields[f"{_text(reader, 'general.architecture')}.block_count"].contents())
    except FileNotFoundError:
        raise
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise StoredFileError(f"{path} is damaged or no GGUF file: {error}") from error
    names = gguf.get_tensor_name_map(_architecture(gguf, _text(reader, "general.architecture")), layers)
    in_blocks = {
        name: (parameter, tensor)
        for name, parameter in model.named_parameters()
        if (tensor := stored.get(names.get_name(name, try_suffixes=(".weight",)) or "")) is not None
        and parameter.dim() == 2
        and tensor.tensor_type.name not in _PLAIN
    }
    assigned = dict(_take(in_blocks))
    if not assigned and not any(_is_same(parameter, tensor) for parameter, tensor in in_blocks.values()):
        raise OptionError(f"load_gguf(): no block of {path} holds the values of a weight of {type(model).__name__}")
    if quantize is None:
        reasons = [(name, _why_left(*found)) for name, found in in_blocks.items() if name not in assigned]
        rest = [(name, "") for name, _ in model.named_parameters(remove_duplicate=False) if name not in assigned]
        return Quantize("int8", assigned=(*assigned.items(), *rest), reasons=tuple(reasons))
    kept = [entry for entry in quantize.assigned if entry[0] not in assigned]
    return dataclasses.replace(quantize, assigned=(*assigned.items(), *kept))


def _text(reader: Any, key: str) -> str:
    return str(reader.fields[key].contents())


def _architecture(gguf: Any, name: str) -> Any:
    for key, known in gguf.MODEL_ARCH_NAMES.items():
        if known == name:
            return key
    raise StoredFileError(f"the GGUF file holds a model of the unknown architecture {name!r}")


def _take(in_blocks: dict[str, tuple[nn.Parameter, Any]]) -> Iterator[tuple[str, str]]:
    """Make the blocks that hold the values of their weight its packs; name and scheme of each."""
    for name, (parameter, tensor) in in_blocks.items():
        scheme, read = _KINDS.get(tensor.tensor_type.name, ("", None))
        if read is None or not _has_shape_of(parameter, tensor):
            continue
        packed, columns = read(_blocks(tensor, parameter.shape[0])), parameter.shape[1]
        order = _order_of(parameter, schemes.named(scheme).unpack(packed, columns))
        if order is not None:
            placed = [part[order].to(parameter.device) for part in packed]
            constants = ((("tensor", 1), scheme, None), ())
            packs.restore(packs.Made(packs.name_of(packing.pack_weight), constants, (parameter,), placed))
            yield name, scheme


def _why_left(parameter: nn.Parameter, tensor: Any) -> str:
    kind = tensor.tensor_type.name
    if kind not in _KINDS:
        return f"its blocks are of the kind {kind}, which is no scheme here, so that it stays in {parameter.dtype}"
    return "the file's blocks hold other values"


def _has_shape_of(parameter: nn.Parameter, tensor: Any) -> bool:
    return tuple(reversed(tensor.shape.tolist())) == tuple(parameter.shape)


def _is_same(parameter: nn.Parameter, tensor: Any) -> bool:
    """Whether blocks, of whatever kind, hold the values of a weight."""
    from gguf.quants import dequantize

    if not _has_shape_of(parameter, tensor):
        return False
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        return False
    return _order_of(parameter, torch.from_numpy(values).reshape(parameter.shape)) is not None


def _blocks(tensor: Any, rows: int) -> Tensor:
    """The bytes of a tensor's blocks: uint8 [rows, blocks in a row, bytes of a block]."""
    import gguf

    _, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    return torch.from_numpy(tensor.data.copy()).view(torch.uint8).reshape(rows, -1, size)


def _halves(blocks: Tensor, count: int) -> list[Tensor]:
    """The float16 numbers that each block starts with: [rows, blocks] each."""
    head = blocks[..., : 2 * count].contiguous().view(torch.float16)
    return [head[..., index].contiguous() for index in range(count)]


def _q8_0(blocks: Tensor) -> list[Tensor]:
    return [blocks[..., 2:].flatten(1).view(torch.int8), *_halves(blocks, 1)]


def _q4_0(blocks: Tensor) -> list[Tensor]:
    # Blocks of 32 pair element j with element 16 + j, as the schemes do.
    return [blocks[..., 2:].flatten(1), *_halves(blocks, 1)]


def _q4_1(blocks: Tensor) -> list[Tensor]:
    return [blocks[..., 4:].flatten(1), *_halves(blocks, 2)]


def _q4_k(blocks: Tensor) -> list[Tensor]:
    # Of the 12 bytes of counts the first 8 hold scales 0-3 and minimums 0-3 and the upper two bits of those 4-7, the
    # last 4 the lower four bits of scale and minimum 4-7. Bytes of codes pair an element with the one 32 behind it.
    first, second, third = blocks[..., 4:16].unflatten(-1, (3, 4)).unbind(-2)
    scales = torch.cat((first & 63, third & 15 | first >> 2 & 48), -1)
    minimums = torch.cat((second & 63, third >> 4 | second >> 2 & 48), -1)
    pairs = blocks[..., 16:].unflatten(-1, (4, 32))
    codes = torch.stack((pairs & 15, pairs >> 4), -2).flatten(1)
    return [codecs.nibbles(codes), scales.flatten(1), minimums.flatten(1), *_halves(blocks, 2)]


_KINDS: dict[str, tuple[str, Callable[[Tensor], list[Tensor]]]] = {
    "Q8_0": ("int8-g32", _q8_0),
    "Q4_0": ("int4-g32-sym", _q4_0),
    "Q4_1": ("int4-g32", _q4_1),
    "Q4_K": ("q4_k", _q4_k),
}


def _order_of(weight: Tensor, values: Tensor) -> Tensor | None:
    """The rows of float32 values that are those of the weight one after the other; None if it has others."""
    wanted = weight.detach().cpu().contiguous()
    found = values.to(wanted.dtype)
    if torch.equal(found, wanted):
        return torch.arange(wanted.shape[0])
    place = {row: index for index, row in enumerate(_rows(found))}
    order = [place.get(row) for row in _rows(wanted)]
    return None if any(index is None for index in order) else torch.tensor(order)


def _rows(matrix: Tensor) -> list[bytes]:
    # Adding 0 turns -0 into 0: they are one value.
    return [row.tobytes() for row in (matrix + 0).view(torch.uint8).numpy()]

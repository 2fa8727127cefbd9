"""Weights that come out of a GGUF file keep that file's blocks: `graphopt.load_gguf(model, path)`.

Loading a GGUF checkpoint blows its blocks up to floating point. Blocks of three kinds say exactly what a scheme of
`schemes` says, so that they become packs without rounding anything a second time:

    Q8_0  32 codes in eight bits and a float16 scale            int8-g32
    Q4_0  32 codes in four bits and a float16 scale             int4-g32-sym
    Q4_1  32 codes in four bits, a float16 scale and minimum    int4-g32

A block is taken for a weight only if it stands for that weight's very values; rows may stand in another order
(llama.cpp reorders the rows of query and key).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import OptionError, StoredFileError
from graphopt.quantization import packing, schemes
from graphopt.quantize_options import Quantize
from graphopt.runtime import packs

_BLOCK = 32
_KINDS = {"Q8_0": "int8-g32", "Q4_0": "int4-g32-sym", "Q4_1": "int4-g32"}


def load_gguf(model: nn.Module, path: str | Path, quantize: Quantize | None = None) -> Quantize:
    """Take the blocks of a GGUF file as the packs of `model`, which was loaded from that file.

    quantize: what to do with all other weights; by default they stay as they are. Returns the options to compile the
    model with: `assigned` names the weights whose blocks were taken. Raises StoredFileError for a file that is no
    GGUF file, OptionError if not one of its blocks belongs to the model.
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
    assigned: list[tuple[str, str]] = []
    for name, parameter in model.named_parameters():
        tensor = stored.get(names.get_name(name, try_suffixes=(".weight",)) or "")
        scheme = _KINDS.get(tensor.tensor_type.name) if tensor is not None else None
        if scheme is None or parameter.dim() != 2:
            continue
        packed = _in_order_of(parameter, schemes.named(scheme), _packed(tensor, *parameter.shape))
        if packed is not None:
            placed = [part.to(parameter.device) for part in packed]
            constants = ((("tensor", 1), scheme, None), ())
            packs.restore(packs.Made(packs.name_of(packing.pack_weight), constants, (parameter,), placed))
            assigned.append((name, scheme))
    if not assigned:
        raise OptionError(f"load_gguf(): no block of {path} holds the values of a weight of {type(model).__name__}")
    taken = {name for name, _ in assigned}
    if quantize is None:
        rest = [(name, "") for name, _ in model.named_parameters(remove_duplicate=False) if name not in taken]
        return Quantize("int8", assigned=(*assigned, *rest))
    kept = [entry for entry in quantize.assigned if entry[0] not in taken]
    return dataclasses.replace(quantize, assigned=(*assigned, *kept))


def _text(reader: Any, key: str) -> str:
    return str(reader.fields[key].contents())


def _architecture(gguf: Any, name: str) -> Any:
    for key, known in gguf.MODEL_ARCH_NAMES.items():
        if known == name:
            return key
    raise StoredFileError(f"the GGUF file holds a model of the unknown architecture {name!r}")


def _packed(tensor: Any, rows: int, columns: int) -> list[Tensor] | None:
    """The blocks of a tensor as packed tensors [rows, columns]; None if its shape is another one."""
    if columns % _BLOCK or tuple(reversed(tensor.shape.tolist())) != (rows, columns):
        return None
    blocks = torch.from_numpy(tensor.data.copy()).view(torch.uint8).reshape(rows, columns // _BLOCK, -1)
    halves = 2 if tensor.tensor_type.name == "Q4_1" else 1
    head, codes = blocks[..., : 2 * halves].contiguous().view(torch.float16), blocks[..., 2 * halves :]
    # Four-bit blocks pair element j with element 16 + j, as the schemes do.
    data = codes.flatten(1).contiguous()
    if tensor.tensor_type.name == "Q8_0":
        data = data.view(torch.int8)
    return [data, *(head[..., index].contiguous() for index in range(halves))]


def _in_order_of(weight: Tensor, scheme: schemes.Scheme, packed: list[Tensor] | None) -> list[Tensor] | None:
    """The packed tensors with their rows in the order of the weight's; None if they do not hold its values."""
    if packed is None:
        return None
    wanted = weight.detach().cpu().contiguous()
    found = scheme.unpack(packed, wanted.shape[1]).to(wanted.dtype)
    if torch.equal(found, wanted):
        return packed
    place = {row: index for index, row in enumerate(_rows(found))}
    order = [place.get(row) for row in _rows(wanted)]
    if any(index is None for index in order):
        return None
    return [part[torch.tensor(order)] for part in packed]


def _rows(matrix: Tensor) -> list[bytes]:
    # Adding 0 turns -0 into 0: they are one value.
    return [row.tobytes() for row in (matrix + 0).view(torch.uint8).numpy()]

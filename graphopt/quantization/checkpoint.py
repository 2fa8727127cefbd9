"""Checkpoints whose linears are already quantised keep their codes: `graphopt.load_checkpoint(model, folder)`.

Read are folders of safetensors with a `quantization_config` in their config.json:

    gptq                 four bits; words of eight codes along K          (q - z - 1) * s   (gptq_v2: (q - z) * s)
    awq                  four bits; words of eight interleaved rows        (q - z) * s
    compressed-tensors   pack-quantized, four bits; words along K          (q - z) * s
                         int-quantized, eight bits, one scale to a row     q * s

Codes are taken as they are; scales become float16 (float32 for eight bits), and so do the products -z * s where z is
not the middle of the codes: at most one part in two thousand of 15 scales, as in the float16 arithmetic that these
formats were made for. Groups of 32, 64, 128, or multiples of 128 columns, whole rows included.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import OptionError, StoredFileError
from graphopt.quantization import packing, release, schemes, store
from graphopt.quantize_options import Quantize
from graphopt.runtime import packs

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_MIDDLE = 8


@dataclasses.dataclass(frozen=True)
class _Codes:
    """What a checkpoint says of a weight [N, K]: codes [N, K], scales [N, G], and for four bits zeros [N, G]."""

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None = None


def load_checkpoint(model: nn.Module, folder: str | Path) -> Quantize:
    """Give `model`, made from the checkpoint's configuration, the weights of a quantised checkpoint.

    Quantised linears get their packs and no full-precision weight (see `graphopt.release_weights`), so that a model on
    the meta device never takes the memory of one; all other tensors are copied. Returns the options to compile the
    model with. Raises StoredFileError for a folder that is damaged, of another model, or quantised in a way that no
    scheme here has, OptionError if none of its weights is quantised.
    """
    path = Path(folder)
    config, tensors = _config(path), _tensors(path)
    found = {name: _codes_of(config, tensors, name.removesuffix(".weight"), path) for name in _linears(model)}
    packed = {name: _packed(codes, model.get_parameter(name), name, path) for name, codes in found.items() if codes}
    if not packed:
        raise OptionError(f"load_checkpoint(): {path} has no quantised weight of a linear of {type(model).__name__}")
    everything = (*model.named_parameters(), *model.named_buffers())
    plain = {name: _plain(tensors, name, value, path) for name, value in everything if name not in packed}
    for name, tensor in plain.items():
        if tensor is not None:
            store.put(model, name, tensor)
    assigned = []
    for name, (scheme, parts) in packed.items():
        release.replace(model, name)
        parameter = model.get_parameter(name)
        constants = ((("tensor", 1), scheme, None), ())
        packs.restore(packs.Made(packs.name_of(packing.pack_weight), constants, (parameter,), parts))
        assigned.append((name, scheme))
    rest = [(name, "") for name, _ in model.named_parameters(remove_duplicate=False) if name not in packed]
    return Quantize("int8", assigned=(*assigned, *rest))


def _config(path: Path) -> Mapping[str, Any]:
    file = path / "config.json"
    if not file.is_file():
        raise StoredFileError(f"{path} holds no config.json: not a checkpoint's folder")
    try:
        content = json.loads(file.read_text())
        config = content["quantization_config"]
        method = config["quant_method"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoredFileError(f"{file} names no quantization_config with a quant_method: {error!r}") from error
    if method not in _READERS:
        raise StoredFileError(f"{file}: quant_method {method!r} is none of {', '.join(_READERS)}")
    return dict(config)


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    tensors: dict[str, Tensor] = {}
    for file in sorted(path.glob("*.safetensors")):
        try:
            tensors.update(load_file(file))
        except SafetensorError as error:
            raise StoredFileError(f"{file} is damaged: {error}") from error
    if not tensors:
        raise StoredFileError(f"{path} holds no safetensors file")
    return tensors


def _linears(model: nn.Module) -> list[str]:
    return [f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _plain(tensors: Mapping[str, Tensor], name: str, value: Tensor, path: Path) -> Tensor | None:
    """The checkpoint's tensor for a parameter or buffer that is not quantised; None for a tied one it leaves out."""
    if name not in tensors:
        if value.is_meta:
            raise StoredFileError(f"{path} has no {name!r}, and the model's own is on the meta device")
        return None
    if tensors[name].shape != value.shape:
        raise StoredFileError(f"{name!r} is {list(tensors[name].shape)} in {path} but {list(value.shape)} in the model")
    return tensors[name].to(value.dtype)


def _codes_of(config: Mapping[str, Any], tensors: Mapping[str, Tensor], name: str, path: Path) -> _Codes | None:
    own = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
    try:
        found: _Codes | None = _READERS[config["quant_method"]](config, own)
    except (KeyError, TypeError, RuntimeError, IndexError) as error:
        method = config["quant_method"]
        raise StoredFileError(f"{path}: the tensors of {name!r} are not those of {method}: {error!r}") from error
    except _Unknown as error:
        raise StoredFileError(f"{path}: {name!r} {error}; no scheme of graphopt has that") from error
    return found


class _Unknown(Exception):
    """A way of quantising that no scheme has."""


def _gptq(config: Mapping[str, Any], own: Mapping[str, Tensor]) -> _Codes | None:
    if "qweight" not in own:
        return None
    _four_bits(config["bits"])
    codes = _words(own["qweight"].t(), range(8))
    scales = own["scales"].t()
    groups = own.get("g_idx")
    size = -(-codes.shape[1] // scales.shape[1])
    if groups is not None and not torch.equal(groups.long(), torch.arange(codes.shape[1]) // size):
        raise _Unknown("puts columns into groups out of order (desc_act)")
    lifted = 0 if config.get("checkpoint_format") == "gptq_v2" else 1
    return _Codes(codes, scales, _words(own["qzeros"], range(8)).t() + lifted)


def _awq(config: Mapping[str, Any], own: Mapping[str, Tensor]) -> _Codes | None:
    if "qweight" not in own:
        return None
    _four_bits(config["bits"])
    if config.get("version", "gemm").lower() != "gemm":
        raise _Unknown(f"is laid out for the kernel {config['version']!r}")
    codes, zeros = (_words(own[name], _AWQ_ORDER).t() for name in ("qweight", "qzeros"))
    return _Codes(codes, own["scales"].t(), zeros)


def _compressed_tensors(config: Mapping[str, Any], own: Mapping[str, Tensor]) -> _Codes | None:
    if "weight_scale" not in own:
        return None
    scales = own["weight_scale"]
    if "weight_g_idx" in own:
        raise _Unknown("puts columns into groups out of order (actorder)")
    if own.get("weight", scales).dtype == torch.int8:
        if "weight_zero_point" in own and own["weight_zero_point"].any():
            raise _Unknown("has eight bits and zero points")
        return _Codes(own["weight"], scales)
    rows, columns = own["weight_shape"].tolist()
    if own["weight_packed"].shape[1] * 8 != -(-columns // 8) * 8:
        raise _Unknown("is packed in words of other than eight codes")
    codes = _words(own["weight_packed"], range(8))[:, :columns]
    zeros = torch.full(scales.shape, _MIDDLE, dtype=torch.uint8)
    if "weight_zero_point" in own:  # packed along the rows
        zeros = _words(own["weight_zero_point"].t(), range(8)).t()[:rows]
    return _Codes(codes, scales, zeros)


_READERS = {"gptq": _gptq, "awq": _awq, "compressed-tensors": _compressed_tensors}


def _four_bits(bits: int) -> None:
    if bits != 4:
        raise _Unknown(f"has {bits} bits")


def _words(words: Tensor, order: Sequence[int]) -> Tensor:
    """Codes uint8 [R, 8 C] of words int32 [R, C]: nibble i of a word is its code number order[i]."""
    shifts = torch.tensor([4 * order.index(place) for place in range(8)], dtype=torch.int32)
    return ((words[..., None] >> shifts) & 15).to(torch.uint8).flatten(1)


def _packed(found: _Codes, weight: Tensor, name: str, path: Path) -> tuple[str, list[Tensor]]:
    """The scheme that says what the codes say, and the packed tensors."""
    rows, columns = found.codes.shape
    if tuple(weight.shape) != (rows, columns):
        raise StoredFileError(f"{name!r} is {[rows, columns]} in {path} but {list(weight.shape)} in the model")
    if not torch.isfinite(found.scales).all() or found.scales.abs().amax() > 4e3:
        raise StoredFileError(f"{path}: the scales of {name!r} are not finite or too large")
    if found.zeros is None:
        if found.scales.numel() != rows:
            raise StoredFileError(f"{path}: {name!r} has eight bits and {found.scales.numel()} scales for {rows} rows")
        return "int8", [found.codes.contiguous(), found.scales.reshape(rows).float()]
    count = found.scales.shape[1]
    size = -(-columns // count)
    group = size if size in (32, 64) else 128
    if (count > 1 and size % group) or found.zeros.shape != found.scales.shape:
        raise StoredFileError(f"{path}: {name!r} has groups of {size} columns; allowed are 32, 64 and multiples of 128")
    repeated = torch.arange(0, columns, group) // size
    symmetric = bool((found.zeros == _MIDDLE).all())
    scheme = schemes.named(f"int4-g{group}" + ("-sym" if symmetric else ""))
    parameters = [found.scales] if symmetric else [found.scales, -found.zeros.float() * found.scales.float()]
    halves = [part.half()[:, repeated].contiguous() for part in parameters]
    filled = torch.arange(len(repeated) * group).clamp(max=columns - 1)
    return scheme.name, scheme.store(found.codes[:, filled].reshape(rows, -1, group), halves)

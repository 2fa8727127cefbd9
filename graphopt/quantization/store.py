"""Keep packed weights on disk, so that packing is not repeated: `save_quantized` and `load_quantized`.

A directory holds `quantized.json` (what was packed from which weight, and the options), `packs.safetensors` (packed
tensors, and in full the tensors that are read as they are) and, where one was used, `calibration.safetensors`.
Nothing is pickled; whatever does not fit together is refused with StoredFileError before the model is touched.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import OptionError, StoredFileError
from graphopt.quantization import operations, packing, release, schemes
from graphopt.quantization.calibration import Calibration
from graphopt.quantize_options import Quantize
from graphopt.runtime import packs

_FORMAT = "graphopt quantized 1"
_FUNCTIONS = {
    packs.name_of(function): label
    for function, label in ((packing.pack_scales, "scales"), (packing.pack_weight, "weight"))
}


def save_quantized(model: nn.Module, directory: str | Path, quantize: Quantize | str) -> None:
    """Write the packs that calls of the compiled `model` have made under the options `quantize`.

    Raises OptionError if nothing has been packed: compile the model with these options and call it once first.
    """
    asked = Quantize.parse(quantize)
    made = _packs_of(model)
    if asked is None or not made:
        raise OptionError(
            f"save_quantized(): no weight of {type(model).__name__} has been packed; compile the model with"
            " options={'quantize': ...} and call it once first"
        )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    results = {id(part): (index, place) for index, pack in enumerate(made) for place, part in enumerate(pack.result)}
    records, tensors, weights = [], {}, {}
    for index, pack in enumerate(made):
        for place, part in enumerate(pack.result):
            tensors[f"{index}.{place}"] = part.contiguous()
        sources: list[Any] = [names.get(id(source)) or list(results[id(source)]) for source in pack.sources]
        weights.update({name: _described(model.get_parameter(name)) for name in sources if isinstance(name, str)})
        label = _FUNCTIONS[pack.function]
        records.append({"makes": label, "constants": pack.constants, "from": sources, "parts": len(pack.result)})
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if name not in weights or release.why_kept(model, name):
            tensors[f"plain.{name}"] = tensor.detach().contiguous()
    _write(Path(directory), asked, records, weights, tensors)


def load_quantized(model: nn.Module, directory: str | Path, *, release_weights: bool = False) -> Quantize:
    """Give `model` the packs of a directory that `save_quantized` wrote; returns the options to compile it with.

    Tensors that are read in full are copied into the model. The weights that were packed must be those of the model;
    with `release_weights=True`, or where they are on the meta device, the packs take their place and the model's own
    are freed (see `graphopt.release_weights`). Raises StoredFileError for damaged, foreign or unfitting files.
    """
    path = Path(directory)
    content, tensors = _read(path)
    try:
        quantize = _options(path, content["quantize"])
        made = _checked(model, content, tensors)
        replaced = {
            name
            for name, described in content["weights"].items()
            if _is_replaced(model, name, described, release_weights)
        }
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise StoredFileError(f"{path / 'quantized.json'} does not describe this model: {error!r}") from error
    for key, tensor in tensors.items():
        if key.startswith("plain."):
            put(model, key.removeprefix("plain."), tensor)
    for name in replaced:
        release.replace(model, name)
    results: list[list[Tensor]] = []
    for record, parts in made:
        sources = tuple(
            model.get_parameter(source) if isinstance(source, str) else results[source[0]][source[1]]
            for source in record["from"]
        )
        function = next(name for name, label in _FUNCTIONS.items() if label == record["makes"])
        placed = [part.to(sources[0].device) for part in parts]
        packs.restore(packs.Made(function, _tuples(record["constants"]), sources, placed))
        results.append(placed)
    return quantize


def _packs_of(model: nn.Module) -> list[packs.Made]:
    """The packs made from parameters of the model, channel scales before the weights that they scale."""
    found: dict[tuple[Any, ...], packs.Made] = {}
    for parameter in model.parameters():
        for pack in packs.made_from(parameter):
            if pack.function in _FUNCTIONS:
                found[(pack.function, pack.constants, tuple(map(id, pack.sources)))] = pack
    return sorted(found.values(), key=lambda pack: list(_FUNCTIONS).index(pack.function))


def _described(weight: Tensor) -> dict[str, Any]:
    gone = release.is_released(weight)
    return {"shape": list(weight.shape), "dtype": str(weight.dtype), "sha256": "" if gone else _digest(weight)}


def _digest(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().view(torch.uint8)
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()


def _write(
    path: Path, quantize: Quantize, records: list[Any], weights: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    description = path / "quantized.json"
    description.unlink(missing_ok=True)  # a directory without it is no saved result
    save_file(tensors, path / "packs.safetensors")
    if isinstance(quantize.calibration, Calibration):
        quantize.calibration.save(path / "calibration.safetensors")
    options = {
        field.name: getattr(quantize, field.name)
        for field in dataclasses.fields(quantize)
        if field.name != "calibration"
    }
    content = {
        "format": _FORMAT,
        "quantize": options,
        "calibrated": quantize.calibration is not None,
        "records": records,
        "weights": weights,
        "sha256": _file_digest(path / "packs.safetensors"),
    }
    partial = path / "quantized.json.partial"
    partial.write_text(json.dumps(content, indent=1))
    os.replace(partial, description)


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    description, stored = path / "quantized.json", path / "packs.safetensors"
    for file in (description, stored):
        if not file.is_file():
            raise StoredFileError(f"{path} holds no {file.name}: not a directory that save_quantized finished")
    try:
        content = json.loads(description.read_text())
    except ValueError as error:
        raise StoredFileError(f"{description} is damaged: {error}") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise StoredFileError(f"{description} is not of the format {_FORMAT!r}")
    if _file_digest(stored) != content.get("sha256"):
        raise StoredFileError(f"{stored} is damaged or from elsewhere: its digest is not the one in {description.name}")
    try:
        return content, load_file(stored)
    except SafetensorError as error:
        raise StoredFileError(f"{stored} is damaged: {error}") from error


def _options(path: Path, options: dict[str, Any]) -> Quantize:
    calibration = path / "calibration.safetensors"
    pairs = {field: tuple((name, text) for name, text in options.get(field, ())) for field in ("assigned", "reasons")}
    given = {**options, **pairs}
    found = Calibration.load(calibration) if calibration.is_file() else None
    return Quantize(**given, calibration=found)


def _checked(
    model: nn.Module, content: dict[str, Any], tensors: dict[str, Tensor]
) -> list[tuple[dict[str, Any], list[Tensor]]]:
    """The records with their tensors, which must have the shapes and dtypes that their scheme gives them."""
    for name, described in content["weights"].items():
        weight = model.get_parameter(name)
        if list(weight.shape) != described["shape"] or str(weight.dtype) != described["dtype"]:
            raise StoredFileError(
                f"weight {name!r} is {str(weight.dtype)} {list(weight.shape)} in the model but was"
                f" {described['dtype']} {described['shape']} when it was packed"
            )
    found = []
    for index, record in enumerate(content["records"]):
        parts = [tensors[f"{index}.{place}"] for place in range(record["parts"])]
        if record["makes"] not in _FUNCTIONS.values():
            raise StoredFileError(f"record {index} makes {record['makes']!r}, which is unknown")
        if record["makes"] == "weight":
            arguments, keywords = record["constants"]
            shape, turned = content["weights"][record["from"][0]]["shape"], dict(keywords).get("transposed", False)
            layout = schemes.named(arguments[1]).layout(*operations.matrix(shape, transposed=turned))
            if [(tuple(part.shape), part.dtype) for part in parts] != layout:
                raise StoredFileError(f"the packed tensors of {record['from'][0]!r} are not laid out as {arguments[1]}")
        found.append((record, parts))
    return found


def _is_replaced(model: nn.Module, name: str, described: dict[str, Any], release_weights: bool) -> bool:
    """Whether the packs take the place of a weight; if they do not, the weight must be the one that was packed."""
    weight = model.get_parameter(name)
    if release.why_kept(model, name):
        return False  # its full values are in the directory
    if release_weights or weight.is_meta:
        return True
    if _digest(weight) != described["sha256"]:
        raise StoredFileError(
            f"weight {name!r} of the model is not the one that was packed; load the model's own weights first, or"
            " pass release_weights=True to put the packs in their place"
        )
    return False


def put(model: nn.Module, name: str, tensor: Tensor) -> None:
    """Make a tensor the value of the named parameter or buffer; one on the meta device is replaced by it."""
    owner, _, last = name.rpartition(".")
    module = model.get_submodule(owner)
    old = getattr(module, last)
    if not old.is_meta:
        with torch.no_grad():
            old.copy_(tensor)
    elif last in module._parameters:
        release.set_parameter(model, old, nn.Parameter(tensor, requires_grad=False))
    else:
        module._buffers[last] = tensor


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value

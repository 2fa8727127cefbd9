"""Better codes than the nearest ones, given the inputs that a weight will meet.

gptq: columns are rounded one after the other and the error of each is made up for by the columns still to
    come (Frantar et al., GPTQ, 2023); the packed format is the scheme's own.
awq: input channels that are large on average are scaled up in the weight and down in the input before
    rounding, by a power that is searched for (Lin et al., AWQ, 2024).
smoothquant: the largest magnitudes of input and weight are balanced channel by channel, so that both round
    well (Xiao et al., SmoothQuant, 2023); for schemes that round the input too.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.quantization.calibration import Calibration, Inputs
from graphopt.quantization.schemes import Scheme

SCALED = ("awq", "smoothquant")
_calibrations: dict[str, Calibration] = {}
_BLOCK = 128
_DAMPING = 0.01
_POWERS = tuple(step / 10 for step in range(10))


def register(calibration: Calibration) -> None:
    """Keep a calibration for the programs that are compiled with it: they name it by its digest."""
    _calibrations[calibration.digest] = calibration


def spell(method: str, calibration: Calibration, name: str) -> str:
    """A rounding method and the inputs of the named weight as the text that stands in graphs."""
    return f"{method}:{calibration.digest}:{name}"


def inputs_of(rounding: str) -> Inputs:
    """The inputs that `spell` named. Raises KeyError for a calibration that was never registered."""
    _, digest, name = rounding.split(":", 2)
    found = _calibrations[digest].find(name)
    if found is None:
        raise KeyError(f"calibration {digest} does not know {name!r}")
    return found


def gptq(weight: Tensor, scheme: Scheme, inputs: Inputs) -> list[Tensor]:
    """The packed tensors of a weight [N, K] with codes chosen by GPTQ for sampled inputs [R, K]."""
    groups = scheme.groups(weight)
    rows, count, size = groups.shape
    left = groups.flatten(1).clone()
    inverse = _inverse_factor(inputs.rows.float().to(weight.device), left.shape[1])
    parameters = scheme.parameters(groups)
    codes = torch.empty(groups.shape, dtype=scheme.dtype, device=weight.device).flatten(1)
    for start in range(0, left.shape[1], _BLOCK):
        end = min(start + _BLOCK, left.shape[1])
        block, local = left[:, start:end], inverse[start:end, start:end]
        errors = torch.zeros_like(block)
        for column in range(end - start):
            position = start + column
            group = position // size
            if scheme.group and position % scheme.span == 0:
                # What earlier columns pushed here belongs to the group when its scale is chosen.
                fresh = scheme.parameters(left[:, position : position + scheme.span].unflatten(1, (-1, size)))
                for part, chosen in zip(parameters, fresh, strict=True):
                    part[:, group : group + chosen.shape[1]] = chosen
            own = [part[:, group : group + 1] for part in parameters]
            code = scheme.encode(block[:, column, None, None], own)
            codes[:, position] = code[:, 0, 0]
            error = (block[:, column] - scheme.decode(code, own)[:, 0, 0]) / local[column, column]
            block[:, column:] -= error[:, None] * local[column, column:]
            errors[:, column] = error
        left[:, end:] -= errors @ inverse[start:end, end:]
    return scheme.store(codes.reshape(rows, count, size), parameters)


def _inverse_factor(rows: Tensor, columns: int) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped Hessian X^T X; filled-up columns have no
    input."""
    rows = torch.nn.functional.pad(rows, (0, columns - rows.shape[1]))
    hessian = rows.T @ rows
    diagonal = hessian.diagonal()
    damping = _DAMPING * diagonal.mean().clamp(min=1e-8)
    diagonal += torch.where(diagonal == 0, 1.0, damping)
    factor: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(hessian)), upper=True)
    return factor


def channel_scale(weights: Sequence[Tensor], scheme: Scheme, inputs: Inputs, method: str) -> Tensor:
    """What to multiply the input channels of the weights [N_i, K] by, and to divide the input by: float32
    [K]."""
    if method == "smoothquant":
        largest = torch.stack([weight.float().abs().amax(0) for weight in weights]).amax(0)
        return _balanced(inputs.largest.to(largest.device).sqrt() / largest.clamp(min=1e-5).sqrt())
    return _searched(weights, scheme, inputs)


def _searched(weights: Sequence[Tensor], scheme: Scheme, inputs: Inputs) -> Tensor:
    """The power of the mean magnitude with the smallest squared error of the outputs on the sampled rows."""
    together = torch.cat([weight.float() for weight in weights])
    rows = inputs.rows.float().to(together.device)
    wanted = rows @ together.T
    best, best_error = torch.ones(together.shape[1], device=together.device), float("inf")
    for power in _POWERS:
        scale = _balanced(inputs.mean.to(together.device) ** power)
        scaled = scheme.unpack(scheme.pack(together * scale), together.shape[1]) / scale
        error = (rows @ scaled.T - wanted).square().sum().item()
        if error < best_error:
            best, best_error = scale, error
    return best


def _balanced(scale: Tensor) -> Tensor:
    """A positive scale around 1; channels without input stay as they are."""
    positive = torch.where(torch.isfinite(scale) & (scale > 0), scale, 1.0).clamp(1e-4, 1e4)
    return positive / (positive.amax() * positive.amin()).sqrt()


def approximated(weight: Tensor, scheme: Scheme, inputs: Inputs | None, method: str) -> Tensor:
    """The float32 weight [N, K] that multiplying by the packed one amounts to, in the coordinates of the
    input."""
    columns = weight.shape[1]
    if inputs is None or method == "nearest":
        return scheme.unpack(scheme.pack(weight), columns)
    if method == "gptq":
        return scheme.unpack(gptq(weight, scheme, inputs), columns)
    scale = channel_scale([weight], scheme, inputs, method)
    return scheme.unpack(scheme.pack(weight * scale), columns) / scale

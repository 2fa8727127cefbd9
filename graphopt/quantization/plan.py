"""Which weight gets which scheme, what it costs in error and saves in bytes: `graphopt.plan(model,
Quantize(...))`.

For `Quantize("auto", max_error=...)` the choice is a knapsack: one scheme for each weight so that the bytes
are fewest and the root mean square of the relative errors stays below `max_error`; scipy's branch-and-bound
(HiGHS) solves it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table
from torch import Tensor

from graphopt import _compat
from graphopt.errors import OptionError
from graphopt.quantization import operations, rounding, schemes
from graphopt.quantization.calibration import Calibration, Inputs
from graphopt.quantize_options import Quantize
from graphopt.runtime import packs

CANDIDATES = ("int4-g128", "int4-g64", "q4_k", "int4-g32", "int8", "int8-g64")
"""What `auto` chooses from, besides leaving a weight as it is."""


@dataclasses.dataclass(frozen=True)
class Layer:
    """One weight: its scheme ("" if it stays), bytes before and after, and relative errors (Frobenius norm).

    output_error is that of the layer's output on the calibration's rows, None without a calibration. reason:
    why the weight stays as it is.
    """

    name: str
    scheme: str
    bytes_before: int
    bytes_after: int
    weight_error: float = 0.0
    output_error: float | None = None
    reason: str = ""


@dataclasses.dataclass(frozen=True)
class Plan:
    """A scheme for each weight. `quantize` holds it as an option; printing shows the table."""

    layers: tuple[Layer, ...]
    quantize: Quantize

    @property
    def bytes_before(self) -> int:
        return sum(layer.bytes_before for layer in self.layers)

    @property
    def bytes_after(self) -> int:
        return sum(layer.bytes_after for layer in self.layers)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        title = f"{self.bytes_before / 1e6:.2f} MB -> {self.bytes_after / 1e6:.2f} MB in {len(self.layers)} weights"
        table = Table("weight", "scheme", "kB", "weight error", "output error", "left because", title=title)
        for layer in self.layers:
            output = "" if layer.output_error is None else f"{layer.output_error:.4f}"
            size = f"{layer.bytes_before / 1e3:.1f} -> {layer.bytes_after / 1e3:.1f}"
            table.add_row(layer.name, layer.scheme, size, f"{layer.weight_error:.4f}", output, layer.reason)
        yield table

    def __str__(self) -> str:
        console = Console(width=140)
        with console.capture() as captured:
            console.print(self)
        return captured.get()


@dataclasses.dataclass(frozen=True)
class Weight:
    """A weight to plan for, [N, K], or experts, [E, N, K]. transposed: kept as [K, N]. lm_head: whether it scores the
    vocabulary. reason: why it cannot be quantised.
    """

    name: str
    tensor: Tensor
    transposed: bool = False
    lm_head: bool = False
    reason: str = ""


def plan(model: torch.nn.Module, quantize: Quantize) -> Plan:
    """What quantising `model` costs and saves, weight by weight; for "auto" the schemes are chosen here.

    Seen are the weights of `nn.Linear`, those whose inputs the calibration has recorded, and the experts of mixtures
    that transformers can multiply with their own tokens. Raises OptionError if there is none.
    """
    weights = list(_weights_of(model, _calibration(quantize)))
    if not weights:
        raise OptionError(f"plan(): {type(model).__name__} has no linear weight that could be quantised")
    return plan_weights(weights, quantize)


def plan_weights(weights: Sequence[Weight], quantize: Quantize) -> Plan:
    """The plan for the given weights, in their order."""
    assigned = dict(quantize.assigned)
    if quantize.scheme == "auto" and not assigned:
        assigned = _solve(weights, quantize)
    layers, chosen = [], []
    for weight in weights:
        scheme, reason = choose(quantize, weight.name, weight.lm_head, assigned)
        if weight.reason:
            scheme, reason = None, weight.reason
        if scheme is not None and not scheme.can_pack(weight.tensor):
            reason, scheme = f"it holds infinities, NaN or values too large for {scheme.name}", None
        layers.append(_layer(weight, scheme, quantize, reason))
        chosen.append((weight.name, scheme.name if scheme else ""))
    return Plan(tuple(layers), dataclasses.replace(quantize, assigned=tuple(chosen)))


def choose(
    quantize: Quantize, name: str, lm_head: bool, assigned: Mapping[str, str]
) -> tuple[schemes.Scheme | None, str]:
    """The scheme of a weight and "", or None and the reason why it stays as it is."""
    reason = quantize.wants(name)
    if reason:
        return None, reason
    if lm_head and quantize.lm_head is False:
        return None, "lm_head=False leaves the linear that scores the vocabulary as it is"
    if lm_head and isinstance(quantize.lm_head, str):
        return schemes.named(schemes.canonical(quantize.lm_head)), ""
    if name in assigned:
        chosen = assigned[name]
        left = dict(quantize.reasons).get(name, "the plan leaves it as it is")
        return (schemes.named(chosen), "") if chosen else (None, left)
    if quantize.scheme == "auto":
        return None, "the plan does not know it"
    asked = schemes.named(schemes.canonical(quantize.scheme, quantize.group_size, quantize.symmetric))
    # Errors of the head are errors of the logits: four bits are too few for them.
    return (schemes.named(schemes.canonical("int8")) if lm_head and asked.bits < 8 else asked), ""


def _calibration(quantize: Quantize) -> Calibration | None:
    return quantize.calibration if isinstance(quantize.calibration, Calibration) else None


def _weights_of(model: torch.nn.Module, calibration: Calibration | None) -> Iterator[Weight]:
    vocabularies = {module.num_embeddings for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    linears = {
        id(module.weight): f"{name}.weight".lstrip(".")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    seen: set[int] = set()
    stacks = _experts_of(model)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in stacks and id(parameter) not in seen:
            seen.add(id(parameter))
            yield Weight(name, parameter, stacks[id(parameter)], reason=why_not_experts(parameter.device))
        inputs = calibration.find(name) if calibration is not None else None
        if parameter.dim() != 2 or id(parameter) in seen or (id(parameter) not in linears and inputs is None):
            continue
        seen.add(id(parameter))
        columns = inputs.rows.shape[1] if inputs is not None else parameter.shape[1]
        transposed = parameter.shape[1] != columns
        rows = parameter.shape[1 if transposed else 0]
        yield Weight(name, parameter, transposed, rows in vocabularies)


def _experts_of(model: torch.nn.Module) -> dict[int, bool]:
    """Whether they are kept as [E, K, N], by the identity of the experts in modules with transformers' "experts
    implementation", which all say so."""
    return {
        id(parameter): bool(module.is_transposed)
        for module in model.modules()
        if isinstance(getattr(module, "is_transposed", None), bool)
        for parameter in module.parameters(recurse=False)
        if parameter.dim() == 3
    }


def why_not_experts(device: torch.device) -> str:
    """Why products with experts on a device are not quantised; "" if they are."""
    return "" if device.type == "cpu" else f"grouped products are quantised on the CPU only, not on {device.type}"


def _layer(weight: Weight, scheme: schemes.Scheme | None, quantize: Quantize, reason: str) -> Layer:
    before = weight.tensor.numel() * weight.tensor.element_size()
    if scheme is None:
        return Layer(weight.name, "", before, before, reason=reason)
    rows, columns = operations.matrix(weight.tensor.shape, transposed=weight.transposed)
    of_weight, of_output = _errors(weight, scheme, quantize)
    return Layer(weight.name, scheme.name, before, scheme.nbytes(rows, columns), of_weight, of_output)


def spelled(quantize: Quantize, name: str) -> str:
    """The rounding method and the calibrated inputs of a weight as graphs name them; "" if there are none."""
    calibration = _calibration(quantize)
    if calibration is None or calibration.find(name) is None:
        return ""
    rounding.register(calibration)
    return rounding.spell(quantize.rounding, calibration, name)


def _errors(weight: Weight, scheme: schemes.Scheme, quantize: Quantize) -> tuple[float, float | None]:
    with _compat.real_execution():
        found: tuple[float, float | None] = _measured(
            weight.tensor, scheme.name, spelled(quantize, weight.name), transposed=weight.transposed
        )
    return found


@packs.packed
def _measured(weight: Tensor, scheme: str, inputs_name: str, *, transposed: bool) -> tuple[float, float | None]:
    """Relative errors of the weight and of the output on the calibration's rows; kept until the weight
    changes."""
    how = schemes.named(scheme)
    matrix = (weight.mT if transposed else weight).detach().flatten(0, -2).float()
    inputs = rounding.inputs_of(inputs_name) if inputs_name else None
    rounded = rounding.approximated(matrix, how, inputs, inputs_name.partition(":")[0])
    difference = rounded - matrix
    of_weight = _relative(difference, matrix)
    if inputs is None:
        return of_weight, None
    rows = inputs.rows.float().to(matrix.device)
    return of_weight, _relative(rows @ difference.T, rows @ matrix.T)


def _relative(difference: Tensor, whole: Tensor) -> float:
    norm = whole.norm().item()
    return difference.norm().item() / norm if norm else 0.0


def _solve(weights: Sequence[Weight], quantize: Quantize) -> dict[str, str]:
    """The scheme of each weight ("" leaves it) with the fewest bytes in all."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    assert quantize.max_error is not None
    choices: list[tuple[int, str, float, float]] = []  # weight, scheme, bytes, squared error
    for index, weight in enumerate(weights):
        choices.append((index, "", float(weight.tensor.numel() * weight.tensor.element_size()), 0.0))
        for name in CANDIDATES:
            scheme = schemes.named(name)
            if (
                weight.reason
                or (weight.lm_head and quantize.lm_head is False)
                or quantize.wants(weight.name)
                or not scheme.can_pack(weight.tensor)
            ):
                continue
            layer = _layer(weight, scheme, quantize, "")
            if layer.bytes_after < layer.bytes_before:
                error = layer.weight_error if layer.output_error is None else layer.output_error
                choices.append((index, name, float(layer.bytes_after), error**2))
    sizes = np.array([choice[2] for choice in choices])
    errors = np.array([choice[3] for choice in choices])
    one_each = np.zeros((len(weights), len(choices)))
    one_each[[choice[0] for choice in choices], np.arange(len(choices))] = 1
    budget = quantize.max_error**2 * len(weights)
    solved = milp(
        sizes / sizes.max(),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(errors[None] / budget, ub=1)],
        integrality=np.ones(len(choices)),
        bounds=Bounds(0, 1),
        options={"mip_rel_gap": 1e-4, "time_limit": 60.0},
    )
    if solved.x is None:
        raise OptionError(
            f"Quantize('auto', max_error={quantize.max_error}): the solver found no plan: {solved.message}"
        )
    taken = [choice for choice, picked in zip(choices, solved.x, strict=True) if picked > 0.5]
    return {weights[index].name: name for index, name, _, _ in taken}


def inputs_for(quantize: Quantize, name: str) -> Inputs | None:
    """The calibrated inputs of a weight if the options ask for more than nearest codes."""
    calibration = _calibration(quantize)
    return calibration.find(name) if calibration is not None and quantize.rounding != "nearest" else None

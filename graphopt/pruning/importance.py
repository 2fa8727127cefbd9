"""How much the loss feels each input channel of each linear: `graphopt.head_importance(model, inputs)`.

For a gate on a channel x of a linear's input the derivative of the loss at 1 is the sum of x dL/dx over all tokens.
Summed over the channels of a head it is that of a gate on the head, whose mean magnitude over examples is the
importance of Michel, Levy and Neubig (2019); for one FFN channel it is the first Taylor term of Molchanov et al.
(2017). So one record serves both, and nothing about the architecture need be known.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import OptionError


@dataclasses.dataclass(frozen=True, repr=False)
class Importance:
    """By dotted name of the weight, for each example the derivative of the loss with respect to a gate on each of its
    input channels: [examples, K] in float32."""

    gates: Mapping[str, Tensor]

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the content; part of the keys of caches."""
        digest = hashlib.sha256()
        for name in sorted(self.gates):
            digest.update(name.encode() + self.gates[name].contiguous().numpy().tobytes())
        return digest.hexdigest()[:32]

    def __repr__(self) -> str:
        return f"Importance({len(self.gates)} weights, {self.digest})"

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Importance) and self.digest == other.digest

    def of_blocks(self, name: str, size: int) -> Tensor | None:
        """Mean magnitude over the examples of the gate on each `size` channels [K / size]; None for unseen weights."""
        gates = self.gates.get(name)
        if gates is None or gates.shape[1] % size:
            return None
        blocks: Tensor = gates.unflatten(1, (-1, size)).sum(2).abs().mean(0)
        return blocks


def head_importance(
    model: nn.Module,
    inputs: Iterable[Mapping[str, Any]],
    *,
    loss: Callable[[Any], Tensor] | None = None,
) -> Importance:
    """Run `model` on each of `inputs` (keyword arguments; one example each) and differentiate its loss.

    loss: from what the model returns to a number; by default its attribute `loss` (Hugging Face models have one when
    they are given `labels`). Parameters, their gradients and whether they require any are left as they were.
    """
    modules = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
    }
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    found: dict[str, list[Tensor]] = {f"{name}.weight": [] for name in modules}
    try:
        model.requires_grad_(True)
        for element in inputs:
            for name, gates in _gates_of(model, modules, element, loss).items():
                found[name].append(gates)
    finally:
        for parameter, before in required.items():
            parameter.requires_grad_(before)
    seen = {name: torch.stack(parts) for name, parts in found.items() if parts}
    if not seen:
        raise OptionError("head_importance() got no inputs, or the loss depends on no linear of the model")
    return Importance(seen)


def _gates_of(
    model: nn.Module, modules: Mapping[str, nn.Module], element: Mapping[str, Any], loss: Callable[[Any], Tensor] | None
) -> dict[str, Tensor]:
    """For one example the derivatives with respect to the gates of each linear's input, by name of its weight."""
    reads: list[tuple[str, Tensor]] = []

    def record(name: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args and isinstance(args[0], Tensor) and args[0].requires_grad:
            reads.append((f"{name}.weight", args[0]))

    hooks = [module.register_forward_pre_hook(functools.partial(record, name)) for name, module in modules.items()]
    try:
        with torch.enable_grad():
            result = model(**element)
            value = loss(result) if loss is not None else getattr(result, "loss", None)
            if not isinstance(value, Tensor):
                raise OptionError("head_importance(): the model returned no loss; give labels, or loss=...")
            slopes = torch.autograd.grad(value, [x for _, x in reads], allow_unused=True)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[str, Tensor] = {}
    for (name, x), slope in zip(reads, slopes, strict=True):
        if slope is not None:
            gates = (x.detach().float() * slope.float()).flatten(0, -2).sum(0).cpu()
            found[name] = found.get(name, 0) + gates
    return found

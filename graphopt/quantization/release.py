"""Free the full-precision weights of which only packs are read any more: `graphopt.release_weights(model)`.

A released parameter keeps its name, shape and dtype, but each row is one NaN in memory, and experts [E, N, K] of one
shape are all one expert of NaN: whatever still reads it gives NaN, never a number that looks right. Its module's
`forward` outside of compiled code, `state_dict`, and compiling a graph that reads it raise WeightsReleasedError. There
is no way back but loading the weights again into a new parameter.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt import capture
from graphopt.errors import OptionError, WeightsReleasedError
from graphopt.quantization import operations
from graphopt.quantization.names import weight_name
from graphopt.runtime import packs

_PACKING = (operations.quantize_weight, operations.input_scales)
_released: dict[int, weakref.ref[Tensor]] = {}


@dataclasses.dataclass(frozen=True)
class Release:
    """What was done: bytes freed, the released weights, and for every other packed weight why it was kept."""

    freed: int
    released: tuple[str, ...]
    kept: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        kept = "".join(f"\n  kept {name}: {reason}" for name, reason in self.kept)
        return f"released {len(self.released)} weights, {self.freed / 1e6:.1f} MB, for good{kept}"


def is_released(weight: Tensor) -> bool:
    """Whether the elements of a weight are gone."""
    found = _released.get(id(weight))
    return found is not None and found() is weight and 0 in weight.stride()


def check_reads(graph_module: fx.GraphModule) -> None:
    """Raise WeightsReleasedError if a captured graph reads a released weight otherwise than as its pack."""
    for node in graph_module.graph.nodes:
        weight = capture.weight_tensor(node) if node.op == "placeholder" else None
        if weight is None or not is_released(weight):
            continue
        reader = next((user for user in node.users if user.target not in _PACKING), None)
        if reader is not None:
            name = weight_name(node.meta.get("source", "")) or f"a weight of shape {tuple(weight.shape)}"
            raise WeightsReleasedError(
                f"{name} was released, but {reader.target} in this graph reads it. Run the model without gradients"
                " under the options that were in force when it was released, or load the weights again"
            )


def release_weights(model: nn.Module) -> Release:
    """Free the weights of `model` that have been packed by calls of its quantised compiled form. Irreversible.

    Run the compiled model once before, so that the packs are there; after it each graph is compiled once more,
    because the released weights lie differently in memory. Kept are weights that other modules use as they are.
    Raises OptionError if there is no packed weight.
    """
    freed, released, kept = 0, [], []
    for name, parameter in model.named_parameters():
        if is_released(parameter) or not _is_quantised(parameter):
            continue
        reason = why_kept(model, name)
        if reason:
            kept.append((name, reason))
            continue
        freed += parameter.untyped_storage().nbytes()
        freed -= replace(model, name)
        released.append(name)
    if not released and not kept:
        raise OptionError(
            f"release_weights(): no weight of {type(model).__name__} has been packed; compile the model with"
            " options={'quantize': ...} and call it once first"
        )
    return Release(freed, tuple(released), tuple(kept))


def why_kept(model: nn.Module, name: str) -> str:
    """Why the named weight cannot be released, or ""."""
    parameter = model.get_parameter(name)
    others = {type(module).__name__ for module, _ in _owners(model, parameter) if not isinstance(module, nn.Linear)}
    experts = parameter.dim() == 3
    if others and not experts:
        return f"it is also used by {', '.join(sorted(others))}"
    if experts and parameter.shape[0] == 1:
        return "it holds one expert only"
    if parameter.is_inference():
        return "it is an inference tensor, whose packs are told by its content"
    if not parameter.is_meta and not is_released(parameter):
        if parameter.untyped_storage().nbytes() != parameter.numel() * parameter.element_size():
            return "it shares its memory with other tensors"
    return ""


def replace(model: nn.Module, name: str) -> int:
    """Free the named weight; its packs stay valid. One on the meta device becomes a released parameter on the CPU.

    Returns the bytes of new memory that stand for it.
    """
    parameter = model.get_parameter(name)
    made = packs.made_from(parameter)
    gone, new_bytes = _nothing(parameter)
    if parameter.is_meta:
        new = nn.Parameter(gone.expand(parameter.shape), requires_grad=False)
        set_parameter(model, parameter, new)
        parameter = new
    else:
        parameter.data = gone.expand(parameter.shape)
    for pack in made:
        packs.restore(pack)
    _released[id(parameter)] = weakref.ref(parameter, functools.partial(_forget, id(parameter)))
    for module, own_name in _owners(model, parameter):
        _guard(module, own_name)
    return new_bytes


def _nothing(parameter: Tensor) -> tuple[Tensor, int]:
    """NaN that expands to a weight, and the bytes of it that were not there before."""
    device = torch.device("cpu") if parameter.is_meta else parameter.device
    # Rows that differ in address: passes tell a weight from its transpose by strides.
    shape = (parameter.shape[0], 1)
    if parameter.dim() == 3:
        # Products with experts want their last two dimensions to lie as those of any matrix: one expert serves all.
        shape = (1, *parameter.shape[1:])
        for reference in tuple(_released.values()):
            other = reference()
            if other is not None and other.dim() == 3 and is_released(other) and other.dtype == parameter.dtype:
                if other.shape[1:] == parameter.shape[1:] and other.device == device:
                    return other.detach()[:1], 0
    gone = torch.full(shape, float("nan"), dtype=parameter.dtype, device=device)
    return gone, gone.numel() * gone.element_size()


def set_parameter(model: nn.Module, old: Tensor, new: nn.Parameter) -> None:
    """Put a new parameter in the place of an old one, wherever the model uses it."""
    for module, name in _owners(model, old):
        module._parameters[name] = new


def _is_quantised(parameter: Tensor) -> bool:
    """Whether a quantised pack was made from it: one of its full precision (pruned) needs the weight itself."""
    return any(made.function.startswith("graphopt.quantization.") for made in packs.made_from(parameter))


def _owners(model: nn.Module, parameter: Tensor) -> list[tuple[nn.Module, str]]:
    return [
        (module, name) for module in model.modules() for name, found in module._parameters.items() if found is parameter
    ]


def _forget(identity: int, _: weakref.ref[Tensor]) -> None:
    _released.pop(identity, None)


def _guard(module: nn.Module, name: str) -> None:
    """Let every use of the module's parameter outside of compiled code raise."""

    def refuse(owner: nn.Module, *_: Any) -> None:
        # Compiled code reads the pack; while Dynamo traces, the module's own forward must be seen.
        if not torch.compiler.is_compiling() and is_released(getattr(owner, name)):
            raise WeightsReleasedError(
                f"{name!r} of this {type(owner).__name__} was released: only the compiled, quantised model can run."
                " Load the weights again to use the module itself"
            )

    module.register_forward_pre_hook(refuse)
    module.register_state_dict_pre_hook(refuse)

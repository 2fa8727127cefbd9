"""Free the full-precision weights of which only packs are read any more: `graphopt.release_weights(model)`.

A released parameter keeps its name, shape and dtype, but each row is one NaN in memory: whatever still reads
it gives NaN, never a number that looks right. Its module's `forward` outside of compiled code and `state_dict` raise
WeightsReleasedError. There is no way back but loading the weights again into a new parameter.
"""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import OptionError, WeightsReleasedError
from graphopt.runtime import packs

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
    return found is not None and found() is weight and weight.stride(-1) == 0


def release_weights(model: nn.Module) -> Release:
    """Free the weights of `model` that have been packed by calls of its quantised compiled form. Irreversible.

    Run the compiled model once before, so that the packs are there; after it each graph is compiled once more,
    because the released weights lie differently in memory. Kept are weights that other modules use as they are.
    Raises OptionError if there is no packed weight.
    """
    owners: dict[int, list[tuple[nn.Module, str]]] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append((module, name))
    freed, released, kept = 0, [], []
    for name, parameter in model.named_parameters():
        if is_released(parameter) or not packs.made_from(parameter):
            continue
        reason = _why_not(parameter, owners[id(parameter)])
        if reason:
            kept.append((name, reason))
            continue
        freed += parameter.untyped_storage().nbytes()
        release(parameter, owners[id(parameter)])
        released.append(name)
    if not released and not kept:
        raise OptionError(
            f"release_weights(): no weight of {type(model).__name__} has been packed; compile the model with"
            " options={'quantize': ...} and call it once first"
        )
    return Release(freed, tuple(released), tuple(kept))


def _why_not(parameter: Tensor, owners: list[tuple[nn.Module, str]]) -> str:
    others = {type(module).__name__ for module, _ in owners if not isinstance(module, nn.Linear)}
    if len(owners) > 1 and others:
        return f"it is also used by {', '.join(sorted(others))}"
    if parameter.untyped_storage().nbytes() != parameter.numel() * parameter.element_size():
        return "it shares its memory with other tensors"
    if parameter.is_inference():
        return "it is an inference tensor, whose packs are told by its content"
    return ""


def release(parameter: Tensor, owners: list[tuple[nn.Module, str]]) -> None:
    """Free one parameter; its packs stay valid."""
    made = packs.made_from(parameter)
    # Rows that differ in address: passes tell a weight from its transpose by strides.
    gone = torch.full((parameter.shape[0], 1), float("nan"), dtype=parameter.dtype, device=parameter.device)
    parameter.data = gone.expand(parameter.shape)
    for pack in made:
        packs.restore(pack)
    _released[id(parameter)] = weakref.ref(parameter, lambda _, key=id(parameter): _released.pop(key, None))
    for module, name in owners:
        _guard(module, name)


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

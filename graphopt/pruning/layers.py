"""Whole layers: how much a model's answer changes without each (`graphopt.layer_importance`), and where they stand.

A layer is an element of a `ModuleList` (of the longest outermost one, if there are several) that hands a hidden state
on. It is left out by handing on what it was given (ShortGPT; Men et al., 2024).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt import shapes
from graphopt.errors import OptionError


@dataclasses.dataclass(frozen=True, repr=False)
class LayerImportance:
    """By dotted name of the layer the relative change of the model's answer without it: ||y' - y|| / ||y||."""

    changes: Mapping[str, float]

    @functools.cached_property
    def digest(self) -> str:
        """Identifies the content; part of the keys of caches."""
        return hashlib.sha256(repr(sorted(self.changes.items())).encode()).hexdigest()[:32]

    def __repr__(self) -> str:
        return f"LayerImportance({len(self.changes)} layers, {self.digest})"

    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LayerImportance) and self.digest == other.digest

    def least(self, keep: float) -> tuple[str, ...]:
        """The layers to leave out so that a share of `keep` stays: those without which the answer changes least."""
        ordered = sorted(self.changes, key=self.changes.__getitem__)
        return tuple(ordered[: round((1 - keep) * len(ordered))])


def layer_importance(model: nn.Module, inputs: Iterable[Mapping[str, Any]]) -> LayerImportance:
    """Run `model` on each of `inputs` (keyword arguments), whole and without each of its layers in turn.

    Compared is the answer: `logits`, else `last_hidden_state`, else the first tensor that the model returns. It takes
    as many runs for each input as the model has layers, and one; without gradients.
    """
    layers = _layers(model)
    differences, total, calls = dict.fromkeys(layers, 0.0), 0.0, 0
    with torch.no_grad():
        for element in inputs:
            whole = _answer(model(**element))
            total += float(whole.double().square().sum())
            calls += 1
            for name, layer in layers.items():
                hook = layer.register_forward_hook(_hand_on, with_kwargs=True)
                try:
                    differences[name] += float((_answer(model(**element)) - whole).double().square().sum())
                finally:
                    hook.remove()
    if not calls:
        raise OptionError("layer_importance() got no inputs: give at least one call's arguments")
    return LayerImportance({name: (value / total) ** 0.5 if total else 0.0 for name, value in differences.items()})


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    # Lists within the elements of others (experts, say) hold no layers.
    lists = {name: found for name, found in lists.items() if not any(name.startswith(f"{other}.") for other in lists)}
    if not any(map(len, lists.values())):
        raise OptionError(f"layer_importance(): {type(model).__name__} has no ModuleList of layers")
    longest = max(lists, key=lambda name: len(lists[name]))
    return {f"{longest}.{number}" if longest else str(number): layer for number, layer in enumerate(lists[longest])}


def _hand_on(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    given = args[0] if args else kwargs.get("hidden_states")
    made = output[0] if isinstance(output, tuple) else output
    if not (isinstance(given, Tensor) and isinstance(made, Tensor) and given.shape == made.shape):
        raise OptionError(f"layer_importance(): {type(module).__name__} does not hand on a hidden state of one shape")
    return (given, *output[1:]) if isinstance(output, tuple) else given


def _answer(result: Any) -> Tensor:
    values = list(result.values()) if isinstance(result, Mapping) else result
    named = [getattr(result, name, None) for name in ("logits", "last_hidden_state")]
    others = values if isinstance(values, (list, tuple)) else [values]
    found = next((value for value in (*named, *others) if isinstance(value, Tensor)), None)
    if found is None:
        raise OptionError(f"layer_importance(): the model returns no tensor ({type(result).__name__})")
    return found


def module_paths(node: fx.Node) -> list[str]:
    """The dotted names of the modules in which a node was made, from the outermost."""
    stack = node.meta.get("nn_module_stack") or {}
    return [str(path).partition(".")[2] for path, *_ in stack.values()]


def ends(graph: fx.Graph, layer: str) -> tuple[fx.Node, list[fx.Node]] | str:
    """(what a layer is given, its results of the same form), or why the graph does not tell."""
    inside = [node for node in graph.nodes if node.op == "call_function" and layer in module_paths(node)]
    if not inside:
        return "no operation of the graph belongs to it"
    own = set(inside)
    given = {source: None for node in inside for source in node.all_input_nodes if source not in own}
    results = [node for node in inside if any(user not in own for user in node.users)]
    # The hidden state is the one result that has the form of something the layer was given.
    pairs = [(source, node) for node in results for source in given if _is_state(source) and _alike(source, node)]
    if len({source for source, _ in pairs}) != 1:
        return "what it is given and what it hands on cannot be told from other values"
    return pairs[0][0], [node for _, node in pairs]


def _is_state(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point() and node.meta.get("role") not in ("weight", "buffer")


def _alike(one: fx.Node, other: fx.Node) -> bool:
    value = other.meta.get("val")
    return isinstance(value, Tensor) and not shapes.difference(one.meta["val"], value)

"""`graphopt.export_pruned(model)`: what pruning leaves of a model, as a smaller ordinary Hugging Face model."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import ExportError, OptionError
from graphopt.prune_options import PruneHeads
from graphopt.pruning import bounds, heads, lines
from graphopt.pruning.families import Experts, Family, family_of, layers_of, matrix
from graphopt.pruning.selection import Candidate, give_up


def export_pruned(model: nn.Module, prune_heads: PruneHeads | None = None, *, keep_zeros: bool = False) -> nn.Module:
    """A smaller model of the same class, whose answers are those of `model` compiled with the same `prune_heads`.

    Dead heads and FFN channels (of mixtures: experts that the router never chooses) are left out, and those that
    `prune_heads` gives up. The result is an ordinary model: save_pretrained, from_pretrained and generate work, and its
    caches are smaller. Weights are copies in the model's dtype, on its device; the model itself stays as it is.

    keep_zeros: keep as zeros what its configuration cannot leave out (it holds one number of heads, of groups of heads
    and of channels for all layers; GPT-2 and BERT cannot have fewer heads). By default this is an ExportError, which
    names the layer, as are architectures other than `families.FAMILIES`.
    """
    if not isinstance(prune_heads, PruneHeads | None):
        raise OptionError(f"export_pruned(prune_heads={prune_heads!r}) must be a graphopt.PruneHeads or None")
    family = family_of(model)
    plan = _Plan(model, family, keep_zeros)
    with torch.no_grad():
        plan.heads(prune_heads or PruneHeads(keep=1.0, choice="norm"))
        plan.channels(prune_heads)
        plan.experts()
        return plan.build()


@dataclasses.dataclass
class _Cut:
    """The lines of one tensor to keep along `dim`; those in `zeroed` (of the old numbers) become zero."""

    dim: int
    kept: Sequence[int]
    zeroed: Sequence[int] = ()

    def of(self, tensor: Tensor) -> Tensor:
        index = torch.tensor(list(self.zeroed), device=tensor.device, dtype=torch.long)
        kept = torch.tensor(list(self.kept), device=tensor.device, dtype=torch.long)
        return tensor.index_fill(self.dim, index, 0).index_select(self.dim, kept)


class _Plan:
    """What to cut from which tensor, and what the configuration then says."""

    def __init__(self, model: Any, family: Family, keep_zeros: bool) -> None:
        self.model, self.family, self.keep_zeros = model, family, keep_zeros
        self.layers = layers_of(model, family)
        self.sizes: dict[str, int] = {}
        self.cuts: dict[str, _Cut] = {}
        self.dropped: set[str] = set()

    def heads(self, prune: PruneHeads) -> None:
        """Plan which query heads and groups of heads stay."""
        config, names = self.model.config, self.family.heads
        count = config.num_attention_heads
        groups = getattr(config, "num_key_value_heads", None) or count
        group, size = count // groups, matrix(self.layers[0][1], names.o, self.family).shape[1] // count
        chosen = self._given_up_heads(prune, count, group, size)
        gone = [_dead_heads(layer, self.family, count, group, size) | given
                for (_, layer), given in zip(self.layers, chosen, strict=True)]  # fmt: skip
        if not any(gone):
            return
        if not names.expressible:
            number = next(number for number, lost in enumerate(gone) if lost)
            self._cannot(number, f"heads {sorted(gone[number])} are not needed, but {config.model_type} derives"
                         " the size of a head from their number: its attention cannot have fewer heads")  # fmt: skip
            for number, lost in enumerate(gone):
                if chosen[number]:
                    self._cut_heads(number, range(count), lost, group, size)
            return
        living = [[[head for head in range(first, first + group) if head not in lost]
                   for first in range(0, count, group)] for lost in gone]  # fmt: skip
        left = self._even("groups of heads", [sum(map(bool, parts)) for parts in living])
        each = [len(part) or None for parts in living for part in parts]
        most = self._even("heads of each group", each, len(living[0]))
        for number, parts in enumerate(living):
            kept = _settled(parts, left, most, group)
            self._cut_heads(number, kept, gone[number], group, size)
        self.sizes |= {"num_attention_heads": left * most, "num_key_value_heads": left, "head_dim": size}

    def channels(self, prune: PruneHeads | None) -> None:
        """Plan which FFN channels stay."""
        names = self.family.channels
        if names is None:
            if prune is not None and prune.keep_channels is not None:
                raise ExportError(f"{self.model.config.model_type}: keep_channels is for FFNs without experts")
            return
        readers = [matrix(layer, names.down, self.family) for _, layer in self.layers]
        chosen: list[list[int]] = [[] for _ in readers]
        if prune is not None and prune.keep_channels is not None:
            chosen = self._asked(names.down, readers, 1, prune.keep_channels, prune)
        gone = [_dead_channels(layer, self.family) | set(given)
                for (_, layer), given in zip(self.layers, chosen, strict=True)]  # fmt: skip
        left = [reader.shape[1] - len(lost) or 1 for reader, lost in zip(readers, gone, strict=True)]
        most = self._even("FFN channels", left)
        for number, lost in enumerate(gone):
            total = readers[number].shape[1]
            kept = _filled([channel for channel in range(total) if channel not in lost], range(total), most)
            prefix = self.layers[number][0]
            self._cut(f"{prefix}.{names.down}.weight", 1, kept, lost)
            for gate in names.gates:
                self._cut_rows(f"{prefix}.{gate}", kept)
        if any(gone):
            self.sizes[names.field] = most

    def experts(self) -> None:
        """Plan which experts stay: all that the router may choose."""
        names = self.family.experts
        if names is None:
            return
        gone = [_excluded(layer, prefix, names) for prefix, layer in self.layers]
        total = getattr(self.model.config, names.field)
        most = self._even("experts", [total - len(lost) for lost in gone])
        if most < self.model.config.num_experts_per_tok:
            wanted = self.model.config.num_experts_per_tok
            raise ExportError(f"{most} experts stay, fewer than num_experts_per_tok={wanted}")
        for (prefix, _), lost in zip(self.layers, gone, strict=True):
            kept = _filled([expert for expert in range(total) if expert not in lost], range(total), most)
            if lost and len(kept) > total - len(lost):
                raise ExportError(f"{prefix}.{names.router}: its configuration has no bias that could exclude experts"
                                  f" {sorted(lost)}; exclude as many in every layer")  # fmt: skip
            for stack in (f"{names.router}.weight", *names.stacks):
                self._cut(f"{prefix}.{stack}", 0, kept)
            self.dropped.add(f"{prefix}.{names.router}.bias")
        if any(gone):
            self.sizes[names.field] = most

    def build(self) -> nn.Module:
        """The smaller model."""
        config = copy.deepcopy(self.model.config)
        for name, size in self.sizes.items():
            setattr(config, name, size)
        first = next(self.model.parameters())
        smaller: nn.Module = type(self.model)(config).to(first.dtype)
        state = {name: self.cuts[name].of(tensor) if name in self.cuts else tensor
                 for name, tensor in self.model.state_dict().items() if name not in self.dropped}  # fmt: skip
        unlike = sorted(state.keys() ^ smaller.state_dict().keys())
        if unlike:
            raise ExportError(
                f"a {type(self.model).__name__} made from the configuration alone has other weights than this model:"
                f" {', '.join(unlike[:4])}. Export a model that from_pretrained would make"
            )
        smaller.load_state_dict(state)
        required = {name: parameter.requires_grad for name, parameter in self.model.named_parameters()}
        for name, parameter in smaller.named_parameters():
            parameter.requires_grad_(required[name])
        if getattr(self.model, "generation_config", None) is not None:
            smaller.generation_config = copy.deepcopy(self.model.generation_config)
        return smaller.to(first.device).train(self.model.training)

    def _given_up_heads(self, prune: PruneHeads, count: int, group: int, size: int) -> list[set[int]]:
        names = self.family.heads
        readers = [matrix(layer, names.o, self.family) for _, layer in self.layers]
        if prune.max_error is not None:
            if not names.expressible:
                raise ExportError(f"{self.model.config.model_type} cannot have fewer heads: max_error is of no use")
            chosen: Iterable[Sequence[int]] = (_certified(layer, self.family, count, group, size, prune.max_error)
                                               for _, layer in self.layers)  # fmt: skip
        elif prune.keep is None or prune.keep == 1:
            return [set() for _ in readers]
        else:
            chosen = self._asked(names.o, readers, size, prune.keep, prune)
        # The compiled model keeps some of them where attention would fall into many pieces.
        return [set(range(count)).difference(heads.settle(given, count, group, True)) for given in chosen]

    def _asked(
        self, name: str, readers: Sequence[Tensor], size: int, keep: float, prune: PruneHeads
    ) -> list[list[int]]:
        candidates = [Candidate(f"{prefix}.{name}.weight", reader, size)
                      for (prefix, _), reader in zip(self.layers, readers, strict=True)]  # fmt: skip
        chosen = give_up(candidates, keep, prune)
        if isinstance(chosen, str):
            raise ExportError(f"export_pruned(): {chosen}")
        return chosen

    def _even(self, what: str, counts: Sequence[int | None], each: int = 1) -> int:
        """The largest count; an error where a layer has another one, unless zeros may stay."""
        known = [count for count in counts if count is not None]
        most = max(known, default=1)
        for number, count in enumerate(counts):
            if count is not None and count != most:
                self._cannot(number // each, f"{count} {what} are left, in another layer or group {most}: the"
                             f" configuration of {self.model.config.model_type} holds one number for all")  # fmt: skip
        return max(most, 1)

    def _cannot(self, number: int, why: str) -> None:
        if not self.keep_zeros:
            raise ExportError(f"{self.layers[number][0]}: {why}. Pass keep_zeros=True to keep the rest as zeros")

    def _cut_heads(self, number: int, kept: Iterable[int], gone: set[int], group: int, size: int) -> None:
        prefix, names = self.layers[number][0], self.family.heads
        kept = list(kept)
        dim = 0 if self.family.transposed else 1
        self.cuts[f"{prefix}.{names.o}.weight"] = _Cut(dim, _channels(kept, size), _channels(sorted(gone), size))
        if names.expressible:
            groups = sorted({head // group for head in kept})
            for name, which in ((names.q, kept), (names.k, groups), (names.v, groups)):
                self._cut_rows(f"{prefix}.{name}", _channels(which, size))

    def _cut_rows(self, name: str, kept: Sequence[int]) -> None:
        self._cut(f"{name}.weight", 0, kept)
        if getattr(self.model.get_submodule(name), "bias", None) is not None:
            self.cuts[f"{name}.bias"] = _Cut(0, kept)

    def _cut(self, name: str, dim: int, kept: Sequence[int], zeroed: Iterable[int] = ()) -> None:
        flipped = self.family.transposed and not name.endswith("bias")
        self.cuts[name] = _Cut(1 - dim if flipped else dim, kept, sorted(zeroed))


def _dead_heads(layer: nn.Module, family: Family, count: int, group: int, size: int) -> set[int]:
    """Heads that the output projection ignores, or whose values are zero."""
    names = family.heads
    columns = set(lines.zero_lines(matrix(layer, names.o, family), 1))
    values = matrix(layer, names.v, family)
    first = values.shape[0] - count // group * size  # of the values in a fused projection
    rows = _zero_rows(layer, names.v, family)
    return {head for head in range(count)
            if columns.issuperset(_channels([head], size))
            or rows.issuperset(first + channel for channel in _channels([head // group], size))}  # fmt: skip


def _dead_channels(layer: nn.Module, family: Family) -> set[int]:
    """FFN channels that the down projection ignores, or that are zero where the activation of zero is."""
    names = family.channels
    assert names is not None
    dead = set(lines.zero_lines(matrix(layer, names.down, family), 1))
    activation: Callable[[Tensor], Tensor] = layer.get_submodule(names.activation)
    gate, *ups = names.gates
    if not activation(torch.zeros(1)).any():
        dead |= _zero_rows(layer, gate, family)
    for up in ups:
        dead |= _zero_rows(layer, up, family)
    return dead


def _zero_rows(layer: nn.Module, name: str, family: Family) -> set[int]:
    rows = set(lines.zero_lines(matrix(layer, name, family), 0))
    bias: Any = getattr(layer.get_submodule(name), "bias", None)
    return rows if bias is None else rows.intersection(lines.zero_lines(bias, 0))


def _excluded(layer: nn.Module, prefix: str, names: Experts) -> set[int]:
    """Experts whose bias is minus infinity; the others must have none, as the exported router has none."""
    bias: Any = getattr(layer.get_submodule(names.router), "bias", None)
    if bias is None:
        return set()
    lost = set(lines.excluding_lines(bias, 0))
    if any(bias[expert] != 0 for expert in range(len(bias)) if expert not in lost):
        raise ExportError(f"{prefix}.{names.router}.bias: exported routers have none; only 0 and -inf can be left out")
    return lost


def _certified(layer: nn.Module, family: Family, count: int, group: int, size: int, limit: float) -> tuple[int, ...]:
    names = family.heads
    norm: Any = layer.get_submodule(names.norm)
    bias: Any = getattr(layer.get_submodule(names.v), "bias", None)
    block = bounds.Block((), size, group, 0, False, False, (True, False, bias is not None), names.gain_offset, limit)
    tensors = [matrix(layer, names.o, family), matrix(layer, names.v, family), norm.weight]
    return bounds.choose(block, [*tensors, *([] if bias is None else [bias])], count)


def _settled(parts: Sequence[Sequence[int]], left: int, most: int, group: int) -> list[int]:
    """The heads to keep: `left` groups of `most` heads, the living ones and as many others as that takes."""
    groups = _filled([number for number, part in enumerate(parts) if part], range(len(parts)), left)
    return [head for number in groups
            for head in _filled(parts[number], range(number * group, (number + 1) * group), most)]  # fmt: skip


def _filled(kept: Sequence[int], candidates: Iterable[int], most: int) -> list[int]:
    others = [candidate for candidate in candidates if candidate not in set(kept)]
    return sorted([*kept, *others[: most - len(kept)]])


def _channels(heads: Iterable[int], size: int) -> list[int]:
    return [head * size + channel for head in heads for channel in range(size)]

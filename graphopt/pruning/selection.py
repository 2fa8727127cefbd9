"""Which heads and channels to give up for a share that is to be kept: one order for all layers of a graph."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.prune_options import PruneHeads
from graphopt.pruning.importance import Importance
from graphopt.quantization.calibration import Calibration


@dataclasses.dataclass(frozen=True)
class Candidate:
    """The input of one linear: its weight's name, the weight as [N, K], how many channels go together."""

    name: str
    weight: Tensor
    size: int

    @property
    def count(self) -> int:
        """How many heads (or channels) there are."""
        return self.weight.shape[1] // self.size


def give_up(candidates: Sequence[Candidate], keep: float, prune: PruneHeads) -> list[list[int]] | str:
    """For each candidate the heads to leave out, at most all but one; or why there is no order."""
    budget = round((1 - keep) * sum(candidate.count for candidate in candidates))
    if prune.choice == "greedy":
        return _greedily(candidates, budget, prune)
    scores = [_scores(candidate, prune) for candidate in candidates]
    for candidate, score in zip(candidates, scores, strict=True):
        if score is None:
            return f"the calibration has not seen {candidate.name}"
    order = sorted((float(value), place, head) for place, score in enumerate(scores) if score is not None
                   for head, value in enumerate(score.tolist()))  # fmt: skip
    chosen: list[list[int]] = [[] for _ in candidates]
    for _, place, head in order:
        if budget and len(chosen[place]) < candidates[place].count - 1:
            chosen[place].append(head)
            budget -= 1
    return [sorted(heads) for heads in chosen]


def comparison(candidates: Sequence[Candidate], chosen: Sequence[Sequence[int]], keep: float, prune: PruneHeads) -> str:
    """What is given up, in words, beside random choice and the smallest norms at the same budget.

    Measured by the calibration: the share of the importance by gradient, or the mean relative squared error of the
    layers' outputs on the sampled inputs; without one by the share of the squared weights.
    """
    what = {
        Importance: "share of the importance by gradient",
        Calibration: "mean relative squared error of a layer's output",
    }
    measure = what.get(type(prune.calibration), "share of the squared weights")
    ways = {prune.choice: chosen}
    for way in ("random", "norm"):
        if way not in ways:
            other = give_up(candidates, keep, dataclasses.replace(prune, choice=way))
            ways[way] = other if not isinstance(other, str) else []
    costs = {way: _cost(candidates, gone, prune) for way, gone in ways.items()}
    count = sum(map(len, chosen))
    told = ", ".join(f"{way} {cost:.3g}" for way, cost in costs.items() if cost is not None)
    return f"{count} of {sum(candidate.count for candidate in candidates)} given up; {measure}: {told}"


def _cost(candidates: Sequence[Candidate], chosen: Sequence[Sequence[int]], prune: PruneHeads) -> float | None:
    """What giving up the chosen heads costs by the calibration; None where that has not seen a weight."""
    lost, whole = 0.0, 0.0
    for candidate, gone in zip(candidates, chosen, strict=True):
        if isinstance(prune.calibration, Calibration):
            inputs = prune.calibration.find(candidate.name)
            if inputs is None:
                return None
            lost, whole = lost + _relative_error(candidate, inputs.rows.float(), gone), whole + 1
            continue
        known = prune.calibration
        parts = (
            known.of_blocks(candidate.name, candidate.size) if isinstance(known, Importance) else _norms(candidate) ** 2
        )
        if parts is None:
            return None
        lost, whole = lost + float(parts[list(gone)].sum()), whole + float(parts.sum())
    return lost / whole if whole else 0.0


def _relative_error(candidate: Candidate, rows: Tensor, gone: Sequence[int]) -> float:
    """The squared error of the output without some heads, relative to the square of the whole output."""
    weight = candidate.weight.detach().float().cpu()
    columns = [head * candidate.size + channel for head in gone for channel in range(candidate.size)]
    error = (rows[:, columns] @ weight[:, columns].t()).square().sum()
    return float(error / (rows @ weight.t()).square().sum().clamp(min=torch.finfo(torch.float32).tiny))


def _norms(candidate: Candidate) -> Tensor:
    """Of the columns that read each head [heads]."""
    norms: Tensor = candidate.weight.detach().float().cpu().unflatten(1, (-1, candidate.size)).norm(dim=(0, 2))
    return norms


def _scores(candidate: Candidate, prune: PruneHeads) -> Tensor | None:
    if prune.choice == "gradient":
        known = prune.calibration
        return known.of_blocks(candidate.name, candidate.size) if isinstance(known, Importance) else None
    if prune.choice == "random":
        seeded = torch.Generator().manual_seed(zlib.crc32(candidate.name.encode()))
        return torch.rand(candidate.count, generator=seeded)
    return _norms(candidate)


def _greedily(candidates: Sequence[Candidate], budget: int, prune: PruneHeads) -> list[list[int]] | str:
    """Give up, one after the other, what adds least to the relative error of a layer's output on the sampled inputs."""
    grams = []
    for candidate in candidates:
        inputs = prune.calibration.find(candidate.name) if isinstance(prune.calibration, Calibration) else None
        if inputs is None:
            return f"the calibration has not seen {candidate.name}"
        grams.append(_gram(candidate, inputs.rows.float()))
    chosen: list[list[int]] = [[] for _ in candidates]
    # Adding head h to those given up adds G_hh + 2 sum of G_hs to the squared error.
    added = [gram.diagonal().clone() for gram in grams]
    for _ in range(budget):
        open_places = [place for place, candidate in enumerate(candidates) if len(chosen[place]) < candidate.count - 1]
        if not open_places:
            break
        place = min(open_places, key=lambda place: float(added[place].min()))
        head = int(added[place].argmin())
        chosen[place].append(head)
        added[place] += 2 * grams[place][head]
        added[place][head] = torch.inf
    return [sorted(heads) for heads in chosen]


def _gram(candidate: Candidate, rows: Tensor) -> Tensor:
    """Inner products [H, H] of what the heads add to the output, relative to the square of the whole output."""
    weight = candidate.weight.detach().float().cpu()
    parts = torch.einsum("rhc,nhc->hrn", rows.unflatten(1, (-1, candidate.size)),
                         weight.unflatten(1, (-1, candidate.size))).flatten(1)  # fmt: skip
    whole = (rows @ weight.t()).square().sum()
    return (parts @ parts.t() / whole).double()

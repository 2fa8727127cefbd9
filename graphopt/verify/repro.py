"""Write a failing rewrite as a program that shows the failure with torch and graphopt alone."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from graphopt import lowering, program
from graphopt.verify.cut import Pair

_CHECK = """if __name__ == "__main__":
    old = before(*inputs())
    new = after(*inputs())
    reference = wide.run_wide(before, inputs())
    found = judge.difference(list(old), list(new), reference, {exactness!r}, layout={layout!r})
    print("before:", old)
    print("after: ", new)
    raise SystemExit(str(found) if found else 0)
"""


def write(directory: Path, pair: Pair, values: list[Any], message: str) -> Path:
    """Write `repro_<pass>_<digest>.py` and return its path; tensors too large to print go to a .pt file beside it.

    The program exits with status 0 if both graphs agree, else with the difference as message and status 1.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made = pair.provenance
    digest = hashlib.sha256(f"{pair.key}{message}".encode()).hexdigest()[:8]
    path = directory / f"repro_{made.pass_name}_{digest}.py"
    rows, large = [], {}
    for index, value in enumerate(values):
        if isinstance(value, torch.Tensor) and value.numel() > program.MOST_LITERALS:
            large[str(index)] = value
            rows.append(f"        large[{str(index)!r}],")
        else:
            shown = program.tensor(value) if isinstance(value, torch.Tensor) else program.literal(value)
            rows.append(f"        {shown},")
    load = ["    large = torch.load(__file__.removesuffix('.py') + '.pt', weights_only=True)"] if large else []
    inputs = "\n".join(["def inputs():", *load, "    torch.manual_seed(0)", "    return [", *rows, "    ]"])
    if large:
        torch.save(large, path.with_suffix(".pt"))
    both = {**dict(pair.before.named_buffers()), **dict(pair.after.named_buffers())}
    constants = "\n".join(["CONSTANTS = {", *(f"    {k!r}: {program.tensor(v)}," for k, v in both.items()), "}"])
    heading = f'"""Rewrite {made.number}, by {made.pass_name}{" at " + pair.where if pair.where else ""}: {message}"""'
    path.write_text(
        program.join(
            [
                f"{heading}\n\n{program.HEADER}from graphopt.verify import judge, wide",
                program.STRIDED,
                *(text for text in dict.fromkeys(map(lowering.definitions, (pair.before, pair.after))) if text),
                *([constants] if both else []),
                inputs,
                program.function(pair.before, "before"),
                program.function(pair.after, "after"),
                _CHECK.format(exactness=pair.exactness, layout=pair.same_layout),
            ]
        )
    )
    return path

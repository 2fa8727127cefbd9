"""Translate-validate every rewrite in every architecture of the suite, and print how many there were.

    python -m tests.verification_report [--only llama,gemma3] [--kinds forward,dynamic_cache] [--json figures.json]
    python -m tests.verification_report --show docs/measured/workbench/verification.json

Each rewrite is compared with what it replaces (`verify="all"`). A row says how many rewrites one architecture had, how
many kinds of them, for how many kinds no valid inputs were found, and how many change results. Kinds are counted anew
in each graph. Exits with status 1 if a rewrite failed or a check did not run.
"""

import argparse
import json
import pathlib
import sys

from graphopt import report
from tests.suite import architectures, guarded

KINDS = (
    "forward",
    "second_batch",
    "bfloat16",
    "backward",
    "left_padding",
    "dynamic_cache",
    "static_cache",
    "own_cache",
)
DEFAULT_KINDS = ("forward", "backward", "dynamic_cache", "own_cache")
COUNTS = ("graphs", "checked", "distinct", "unchecked", "failed")


def main() -> None:
    """Read the command line; be the worker or the runner."""
    parser = argparse.ArgumentParser(description="verify='all' on tiny models of many architectures")
    parser.add_argument("--only", help="names of architectures, with commas")
    parser.add_argument(
        "--kinds", default=",".join(DEFAULT_KINDS), help=f"names of checks, with commas: {', '.join(KINDS)}"
    )
    parser.add_argument("--level", default="all", help="sample or all")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds a check may be silent")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the records")
    parser.add_argument("--show", type=pathlib.Path, help="print the table of records written before, run nothing")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        guarded.serve(lambda case: check(case, arguments.level))
        return
    if arguments.show:
        print(table(json.loads(arguments.show.read_text())))
        return
    records = []
    command = ["tests.verification_report", *sys.argv[1:], "--worker"]
    environment = {"OMP_NUM_THREADS": "1"}  # tensors are tiny: a second thread only waits for the first
    for record in guarded.run(command, _chosen(arguments), timeout=arguments.timeout, environment=environment):
        records.append(record)
        print(f"{record['case']}: {[record.get(name) for name in COUNTS]}", file=sys.stderr, flush=True)
        if arguments.json:
            arguments.json.write_text(written(records))
    print(table(records))
    bad = [record for record in records if record["status"] == "failed" or record.get("failed")]
    sys.exit(bool(bad))


def written(records: list[guarded.Record]) -> str:
    """The records as JSON, a line each."""
    return "[\n" + ",\n".join(json.dumps(record) for record in records) + "\n]\n"


def table(records: list[guarded.Record]) -> str:
    """One row an architecture with the sums over its checks, a last row with all; then what failed."""
    sums: dict[str, list[int]] = {}
    for record in records:
        row = sums.setdefault(record["case"].split(":")[0], [0] * len(COUNTS))
        sums[record["case"].split(":")[0]] = [a + record.get(name, 0) for a, name in zip(row, COUNTS, strict=True)]
    sums["all"] = [sum(column) for column in zip(*sums.values(), strict=True)]
    lines = [f"{'architecture':14}" + "".join(f"{name:>11}" for name in COUNTS)]
    lines += [f"{name:14}" + "".join(f"{count:11}" for count in counts) for name, counts in sums.items()]
    told = [f"{record['case']}: {message}" for record in records for message in record.get("failures", [])]
    return "\n".join([*lines, *told, guarded.failures(records)]).strip()


def _chosen(arguments: argparse.Namespace) -> list[str]:
    names = arguments.only.split(",") if arguments.only else list(architectures.BY_NAME)
    kinds = arguments.kinds.split(",")
    return [f"{name}:{kind}" for name in names for kind in architectures.BY_NAME[name].checks if kind in kinds]


def check(case: str, level: str) -> guarded.Record:
    """Compile and run one case, "architecture:check", with every rewrite verified; the counts, and what was undone."""
    name, kind = case.split(":")
    with report.collecting() as collected:
        architectures.check(name, kind, target="reference", verify=level)
    counts = [graph.verification or {} for graph in collected.graphs]
    undone = [f"{done.name}: {done.error[:1500]}" for graph in collected.graphs for done in graph.passes if done.error]
    sums = {name: sum(count.get(name, 0) for count in counts) for name in COUNTS[1:]}
    return {"graphs": len(collected.graphs), **sums, "failures": undone}


if __name__ == "__main__":
    main()

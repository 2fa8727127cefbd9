"""Print the table of architectures against checks, every cell guarded against crashes and hangs.

    python -m tests.suite.architecture_report --target cpu --json architectures.json
    python -m tests.suite.architecture_report --backend inductor --only llama,gemma3
"""

import argparse
import json
import os
import pathlib
import sys

from tests.suite import guarded

CACHES = ("dynamic_cache", "static_cache", "own_cache")
KINDS = ("forward", "second_batch", "bfloat16", "backward", "left_padding", *CACHES)


def main() -> None:
    """Read the command line; be the worker or the runner."""
    parser = argparse.ArgumentParser(description="tiny models of many architectures through the backend")
    parser.add_argument("--backend", default=os.environ.get("GRAPHOPT_SUITE_BACKEND", "graphopt"))
    parser.add_argument("--target", help="graphopt's target (reference, cpu, triton)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="an option of graphopt")
    parser.add_argument("--only", help="names of architectures")
    parser.add_argument("--kinds", default=",".join(KINDS), help="names of checks")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds a check may be silent")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the records")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments)
        return
    command = ["tests.suite.architecture_report", *sys.argv[1:], "--worker"]
    environment = {"GRAPHOPT_SUITE_BACKEND": arguments.backend}
    records = []
    for record in guarded.run(command, _chosen(arguments), timeout=arguments.timeout, environment=environment):
        records.append(record)
        if arguments.json:
            arguments.json.write_text(json.dumps(records, indent=1))
    print(table(records))


def table(records: list[guarded.Record]) -> str:
    """One row an architecture, one column a check: yes, NO, or - where the check does not apply."""
    cells = {tuple(record["case"].split(":")): record["status"] for record in records}
    names = list(dict.fromkeys(name for name, _ in cells))
    kinds = [kind for kind in KINDS if any(kind == other for _, other in cells)]
    said = {"passed": "yes", "failed": "NO", None: "-"}
    rows = [["architecture", *kinds]] + [
        [name, *(said[cells.get((name, kind))] for kind in kinds)] for name in names
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([*lines, f"checks that pass: {guarded.share(records)}", guarded.failures(records)])


def _chosen(arguments: argparse.Namespace) -> list[str]:
    from tests.suite import architectures

    names = arguments.only.split(",") if arguments.only else list(architectures.BY_NAME)
    kinds = arguments.kinds.split(",")
    return [f"{name}:{kind}" for name in names for kind in architectures.BY_NAME[name].checks if kind in kinds]


def _work(arguments: argparse.Namespace) -> None:
    from tests.suite import architectures

    options = {name: json.loads(value) for name, value in (item.split("=", 1) for item in arguments.option)}

    def check(case: str) -> guarded.Record:
        name, kind = case.split(":")
        architectures.check(name, kind, target=arguments.target, **options)
        return {}

    guarded.serve(check)


if __name__ == "__main__":
    main()

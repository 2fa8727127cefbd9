"""Print which instrument catches each of the planted bugs, and how small the reproducer is.

    python -m tests.planted_report [--examples 60] [--json rows.json]
    python -m tests.planted_report --show docs/measured/workbench/planted.json

verify: translation validation of the wrong rewrite; then the reproducer, as operations before -> after and elements of
its largest input. check: `check_pass` on one program, without verification. strategies: `check_pass` on random programs
(`graphopt.testing.strategies.programs`) in which the wrong pass finds something, after how many programs; "-" if none
of them broke. bisect: the rewrite is found by limiting their number.
"""

import argparse
import itertools
import json
import pathlib

import torch
from hypothesis import HealthCheck, Phase, given, settings

from graphopt.bisect import BisectError
from graphopt.errors import GraphoptError
from graphopt.testing import check_pass, strategies, trace
from tests import test_planted_bugs as planted

COLUMNS = ("verify", "reproducer", "check", "strategies", "bisect")
Row = dict[str, str]


def main() -> None:
    """Go through the bugs, a line each, and count."""
    parser = argparse.ArgumentParser(description="the table of planted bugs")
    parser.add_argument("--examples", type=int, default=60, help="random programs for each bug at most")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the rows")
    parser.add_argument("--show", type=pathlib.Path, help="print rows that were written before, run nothing")
    arguments = parser.parse_args()
    if arguments.show:
        print(table(json.loads(arguments.show.read_text())))
        return
    rows: list[Row] = []
    print(heading())
    for bug in planted.BUGS:
        torch.manual_seed(0)
        rows.append(
            {
                "bug": bug.name,
                **_verified(bug),
                "check": "yes" if planted.caught_by_check(bug) else "-",
                "strategies": _by_strategies(bug, arguments.examples),
                "bisect": _bisected(bug),
            }
        )
        print(line(rows[-1]), flush=True)
        if arguments.json:
            arguments.json.write_text("[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n")
    print(line(_counts(rows)))


def heading() -> str:
    """The names of the columns."""
    return line({"bug": "bug", **{name: name for name in COLUMNS}})


def line(row: Row) -> str:
    """One row of the table."""
    return f"{row['bug']:48}" + "".join(f"{row[name]:>14}" for name in COLUMNS)


def table(rows: list[Row]) -> str:
    """All rows, and at last how many bugs each instrument catches."""
    return "\n".join([heading(), *map(line, rows), line(_counts(rows))])


def _counts(rows: list[Row]) -> Row:
    return {"bug": f"of {len(rows)}", **{name: str(sum(row[name] != "-" for row in rows)) for name in COLUMNS}}


def _verified(bug: planted.Bug) -> dict[str, str]:
    failure = planted.caught_by_verify(bug)
    if failure is None:
        return {"verify": "-", "reproducer": "-"}
    sides = (failure.pair.before, failure.pair.after)
    sizes = [sum(node.op == "call_function" for node in side.graph.nodes) for side in sides]
    largest = max((v.numel() for v in failure.inputs.values if isinstance(v, torch.Tensor)), default=0)
    return {"verify": "yes", "reproducer": f"{sizes[0]} -> {sizes[1]}, {largest}"}


def _by_strategies(bug: planted.Bug, examples: int) -> str:
    """The number of the random program on which `check_pass` fails."""
    count = itertools.count(1)
    tried = 0

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategies.programs())
    def test(program: strategies.Program) -> None:
        nonlocal tried
        tried = next(count)
        found = trace(program.function, [bug.pass_], dynamic=bug.dynamic)
        found(*(value.clone() for value in program.inputs))
        if any(graph.rewrites for graph in found.graphs):
            check_pass(bug.pass_, program.function, program.inputs, dynamic=bug.dynamic)

    try:
        test()
    except (AssertionError, RuntimeError, GraphoptError):  # Dynamo makes a RuntimeError of what a pass raises
        return str(tried)
    return "-"


def _bisected(bug: planted.Bug) -> str:
    try:
        return f"{planted.found_by_bisect(bug).runs} runs"
    except BisectError:
        return "-"


if __name__ == "__main__":
    main()

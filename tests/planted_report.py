"""Print which instrument catches each of the planted bugs, and how small the reproducer is.

    python -m tests.planted_report [--examples 30]

verify: translation validation of the wrong rewrite; then the reproducer, as operations before -> after and elements of
its largest input. check: `check_pass` on one program, without verification. strategies: `check_pass` on random programs
(`graphopt.testing.strategies.programs`), after how many; "-" if none of them had the rewrite break anything. bisect:
the rewrite is found by limiting their number.
"""

import argparse
import itertools

import torch
from hypothesis import HealthCheck, Phase, given, settings

from graphopt.bisect import BisectError
from graphopt.errors import GraphoptError
from graphopt.testing import check_pass, strategies
from tests import test_planted_bugs as planted


def main() -> None:
    """Go through the bugs, a line each, and count."""
    parser = argparse.ArgumentParser(description="the table of planted bugs")
    parser.add_argument("--examples", type=int, default=30, help="random programs for each bug at most")
    arguments = parser.parse_args()
    columns = ("verify", "reproducer", "check", "strategies", "bisect")
    print(f"{'bug':48}" + "".join(f"{name:>14}" for name in columns))
    caught = dict.fromkeys(columns, 0)
    for bug in planted.BUGS:
        torch.manual_seed(0)
        cells = {
            **_verified(bug),
            "check": "yes" if planted.caught_by_check(bug) else "-",
            "strategies": _by_strategies(bug, arguments.examples),
            "bisect": _bisected(bug),
        }
        for name in columns:
            caught[name] += cells[name] != "-"
        print(f"{bug.name:48}" + "".join(f"{cells[name]:>14}" for name in columns), flush=True)
    print(f"{f'of {len(planted.BUGS)}':48}" + "".join(f"{caught[name]:>14}" for name in columns))


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
    @given(strategies.programs(most_steps=4))
    def test(program: strategies.Program) -> None:
        nonlocal tried
        tried = next(count)
        check_pass(bug.pass_, program.function, program.inputs)

    try:
        test()
    except (AssertionError, RuntimeError, GraphoptError):
        return str(tried)
    return "-"


def _bisected(bug: planted.Bug) -> str:
    try:
        return f"{planted.found_by_bisect(bug).runs} runs"
    except BisectError:
        return "-"


if __name__ == "__main__":
    main()

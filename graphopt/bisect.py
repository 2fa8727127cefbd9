"""Find the rewrite that breaks a program, by running it again and again with fewer rewrites.

    graphopt bisect -- python generate.py

The number of rewrites in each compiled graph is limited through GRAPHOPT_LIMIT: with 0 the program must be right,
without limit wrong, and halving the distance leads to the first rewrite with which it is wrong (as `git bisect`
does for commits). Its pass is then confirmed by leaving only that pass out through GRAPHOPT_DISABLE.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt import text
from graphopt.errors import GraphoptError

_LIMIT, _DISABLE, _DUMP = "GRAPHOPT_LIMIT", "GRAPHOPT_DISABLE", "GRAPHOPT_DUMP"


class BisectError(GraphoptError):
    """The program is wrong without any rewrite, or right with all of them: there is no rewrite to find."""


@dataclasses.dataclass(frozen=True)
class Result:
    """What one run of the program gave."""

    status: int
    output: str


@dataclasses.dataclass(frozen=True)
class Culprit:
    """The rewrite found: its number, its pass, whether leaving the pass out mends the program, and what it changes.

    changes: for each compiled graph that the rewrite changes, the difference of the graph as text.
    """

    number: int
    pass_name: str
    confirmed: bool
    changes: tuple[str, ...]
    runs: int

    def __str__(self) -> str:
        mended = "mends" if self.confirmed else "does not mend"
        head = (
            f"rewrite {self.number}, made by pass {self.pass_name}, breaks the program (found in {self.runs} runs);"
            f" {_DISABLE}={self.pass_name} {mended} it, {_LIMIT}={self.number - 1} is the last good limit"
        )
        return "\n\n".join([head, *self.changes])


@dataclasses.dataclass
class _Bisection:
    execute: Callable[[Mapping[str, str]], Result]
    expected: Result | None
    compare_output: bool
    runs: int = 0

    def is_bad(self, **settings: str) -> bool:
        self.runs += 1
        result = self.execute(settings)
        if self.compare_output and self.expected is not None:
            return result != self.expected
        return result.status != 0


def run(
    command: Sequence[str],
    *,
    compare_output: bool = False,
    timeout: float | None = None,
    progress: Callable[[str], None] = lambda message: None,
) -> Culprit:
    """Bisect `command`, a program that exits with another status than 0 when it is wrong.

    compare_output: it is wrong when its standard output or status is not that of a run without rewrites.
    timeout: seconds for one run; a run that takes longer counts as wrong. progress: told what is being tried.
    Raises BisectError if there is nothing to find.
    """

    def execute(settings: Mapping[str, str]) -> Result:
        progress(" ".join(f"{name}={value}" for name, value in settings.items() if name != _DUMP) or "no limit")
        environment = {**os.environ, **settings}
        try:
            done = subprocess.run(
                list(command), env=environment, capture_output=True, text=True, timeout=timeout, check=False
            )
        except subprocess.TimeoutExpired:
            return Result(124, "")
        return Result(done.returncode, done.stdout)

    return search(execute, compare_output=compare_output)


def search(execute: Callable[[Mapping[str, str]], Result], *, compare_output: bool = False) -> Culprit:
    """As `run`, for any way to execute the program under the given environment variables."""
    bisection = _Bisection(execute, None, compare_output)
    with tempfile.TemporaryDirectory(prefix="graphopt-bisect-") as folder:
        scratch = Path(folder)
        bisection.expected = execute({_LIMIT: "0"})
        bisection.runs += 1
        if not compare_output and bisection.expected.status != 0:
            raise BisectError(
                f"the program is wrong (status {bisection.expected.status}) without any rewrite ({_LIMIT}=0): the cause"
                " is not a pass; try target='inductor' or target='reference' to leave out graphopt's kernels"
            )
        if not bisection.is_bad(**{_DUMP: str(scratch / "all")}):
            raise BisectError("the program is right with all rewrites: there is nothing to find")
        bad = _first_bad(bisection, _most_rewrites(scratch / "all"))
        for limit in (bad - 1, bad):
            execute({_LIMIT: str(limit), _DUMP: str(scratch / str(limit))})
            bisection.runs += 1
        changed = _changes(scratch / str(bad - 1), scratch / str(bad))
        if not changed:
            raise BisectError(
                f"limit {bad} breaks the program but changes no graph: two runs do not give the same answer"
            )
        culprits = dict.fromkeys(name for name, _ in changed)
        mending = [name for name in culprits if not bisection.is_bad(**{_DISABLE: _also_disabled(name)})]
        name = mending[0] if mending else next(iter(culprits))
        diffs = tuple(diff for maker, diff in changed if maker == name)
        return Culprit(bad, name, bool(mending), diffs, bisection.runs)


def _first_bad(bisection: _Bisection, most: int) -> int:
    """The smallest limit that is bad; 0 is good and `most` is bad."""
    good, bad = 0, most
    while bad - good > 1:
        middle = (good + bad) // 2
        if bisection.is_bad(**{_LIMIT: str(middle)}):
            bad = middle
        else:
            good = middle
    return bad


def _also_disabled(name: str) -> str:
    return ",".join(part for part in (os.environ.get(_DISABLE, ""), name) if part)


def _reports(folder: Path) -> dict[str, dict[str, Any]]:
    return {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("graph_*/report.json"))}


def _most_rewrites(folder: Path) -> int:
    counts = [sum(int(made["rewrites"]) for made in report["passes"]) for report in _reports(folder).values()]
    if not any(counts):
        raise BisectError(
            "graphopt made no rewrite in this program, or did not compile anything: does it call"
            " torch.compile(..., backend='graphopt') without options that override the environment?"
        )
    return max(counts)


def _changes(good: Path, bad: Path) -> list[tuple[str, str]]:
    """For each graph that the two dumps differ in: the pass that made one rewrite more, and the difference."""
    before, after = _reports(good), _reports(bad)
    found = []
    for graph in sorted(before.keys() & after.keys()):
        counts = [{made["name"]: made["rewrites"] for made in report[graph]["passes"]} for report in (before, after)]
        more = [name for name, count in counts[1].items() if count > counts[0].get(name, 0)]
        texts = [sorted((folder / graph).glob("*.txt"))[-1].read_text() for folder in (good, bad)]
        if more:
            found.append((more[0], f"{graph}, pass {more[0]}:\n{text.diff(texts[0], texts[1])}"))
    return found

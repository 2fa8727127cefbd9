"""Run many cases in worker processes, so that a crash or a hang of one is a record and not the end."""

import collections
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

Record = dict[str, Any]
# A worker is replaced after this many cases: compiled code is never unloaded.
CASES_PER_WORKER = 250
# Importing torch and its database may take as long as a slow case.
START = 90.0


def run(command: list[str], cases: list[str], *, timeout: float, environment: dict[str, str]) -> Iterator[Record]:
    """Yield one record for every case, in order, whatever happens to the processes that run them.

    `command` starts a worker that calls `serve`; a case silent for `timeout` seconds counts as a hang.
    """
    pending = list(cases)
    while pending:
        for record in _one_worker(command, pending[:CASES_PER_WORKER], timeout, environment):
            done = len(cases) - len(pending) + 1
            pending.pop(0)
            if record["status"] == "failed":
                print(f"[{done}/{len(cases)}] {record['case']}: {record['reason']}", file=sys.stderr, flush=True)
            yield record


def serve(check: Callable[[str], Record]) -> None:
    """Be the worker: run the cases named on the standard input, one line of JSON each on the standard output.

    `check` returns what is to be recorded of a case that passed, and raises when it failed.
    """
    for case in sys.stdin.read().split():
        try:
            record = {"status": "passed", "reason": "", "message": "", **check(case)}
        except Exception as error:  # any failure of a case is a record
            reason = getattr(error, "kind", type(error).__name__)
            notes = " | ".join(getattr(error, "__notes__", []))
            record = {"status": "failed", "reason": reason, "message": " ".join(f"{error} | {notes}".split())[:1500]}
        print(json.dumps({"case": case, **record}), flush=True)


def failures(records: list[Record]) -> str:
    """The failed records grouped by reason, as text."""
    groups = collections.defaultdict(list)
    for record in records:
        if record["status"] == "failed":
            groups[record["reason"]].append(record)
    lines = []
    for reason, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"{reason} ({len(group)})")
        lines.extend(f"  {record['case']}: {record['message'][:200]}" for record in group)
    return "\n".join(lines)


def share(records: list[Record]) -> str:
    """How many of the records that count passed."""
    counted = [record for record in records if record["status"] != "vacuous"]
    passed = sum(record["status"] == "passed" for record in counted)
    return f"{passed} of {len(counted)} ({100 * passed / max(1, len(counted)):.2f} %)"


def _one_worker(
    command: list[str], cases: list[str], timeout: float, environment: dict[str, str]
) -> Iterator[Record]:
    """Records of one process; ends early, with a record of the culprit, when the process dies or hangs."""
    process = subprocess.Popen(
        [sys.executable, "-m", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "TORCHINDUCTOR_COMPILE_THREADS": "1", **environment},
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n".join(cases))
    process.stdin.close()
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
    left = list(cases)
    patience = timeout + START
    try:
        while left:
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                yield _lost(left[0], "hang", f"silent for {patience:.0f} s")
                return
            if not line:
                yield _lost(left[0], "crash", f"the process ended with status {process.wait()}")
                return
            if line.startswith('{"case"'):
                patience = timeout
                left.pop(0)
                yield json.loads(line)
    finally:
        process.kill()
        process.wait()


def _pump(stream: Any, lines: "queue.Queue[str]") -> None:
    for line in stream:
        lines.put(line)
    lines.put("")


def _lost(case: str, reason: str, message: str) -> Record:
    return {"case": case, "status": "failed", "reason": reason, "message": message}

"""Run every operator case guarded against crashes and hangs, and write the share that passes with all failures.

    python -m tests.suite.opinfo_report --target cpu --json opinfo.json
    python -m tests.suite.opinfo_report --backend inductor --kinds forward,backward --shard 0/4

The cases run in a worker process. When it dies or is silent for `--timeout` seconds the case at hand is recorded as
a crash or a hang, and a new worker goes on with the next one.
"""

import argparse
import collections
import json
import os
import pathlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

Record = dict[str, Any]
# A worker is replaced after this many cases: compiled code is never unloaded.
CASES_PER_WORKER = 250


def main() -> None:
    """Read the command line; be the worker or the runner."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backend", default=os.environ.get("GRAPHOPT_SUITE_BACKEND", "graphopt"))
    parser.add_argument("--target", help="graphopt's target (reference, cpu, triton)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="an option of graphopt")
    parser.add_argument("--kinds", help="forward,backward,inplace,noncontiguous,dynamic")
    parser.add_argument("--dtypes", help="float32,bfloat16,int64,bool")
    parser.add_argument("--ops", help="only operators whose name contains one of these words")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th case, from the I-th")
    parser.add_argument("--samples", type=int, default=6, help="samples a case, spread over all there are")
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds a case may be silent")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the records")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments)
        return
    records = []
    for record in run(arguments):
        records.append(record)
        if arguments.json:
            arguments.json.write_text(json.dumps(records, indent=1))
    print(summary(records))


def run(arguments: argparse.Namespace) -> Iterator[Record]:
    """Yield one record for every chosen case, whatever happens to the process that runs it."""
    pending = _chosen(arguments)
    total = len(pending)
    done = 0
    while pending:
        for record in _one_worker(arguments, pending[:CASES_PER_WORKER]):
            done += 1
            pending.remove(record["case"])
            if sys.stderr.isatty() or record["status"] not in ("passed", "vacuous"):
                print(f"[{done}/{total}] {record['case']}: {record['status']} {record['reason']}", file=sys.stderr)
            yield record


def summary(records: list[Record]) -> str:
    """The share passing and the failures grouped by reason, as text."""
    counted = [record for record in records if record["status"] != "vacuous"]
    passed = [record for record in counted if record["status"] == "passed"]
    lines = [f"{len(passed)} of {len(counted)} cases pass ({_percent(passed, counted)})"]
    lines.append(f"{sum(record['graphs'] == 0 for record in passed)} of them compiled no graph")
    for kind in sorted({record["kind"] for record in counted}):
        chosen = [record for record in counted if record["kind"] == kind]
        good = [record for record in chosen if record["status"] == "passed"]
        lines.append(f"  {kind}: {len(good)} of {len(chosen)} ({_percent(good, chosen)})")
    operators = {record["op"] for record in counted}
    broken = {record["op"] for record in counted if record["status"] != "passed"}
    lines.append(f"{len(operators) - len(broken)} of {len(operators)} operators pass all their cases")
    groups = collections.defaultdict(list)
    for record in counted:
        if record["status"] != "passed":
            groups[record["reason"]].append(record)
    for reason, group in sorted(groups.items(), key=lambda item: -len(item[1])):
        lines.append(f"{reason} ({len(group)})")
        lines.extend(f"  {record['case']}: {record['message'][:160]}" for record in group)
    return "\n".join(lines)


def _percent(part: list[Record], whole: list[Record]) -> str:
    return f"{100 * len(part) / max(1, len(whole)):.2f} %"


def _chosen(arguments: argparse.Namespace) -> list[str]:
    from tests.suite import opinfo

    index, count = (int(part) for part in arguments.shard.split("/"))
    kinds = (arguments.kinds or ",".join(opinfo.KINDS)).split(",")
    dtypes = arguments.dtypes.split(",") if arguments.dtypes else None
    words = arguments.ops.split(",") if arguments.ops else [""]
    chosen = [
        str(case)
        for case in opinfo.cases()
        if case.kind in kinds
        and (dtypes is None or str(case.dtype).removeprefix("torch.") in dtypes)
        and any(word in case.op for word in words)
    ]
    return chosen[index::count]


def _one_worker(arguments: argparse.Namespace, cases: list[str]) -> Iterator[Record]:
    """Records of one worker process; ends early, with a record of the culprit, when the process dies or hangs."""
    command = [sys.executable, "-m", "tests.suite.opinfo_report", "--worker", "--samples", str(arguments.samples)]
    if arguments.target:
        command += ["--target", arguments.target]
    for option in arguments.option:
        command += ["--option", option]
    environment = {**os.environ, "GRAPHOPT_SUITE_BACKEND": arguments.backend}
    environment.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    )
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write("\n".join(cases))
    process.stdin.close()
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_pump, args=(process.stdout, lines), daemon=True).start()
    left = list(cases)
    # Importing torch and its database may take as long as a slow case.
    patience = arguments.timeout + 60.0
    try:
        while left:
            started = time.monotonic()
            try:
                line = lines.get(timeout=patience)
            except queue.Empty:
                yield _lost(left[0], "hang", f"silent for {time.monotonic() - started:.0f} s")
                return
            patience = arguments.timeout
            if not line:
                yield _lost(left[0], "crash", f"the process ended with status {process.wait()}")
                return
            if not line.startswith('{"case"'):
                continue
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
    op, kind, dtype = case.rsplit("-", 2)
    return {"case": case, "op": op, "kind": kind, "dtype": dtype, "status": "failed", "samples": 0, "graphs": 0,
            "reason": reason, "message": message}  # fmt: skip


def _work(arguments: argparse.Namespace) -> None:
    """Run the cases named on the standard input, one line of JSON each on the standard output."""
    import torch._inductor.config

    from tests.suite import opinfo

    # Eager's own random numbers, where a backend builds on Inductor; without it no random operator can agree.
    torch._inductor.config.fallback_random = True
    options = {name: json.loads(value) for name, value in (item.split("=", 1) for item in arguments.option)}
    for text in sys.stdin.read().split():
        case = opinfo.Case.parse(text)
        try:
            outcome = opinfo.check(case, target=arguments.target, most=arguments.samples, **options)
        except Exception as error:
            reason = getattr(error, "kind", type(error).__name__)
            notes = " | ".join(getattr(error, "__notes__", []))
            message = " ".join(f"{error} | {notes}".split())[:1500]
            outcome = opinfo.Outcome("failed", reason=reason, message=message)
        record = {"case": text, "op": case.op, "kind": case.kind, "dtype": text.rsplit("-", 1)[1],
                  **opinfo.dataclasses.asdict(outcome)}  # fmt: skip
        print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()

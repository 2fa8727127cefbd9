"""Run every operator case guarded against crashes and hangs; print the share that passes and all failures.

    python -m tests.suite.opinfo_report --target cpu --json opinfo.json
    python -m tests.suite.opinfo_report --backend inductor --kinds forward,backward --shard 0/4
"""

import argparse
import json
import os
import pathlib
import sys

from tests.suite import guarded


def main() -> None:
    """Read the command line; be the worker or the runner."""
    parser = argparse.ArgumentParser(description="operators of PyTorch's database through the backend")
    parser.add_argument("--backend", default=os.environ.get("GRAPHOPT_SUITE_BACKEND", "graphopt"))
    parser.add_argument("--target", help="graphopt's target (reference, cpu, triton)")
    parser.add_argument("--option", action="append", default=[], metavar="NAME=JSON", help="an option of graphopt")
    parser.add_argument("--kinds", help="forward,backward,inplace,noncontiguous,dynamic")
    parser.add_argument("--dtypes", help="float32,bfloat16,int64,bool")
    parser.add_argument("--ops", help="only operators whose name contains one of these words")
    parser.add_argument("--shard", default="0/1", help="I/N: every N-th case, from the I-th")
    parser.add_argument("--samples", type=int, default=6, help="samples a case, spread over all there are")
    parser.add_argument("--timeout", type=float, default=180.0, help="seconds a case may be silent")
    parser.add_argument("--json", type=pathlib.Path, help="where to write the records")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        _work(arguments)
        return
    command = ["tests.suite.opinfo_report", *sys.argv[1:], "--worker"]
    environment = {"GRAPHOPT_SUITE_BACKEND": arguments.backend}
    records = []
    for record in guarded.run(command, _chosen(arguments), timeout=arguments.timeout, environment=environment):
        records.append(record)
        if arguments.json:
            arguments.json.write_text(json.dumps(records, indent=1))
    print(summary(records))


def summary(records: list[guarded.Record]) -> str:
    """The share passing, in all and by kind of call, and the failures grouped by reason, as text."""
    split = [(record, *record["case"].rsplit("-", 2)) for record in records]
    lines = [f"cases that pass: {guarded.share(records)}"]
    for chosen in sorted({kind for _, _, kind, _ in split}):
        lines.append(f"  {chosen}: {guarded.share([record for record, _, kind, _ in split if kind == chosen])}")
    operators = {op for record, op, _, _ in split if record["status"] != "vacuous"}
    broken = {op for record, op, _, _ in split if record["status"] == "failed"}
    lines.append(f"operators that pass all their cases: {len(operators) - len(broken)} of {len(operators)}")
    lines.append(f"cases that pass without a graph: {sum(record.get('graphs') == 0 for record in records)}")
    return "\n".join([*lines, guarded.failures(records)])


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


def _work(arguments: argparse.Namespace) -> None:
    import torch._inductor.config

    from tests.suite import opinfo

    # Eager's own random numbers for plain Inductor too; without this no random operator can agree.
    torch._inductor.config.fallback_random = True
    options = {name: json.loads(value) for name, value in (item.split("=", 1) for item in arguments.option)}

    def check(text: str) -> guarded.Record:
        outcome = opinfo.check(opinfo.Case.parse(text), target=arguments.target, most=arguments.samples, **options)
        return {"status": outcome.status, "samples": outcome.samples, "graphs": outcome.graphs}

    guarded.serve(check)


if __name__ == "__main__":
    main()

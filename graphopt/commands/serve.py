"""A worker's own side: load a model under one system, answer, run works. `worker.py` starts it."""

from __future__ import annotations

import dataclasses
import gc
import resource
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from graphopt import report
from graphopt.commands.figures import Cost, PassWork
from graphopt.commands.models import LoadedModel, ModelSource, load_model
from graphopt.commands.systems import System
from graphopt.commands.works import Answers, Tokens, Work, WorkRequest, make_work
from graphopt.pipeline import PassReport
from graphopt.runtime.counters import counters


class Server:
    """What a worker can be asked for. Every method's arguments and result go through a pipe."""

    def __init__(self, pipe: Connection) -> None:
        self.pipe = pipe
        self.loaded: LoadedModel
        self.work: Work
        self.graphs: list[report.GraphReport] = []

    def load(self, source: ModelSource, dtype: str, system: System) -> int:
        """Load the model and compile it lazily. Returns the bytes held then; the peak counts from here."""
        torch.manual_seed(0)
        loaded = load_model(source, dtype)
        self.loaded = dataclasses.replace(loaded, model=system.prepared(loaded.model, source))
        gc.collect()
        return _reset_peak()

    def chat(self, message: str) -> list[list[int]]:
        """The token ids of a chat prompt, as one row."""
        turns = [{"role": "user", "content": message}]
        ids = self.loaded.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
        return [list(ids["input_ids"])]

    def answer(self, prompt: list[list[int]], new_tokens: int, say: bool) -> list[int]:
        """Plain greedy `generate`; the text is told to the parent as it is made. Returns the new tokens."""
        from transformers import TextStreamer

        ids = torch.tensor(prompt)
        streamer = TextStreamer(self.loaded.tokenizer, skip_prompt=True, skip_special_tokens=True)
        streamer.on_finalized_text = lambda text, stream_end=False: self.pipe.send(("said", text))
        with report.collecting() as collected:
            output = self.loaded.model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=new_tokens,
                do_sample=False,
                streamer=streamer if say else None,
            )
        self.graphs += collected.graphs
        return [int(token) for token in output[0, ids.shape[1] :]]

    def prepare(self, request: WorkRequest) -> Cost:
        """Make a work on the loaded model."""
        self.work = make_work(self.loaded.model, self.loaded.tokenizer, request)
        return self.work.cost()

    def check(self, forced: Tokens | None) -> Answers:
        """Run the work once from the start (this compiles) and return what it answered."""
        answers = self.work.check(forced)
        self.work.begin()
        self.work.step()
        return answers

    def steps(self, count: int) -> list[float]:
        """Milliseconds of each of the next steps."""
        return [1e3 * self.work.step() for _ in range(count)]

    def copied_per_token(self, count: int) -> float | None:
        """Bytes of cache that `count` more steps copied, for each; None where the cache's own code did it unseen."""
        if not counters["graphs"]:
            return None
        before = counters["kv_bytes_copied"]
        for _ in range(count):
            self.work.step()
        return (counters["kv_bytes_copied"] - before) / count

    def pass_work(self) -> list[PassWork]:
        """What graphopt's passes did while this worker answered, in order; idle ones left out."""
        reports: dict[str, list[PassReport]] = {}
        for graph in self.graphs:
            for done in graph.passes:
                reports.setdefault(done.name, []).append(done)
        return [
            PassWork(
                name,
                done[0].stage,
                done[0].exactness,
                sum(each.rewrites for each in done),
                sum(each.nodes_before - each.nodes_after for each in done),
                1e3 * sum(each.seconds for each in done),
            )
            for name, done in reports.items()
            if any(each.rewrites for each in done)
        ]

    def peak(self) -> int:
        """The most bytes that the process has held since the model was loaded."""
        return _memory("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reset_peak() -> int:
    """Let the kernel count the peak of resident memory from now on. Returns what is resident.

    getrusage's own peak can't be set back, and starts with that of the process which started this one.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass  # not allowed here: the peak then includes the loading of the model, for every system alike
    return _memory("VmRSS")


def _memory(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), 0)


def main() -> None:
    """Serve the pipe whose file descriptor is the first argument until its other end is closed."""
    pipe = Connection(int(sys.argv[1]))
    server = Server(pipe)
    while True:
        try:
            name, arguments = pipe.recv()
        except EOFError:
            return
        try:
            result: Any = getattr(server, name)(*arguments)
            pipe.send(("done", result))
        except Exception:
            pipe.send(("failed", traceback.format_exc(limit=-12)))


if __name__ == "__main__":
    main()

"""Whoever looks on while a graph is compiled: the dump, `explain`, and the lines of `debug` on standard error.

debug=1  a line for each pass: rewrites, nodes before and after, milliseconds; why it was undone
debug=2  also how each operation is lowered and why others declined, and what each pass refused
debug=3  also what each pass changed, as a difference of graphs
debug=4  also the generated kernels
"""

from __future__ import annotations

import dataclasses
import json
import sys

from torch import fx

from graphopt import kernel_sources, report, text
from graphopt.dump import Dump
from graphopt.lowering import Lowered, users_kernels
from graphopt.options import Options
from graphopt.study import Studying


class Watchers:
    """Those that watch one graph; for a graph that nobody watches everything here does nothing."""

    def __init__(self, graph_module: fx.GraphModule, graph_report: report.GraphReport, options: Options) -> None:
        collecting = report.collector()
        roofline = collecting.roofline if collecting is not None else None
        self._report, self._debug = graph_report, options.debug
        self._dump = Dump(options.dump) if options.dump else None
        self._studying = Studying(graph_module, roofline, options.cost_model) if roofline is not None else None
        self._last = ""
        self._say(1, f"{graph_report.kind} graph of {graph_report.nodes} nodes, target {graph_report.target}")
        self.after_pass("capture", graph_module)

    def after_pass(self, name: str, graph_module: fx.GraphModule) -> None:
        """The graph after "capture", or after a pass that changed it."""
        if self._dump is not None:
            self._dump.graph(name, graph_module)
        if self._studying is not None:
            self._studying.record(name, graph_module)
        if self._debug >= 3:
            rendered = text.render(graph_module, names="node", comments=True)
            self._say(3, f"after {name}:\n{text.diff(self._last, rendered) if self._last else rendered}")
            self._last = rendered

    def after_passes(self, graph_module: fx.GraphModule) -> None:
        """The graph as it goes to be lowered; the report has what the passes did."""
        for done in self._report.passes:
            counts = f"{done.rewrites} rewrites, {done.nodes_before} -> {done.nodes_after} nodes"
            undone = f", undone: {done.error}" if done.error else ""
            self._say(1, f"{done.stage}/{done.name}: {counts}, {done.seconds * 1e3:.1f} ms{undone}")
            for note in done.notes:
                self._say(1, f"    {note}")
            for refusal in done.refusals:
                self._say(2, f"    refused %{refusal.node}: {refusal.reason} {refusal.where}".rstrip())
        if self._watches_kernels():
            self._report.kernels = users_kernels(graph_module)
        if self._studying is not None:
            self._report.study = self._studying.finish(graph_module)

    def after_lowering(self, lowered: Lowered) -> None:
        """What the graph became; the report is complete but for the kernels."""
        for choice in lowered.choices:
            declined = "".join(f"; {name} declined: {reason}" for name, reason in choice.declined)
            self._say(2, f"%{choice.node} {choice.op}: {choice.lowering}{declined}")
        for what, reason in lowered.left_out:
            self._say(1, f"left to torch: {what}: {reason}")
        if not self._watches_kernels():
            return
        self._report.kernels += [*lowered.kernels, *kernel_sources.of_inductor(lowered.artifact.source)]
        for kernel in self._report.kernels:
            self._say(4, f"kernel {kernel.name}:\n{kernel.source}")
        if self._dump is not None:
            for kernel in self._report.kernels:
                self._dump.kernel(f"{kernel.name}.{'cpp' if kernel.language == 'cpp' else 'py'}", kernel.source)
            plain = dataclasses.replace(self._report, kernels=[], study=None)
            self._dump.report(json.dumps(dataclasses.asdict(plain), indent=1, default=str))

    def _watches_kernels(self) -> bool:
        return self._dump is not None or self._studying is not None or self._debug >= 4

    def _say(self, level: int, message: str) -> None:
        if self._debug >= level:
            print("graphopt:", message, file=sys.stderr, flush=True)

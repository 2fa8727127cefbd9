"""Show what is being done and for how long: a spinner and a clock on a terminal, lines in a log."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console

Step = Callable[[str], contextlib.AbstractContextManager[Callable[[str], None]]]


def steps(console: Console) -> Step:
    """A function that shows one step for as long as its `with` block runs; the block may retitle it."""

    @contextlib.contextmanager
    def step(title: str) -> Iterator[Callable[[str], None]]:
        started = time.perf_counter()
        if not console.is_terminal:
            yield lambda _: None
        else:
            from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
            with Progress(*columns, console=console, transient=True) as progress:
                task = progress.add_task(title, total=None)
                yield lambda text: progress.update(task, description=text)
        console.print(f"[green]✓[/] {title} [dim]{time.perf_counter() - started:.1f} s[/]", highlight=False)

    return step

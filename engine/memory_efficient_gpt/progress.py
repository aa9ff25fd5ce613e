"""Progress bars for a person at a terminal, one line for a log file.

Purpose: show loads and batches as they go, and where a load's time went.
Does not know: what is loaded or computed.
Invariant: prints to stderr, and only if that is a terminal or the caller insists.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def _on_terminal() -> bool:
    return sys.stderr.isatty()


class PhaseClock:
    """Seconds that each phase of a load took, from what the load tells of its progress.

    Phases that differ in their last word only (the layer that is quantized) are one.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._phase, self._began_s = "", clock()

    def tell(self, phase: str) -> None:
        """`phase` begins now, if it has not before."""
        name = phase.split(" ", 1)[0] if phase.startswith("quantizing ") else phase
        if name != self._phase:
            self._end()
            self._phase = name

    def summary(self) -> str:
        """`loading weights 1.20 s, preparing the cache 0.31 s`: what took 0.01 s or more."""
        self._end()
        lasting = ((name, seconds) for name, seconds in self._seconds.items() if seconds >= 0.005)
        return ", ".join(f"{name} {seconds:.2f} s" for name, seconds in lasting)

    def _end(self) -> None:
        now = self._clock()
        if self._phase:
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + now - self._began_s
        self._began_s = now


@contextmanager
def load_bar(name: str) -> Iterator[Callable[[str, float], None] | None]:
    """A bar over a load's phases; yields the callback that `Engine.load` takes, None off a terminal."""
    if not _on_terminal():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(f"loading {name}", total=1.0)
        yield lambda phase, done: bar.update(task, description=f"{name}: {phase}", completed=done)


@contextmanager
def batch_bar(total: int, *, shown: bool) -> Iterator[Progress | None]:
    """A bar over the prompts of a batch; None when it isn't shown."""
    if not (shown and _on_terminal()):
        yield None
        return
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    with Progress(*Progress.get_default_columns(), MofNCompleteColumn(), console=Console(stderr=True)) as bar:
        bar.add_task("generating", total=total)
        yield bar

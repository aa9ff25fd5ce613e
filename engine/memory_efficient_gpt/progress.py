"""Progress bars for a person at a terminal; nothing at all for a log file.

Purpose: show loads and batches as they go.
Does not know: what is loaded or computed.
Invariant: prints to stderr, and only if that is a terminal or the caller insists.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress


def _on_terminal() -> bool:
    return sys.stderr.isatty()


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

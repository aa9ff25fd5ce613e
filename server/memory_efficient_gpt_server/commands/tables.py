"""Tables for terminals and pipes.

Purpose: rows of text in aligned columns, and what their cells say.
Does not know: what the rows are about.
Invariant: no cell can move the cursor or begin a line: control characters become spaces.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Final

UNKNOWN: Final = "-"


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """One line for each row. left: which columns are text; the others are aligned as numbers."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if number in left else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def size(num_bytes: int) -> str:
    """In GiB or MiB."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def one_line(text: str) -> str:
    """Text from elsewhere, as a cell may hold it."""
    return " ".join("".join(c if c.isprintable() else " " for c in text).split())

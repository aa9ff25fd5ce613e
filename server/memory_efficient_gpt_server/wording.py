"""How values that others sent appear in messages.

Purpose: a value as its sender wrote it, cut to a length that a message can bear.
Does not know: what is wrong with the value.
Invariant: never raises, and what it returns is short whatever it is given.
"""

from __future__ import annotations

import json
from typing import Final

MOST_CHARACTERS: Final = 60


def short(value: object) -> str:
    """A value as JSON, about."""
    some = value[:MOST_CHARACTERS] if isinstance(value, str | list | bytes) else value
    try:
        text = json.dumps(some, ensure_ascii=False, default=repr)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints; a value that is deep
        text = f"a value of type {type(value).__name__}"
    return clipped(text, MOST_CHARACTERS)


def clipped(text: str, limit: int) -> str:
    """`text`, or its beginning and an ellipsis."""
    return text if len(text) <= limit else text[:limit] + "..."

"""What a person, or a program, sees of a server's models.

Purpose: a table of states and bytes, or all of it as JSON.
Does not know: where the models come from.
Invariant: one line a variant, whatever its reason says.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from memory_efficient_gpt_server.commands.tables import UNKNOWN, aligned, one_line, size
from memory_efficient_gpt_server.commands.variant_rows import variant_rows

_COLUMNS: Final = ("model", "state", "leases", "waiting", "estimated", "measured", "last load", "why")
_TEXT_COLUMNS: Final = (0, 1, 7)


def show(
    models: Sequence[Mapping[str, Any]], *, as_json: bool, if_none: str, only_loaded: bool = False
) -> None:
    """Print the models, a row for each variant. if_none: what to say to a person if there are none."""
    rows = [row for model in models for row in variant_rows(model, only_loaded=only_loaded)]
    if as_json:
        print(json.dumps({"models": models}))
    elif rows:
        print("\n".join(aligned([_COLUMNS, *map(_row, rows)], _TEXT_COLUMNS)))
    else:
        print(if_none)


def bytes_cell(sizes: Mapping[str, int] | None) -> str:
    """The sum of a model's bytes by kind."""
    return UNKNOWN if sizes is None else size(sum(sizes.values()))


def _row(model: Mapping[str, Any]) -> tuple[str, ...]:
    load_s = model["last_load_s"]
    return (
        one_line(model["variant"]),
        one_line(model["state"]) + (" (pinned)" if model["pinned"] else ""),
        str(model["leases"]),
        str(model["waiting"]),
        bytes_cell(model["estimated_bytes"]),
        bytes_cell(model["measured_bytes"]),
        UNKNOWN if load_s is None else f"{load_s:.1f} s",
        one_line(model["reason"] or ""),
    )

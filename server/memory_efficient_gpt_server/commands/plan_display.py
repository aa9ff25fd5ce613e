"""What a person, or a program, sees of `megpt plan`.

Purpose: a table of bytes by kind, the verdict, and the changes that would do; or all of it as JSON.
Does not know: how bytes are found, which changes are tried.
Invariant: the table's last line is the sum of those above it.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, Final

from memory_efficient_gpt_server.commands.plan_steps import Change, Entry, Plan
from memory_efficient_gpt_server.commands.tables import aligned, size

_COLUMNS: Final = ("model", "weights", "KV cache", "workspace", "total", "context")


def show(plan: Plan, *, as_json: bool) -> None:
    """Print the plan."""
    print(json.dumps(_as_json(plan)) if as_json else _as_text(plan))


def _as_text(plan: Plan) -> str:
    lines = [*_table(plan), "", *_notes(plan), _verdict(plan)]
    if not plan.fits:
        lines += [_change_line(change) for change in plan.changes]
        if not plan.changes:
            lines.append("no change that was tried would do: give a larger budget, or a smaller model")
    return "\n".join(lines)


def _table(plan: Plan) -> list[str]:
    layout = plan.layout
    rows = [_COLUMNS, *(_row(entry) for entry in layout.entries)]
    if layout.server_bytes:
        rows.append(("the server itself", "", "", "", size(layout.server_bytes), ""))
    sums = [sum(entry.estimate.by_kind()[kind] for entry in layout.entries) for kind in ("weights", "kv")]
    workspace = sum(entry.estimate.workspace_bytes for entry in layout.entries)
    rows.append(("together", *map(size, (*sums, workspace, layout.needed_bytes)), ""))
    return aligned(rows)


def _row(entry: Entry) -> tuple[str, ...]:
    found = entry.estimate
    kinds = (found.weights_bytes, found.kv_cache_bytes, found.workspace_bytes, found.total_bytes)
    return (entry.config.model, *map(size, kinds), f"{found.max_model_len:,}")


def _notes(plan: Plan) -> list[str]:
    return [f"{entry.config.model}: {note}" for entry in plan.layout.entries for note in entry.estimate.notes]


def _verdict(plan: Plan) -> str:
    layout = plan.layout
    device = layout.entries[0].estimate.device
    budget = f"{size(layout.budget_bytes)} of memory ({device})"
    if plan.fits:
        return f"fits into {budget}; {size(layout.budget_bytes - layout.needed_bytes)} stay free"
    if layout.needed_bytes > layout.budget_bytes:
        reason = f"{size(layout.needed_bytes - layout.budget_bytes)} too much"
    elif short := [entry for entry in layout.entries if entry.is_shortened]:
        reason = "; ".join(
            f"{entry.config.model} gets {entry.estimate.max_model_len:,} of its "
            f"{entry.estimate.wanted_model_len:,} tokens of context"
            for entry in short
        )
    else:
        reason = f"quantizing while loading takes {size(layout.peak_bytes)} for a moment"
    return f"does not fit into {budget}: {reason}"


def _change_line(change: Change) -> str:
    options = f" ({' '.join(change.options)})" if change.options else ""
    before = ", stored so by `megpt quantize` before" if change.quantize_before else ""
    return f"  fits {change.text}{before}: {size(change.needed_bytes)}{options}"


def _as_json(plan: Plan) -> dict[str, Any]:
    layout = plan.layout
    return {
        "fits": plan.fits,
        "budget_bytes": layout.budget_bytes,
        "needed_bytes": layout.needed_bytes,
        "peak_bytes": layout.peak_bytes,
        "server_bytes": layout.server_bytes,
        "models": [
            {"model": entry.config.model, **asdict(entry.estimate), "total_bytes": entry.estimate.total_bytes}
            for entry in layout.entries
        ],
        "would_fit": [asdict(change) for change in plan.changes],
    }

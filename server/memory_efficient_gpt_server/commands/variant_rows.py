"""A model's variants as `GET /admin/models` tells them, for tables.

Purpose: one row for each variant, or one for the model with all of them added up.
Does not know: how rows look.
Invariant: the first variant is the model as configured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memory_efficient_gpt_server.registry.states import liveliest


def variant_rows(model: Mapping[str, Any], *, only_loaded: bool = False) -> list[dict[str, Any]]:
    """Each variant with the model's settings; only_loaded: without those that are unloaded."""
    rows = [{**model, **variant, "pinned": _pinned(model, variant)} for variant in model["variants"]]
    return [row for row in rows if not only_loaded or row["state"] != "unloaded"]


def summed(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model with what its variants have together, in the state of the liveliest, as in the metrics."""
    rows = variant_rows(model)
    present = liveliest(row["state"] for row in rows)
    shown = next((row for row in rows if row["state"] == present), rows[0])
    counts = {name: sum(row[name] for row in rows) for name in ("leases", "waiting")}
    return {**model, "state": shown["state"], "reason": shown["reason"], **counts}


def _pinned(model: Mapping[str, Any], variant: Mapping[str, Any]) -> bool:
    return bool(model["pinned"]) and variant["variant"] == model["id"]

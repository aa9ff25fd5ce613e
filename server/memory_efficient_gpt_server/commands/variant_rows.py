"""A model's variants as `GET /admin/models` tells them, for tables.

Purpose: one row for each variant, or one for the model with all of them added up.
Does not know: how rows look.
Invariant: the first variant is the model as configured.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def variant_rows(model: Mapping[str, Any], *, only_loaded: bool = False) -> list[dict[str, Any]]:
    """Each variant with the model's settings; only_loaded: without those that are unloaded."""
    rows = [{**model, **variant, "pinned": _pinned(model, variant)} for variant in model["variants"]]
    return [row for row in rows if not only_loaded or row["state"] != "unloaded"]


def summed(model: Mapping[str, Any]) -> dict[str, Any]:
    """The model with what its variants have together, in the state of the first that is not unloaded."""
    rows = variant_rows(model, only_loaded=True) or variant_rows(model)
    counts = {name: sum(row[name] for row in rows) for name in ("leases", "waiting")}
    return {**model, "state": rows[0]["state"], "reason": rows[0]["reason"], **counts}


def _pinned(model: Mapping[str, Any], variant: Mapping[str, Any]) -> bool:
    return bool(model["pinned"]) and variant["variant"] == model["id"]

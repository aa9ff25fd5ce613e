"""Where a served model is in its life, and how far its load is: words and figures for whoever asks.

Purpose: what a worker's model tells about itself.
Does not know: workers, how states change.
Invariant: plain data.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ModelState(StrEnum):
    """Where a served model is in its life."""

    LOADING = "loading"
    READY = "ready"
    ASLEEP = "asleep"
    DRAINING = "draining"
    FAILED = "failed"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True)
class LoadProgress:
    """What a loading worker is doing, and how far it is (0..1)."""

    phase: str
    fraction: float


@dataclass(slots=True)
class LoadTimes:
    """When a load reached its stages, in seconds since it was asked for; None: not yet."""

    forked_s: float | None = None
    ready_s: float | None = None

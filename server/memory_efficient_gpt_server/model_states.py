"""Where a served model is in its life, and how far its load is: words and figures for whoever asks.

Purpose: what a worker's model tells about itself.
Does not know: workers, how states change.
Invariant: plain data.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from memory_efficient_gpt.errors import MegptError, ModelLoadError, OverloadedError
from memory_efficient_gpt_server.errors import shutting_down


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


def refusal_in(state: ModelState, name: str, reason: str | None) -> MegptError | None:
    """What a request gets from a model in that state; None: it is taken."""
    match state:
        case ModelState.READY:
            return None
        case ModelState.LOADING:
            return OverloadedError(f"{name} is loading ({reason}). Try again in a few seconds.")
        case ModelState.DRAINING:
            return shutting_down()
        case ModelState.ASLEEP:
            return OverloadedError(f"{name} sleeps. Try again in a few seconds.")
        case _:
            return ModelLoadError(f"{name} is {state}: {reason}")

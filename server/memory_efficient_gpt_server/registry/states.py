"""The life of one variant: states and the only ways between them.

Purpose: pure transitions, so that no part of the registry can invent one.
Does not know: bytes, leases, why a transition happens.
Invariant: a transition that is not drawn here raises.

    UNLOADED -> QUEUED -> LOADING -> READY -> SLEEPING -> ASLEEP -> WAKING -> READY
                  |          |        | ^        |           |         |
                  v          |        v |        |           v         |
               UNLOADED      |     DRAINING -----+-------> DRAINING    |
                             v        v          v           v         v
                             +------> UNLOADING: its process is told to end
                                         v
                              UNLOADED, or FAILED -> QUEUED | UNLOADED

UNLOADED or FAILED -> FAILED: its files can't be loaded, which shows before a process is started.

SLEEPING and WAKING are the seconds in which the worker gives back or takes its memory; a lease is granted in
READY only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class IllegalTransitionError(Exception):
    """An event came in a state in which it can't happen: a bug of whoever sent it."""


class State(StrEnum):
    """Where a variant is in its life."""

    UNLOADED = "unloaded"
    QUEUED = "queued"
    LOADING = "loading"
    READY = "ready"
    SLEEPING = "sleeping"
    ASLEEP = "asleep"
    WAKING = "waking"
    DRAINING = "draining"
    UNLOADING = "unloading"
    FAILED = "failed"


_S: Final = State
TRANSITIONS: Final[Mapping[State, frozenset[State]]] = {
    _S.UNLOADED: frozenset({_S.QUEUED, _S.FAILED}),
    _S.QUEUED: frozenset({_S.LOADING, _S.UNLOADED}),
    _S.LOADING: frozenset({_S.READY, _S.UNLOADING}),
    _S.READY: frozenset({_S.SLEEPING, _S.DRAINING, _S.UNLOADING}),
    _S.SLEEPING: frozenset({_S.ASLEEP, _S.UNLOADING}),
    _S.ASLEEP: frozenset({_S.WAKING, _S.DRAINING, _S.UNLOADING}),
    _S.WAKING: frozenset({_S.READY, _S.UNLOADING}),
    _S.DRAINING: frozenset({_S.UNLOADING, _S.SLEEPING, _S.READY}),
    _S.UNLOADING: frozenset({_S.UNLOADED, _S.FAILED}),
    _S.FAILED: frozenset({_S.QUEUED, _S.UNLOADED, _S.FAILED}),
}

HAS_PROCESS: Final = frozenset(
    {_S.LOADING, _S.READY, _S.SLEEPING, _S.ASLEEP, _S.WAKING, _S.DRAINING, _S.UNLOADING}
)
"""States in which a worker process exists, and so in which bytes are held."""


LIVELIEST_FIRST: Final = (
    _S.READY, _S.DRAINING, _S.WAKING, _S.SLEEPING, _S.ASLEEP, _S.LOADING, _S.UNLOADING, _S.QUEUED, _S.FAILED,
    _S.UNLOADED,
)  # fmt: skip
"""Where one state must stand for several variants of a model: the first that any of them is in."""


def liveliest(states: Iterable[str]) -> str:
    """The one of several variants' states that stands for all; UNLOADED for none."""
    known = set(states)
    return next((state for state in LIVELIEST_FIRST if state in known), State.UNLOADED)


@dataclass(frozen=True, slots=True)
class Life:
    """A state, since when (seconds of the caller's clock), why, and for FAILED when it may be tried again."""

    state: State = State.UNLOADED
    since_s: float = 0.0
    reason: str | None = None
    retry_at_s: float | None = None


def move(life: Life, to: State, now_s: float, reason: str | None = None) -> Life:
    """The life after a transition. Raises IllegalTransitionError if there is no such way."""
    if to not in TRANSITIONS[life.state]:
        raise IllegalTransitionError(f"a variant that is {life.state} can't become {to}")
    if to is State.FAILED:
        raise IllegalTransitionError("use fail(): a failure needs a reason and a time to retry")
    return Life(to, now_s, reason)


def fail(life: Life, now_s: float, reason: str, retry_at_s: float) -> Life:
    """The life after its process ended by a failure. Raises IllegalTransitionError while there is one."""
    if State.FAILED not in TRANSITIONS[life.state]:
        raise IllegalTransitionError(f"a variant that is {life.state} can't fail before its process is gone")
    return Life(State.FAILED, now_s, reason, retry_at_s)

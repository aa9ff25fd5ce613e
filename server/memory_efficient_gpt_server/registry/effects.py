"""What the owner must do after a step: instructions, in the order in which they were decided.

Purpose: the registry's output as plain values.
Does not know: how a worker is started or a client is answered.
Invariant: every waiter and operation gets exactly one answer (GrantLease, Finish or Refuse); every StartLoad
is followed in time by exactly one StartUnload, which the owner answers with exactly one ProcessGone.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TypeAlias

from memory_efficient_gpt_server.registry.planning import Plan
from memory_efficient_gpt_server.registry.variants import Estimate, VariantKey


class RefusalKind(StrEnum):
    """Why somebody does not get what was asked for; the routes turn it into an error of the API."""

    MODEL_NOT_FOUND = "model_not_found"
    INSUFFICIENT_MEMORY = "insufficient_memory"
    """Larger than the budget minus what is pinned: waiting won't help."""
    EVICTION_NEEDED = "eviction_needed"
    """An administrator's load for which nobody may leave or sleep, and somebody would have to."""
    QUEUE_FULL = "queue_full"
    MODEL_NOT_LOADED = "model_not_loaded"
    """The request did not want to wait for a load."""
    MODEL_LOADING = "model_loading"
    """The wait ended while the model was being loaded; the load goes on."""
    MODELS_BUSY = "models_busy"
    """The wait ended before room could be made."""
    CHURN_LIMITED = "churn_limited"
    """Too many models were swapped of late."""
    LOAD_FAILED = "load_failed"
    DRAINING = "draining"
    """An administrator unloads the model."""
    MODEL_BUSY = "model_busy"
    """An administrator's wish that only an idle model can be given."""
    MODEL_PINNED = "model_pinned"
    WRONG_STATE = "wrong_state"
    """An administrator's wish that makes no sense in the model's state."""
    CANCELLED = "cancelled"
    """An administrator called the operation off."""


class UnloadReason(StrEnum):
    """Why a process is ended or put to sleep."""

    BUDGET = "budget"
    OVERCOMMIT = "overcommit"
    TTL = "ttl"
    ADMIN = "admin"
    FAILURE = "failure"


class AbortReason(StrEnum):
    """Why a lease ends before its holder gives it back. An eviction is no reason."""

    ADMIN = "admin"
    DRAIN_DEADLINE = "drain_deadline"
    WORKER_DIED = "worker_died"


@dataclass(frozen=True, slots=True)
class StartLoad:
    """Start a worker and load. Answer: Loaded, LoadFailed or WorkerDied. `reserved`: what it may take."""

    key: VariantKey
    reserved: Estimate


@dataclass(frozen=True, slots=True)
class StartUnload:
    """End the worker, whatever it is doing; answer ProcessGone once its memory is verified to be free."""

    key: VariantKey
    reason: UnloadReason


@dataclass(frozen=True, slots=True)
class StartSleep:
    """Let the worker give back what it can without ending. Answer: Slept or WorkerDied."""

    key: VariantKey
    reason: UnloadReason


@dataclass(frozen=True, slots=True)
class StartWake:
    """Let the worker take it all back. Answer: Woke or WorkerDied.

    kv_bytes: what its KV cache may have from now on; it is booked.
    """

    key: VariantKey
    kv_bytes: int


@dataclass(frozen=True, slots=True)
class GrantLease:
    """The lease is taken already: tell the waiter, who must give it back (LeaseReleased)."""

    waiter: int
    key: VariantKey


@dataclass(frozen=True, slots=True)
class Finish:
    """An administrator's operation is done."""

    operation: int


@dataclass(frozen=True, slots=True)
class Refuse:
    """A waiter or operation gets this answer. `plan`: for INSUFFICIENT_MEMORY and
    EVICTION_NEEDED, what was needed."""

    waiter: int
    kind: RefusalKind
    retry_after_s: float | None = None
    detail: str | None = None
    plan: Plan | None = None


@dataclass(frozen=True, slots=True)
class Abort:
    """End the work under a lease now; the lease is gone already."""

    lease: int
    key: VariantKey
    reason: AbortReason


@dataclass(frozen=True, slots=True)
class GrowKv:
    """Let a worker map `bytes` more KV memory; they are booked already."""

    key: VariantKey
    bytes: int


@dataclass(frozen=True, slots=True)
class MoveKv:
    """Let `source` unmap KV memory, as far as it is not in use. Answer: KvMoved with what it really unmapped.

    target: who will then be told to grow; None: nobody, a load waits for the bytes.
    """

    source: VariantKey
    target: VariantKey | None
    bytes: int


Effect: TypeAlias = (
    StartLoad | StartUnload | StartSleep | StartWake | GrantLease | Finish | Refuse | Abort | GrowKv | MoveKv
)

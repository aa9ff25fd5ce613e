"""What the registry is told: wishes of clients and administrators, and news of workers.

Purpose: the registry's input as plain values.
Does not know: where they come from.
Invariant: ids of waiters, leases and operations are unique over the registry's life; a granted lease keeps
its waiter's id.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import TypeAlias

from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.variants import Estimate, ModelEntry, VariantKey


class UnloadMode(StrEnum):
    """What happens to work under way: finish it, cut it, or refuse to unload because of it."""

    DRAIN = "drain"
    ABORT = "abort"
    IF_IDLE = "if_idle"


# ---- clients


@dataclass(frozen=True, slots=True)
class Asked:
    """A request needs a lease. `estimate`: what the variant would take; `wait_s`: how long it would wait
    (None: as long as anyone may; 0: only if it is loaded). `problem`: why its files can't be loaded, found
    out before anything is read of them; the estimate means nothing then."""

    waiter: int
    key: VariantKey
    estimate: Estimate
    wait_s: float | None = None
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class Left:
    """A client left while it waited; if its lease was granted meanwhile, it is given back."""

    waiter: int
    key: VariantKey


@dataclass(frozen=True, slots=True)
class LeaseReleased:
    """The work under a lease has ended. Leases that were aborted are unknown, which is fine."""

    lease: int
    key: VariantKey


# ---- workers


@dataclass(frozen=True, slots=True)
class Loaded:
    """A load has succeeded and takes `measured`."""

    key: VariantKey
    measured: Estimate


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """A load has failed; its process may still be there."""

    key: VariantKey
    reason: str


@dataclass(frozen=True, slots=True)
class WorkerLost:
    """The worker of a loaded variant has died, and another one is started for it; those aboard wait for that.
    Followed by WorkerBack or WorkerDied unless it is unloaded first."""

    key: VariantKey


@dataclass(frozen=True, slots=True)
class WorkerBack:
    """The next worker is ready."""

    key: VariantKey


@dataclass(frozen=True, slots=True)
class WorkerDied:
    """A process ended that nobody told to, and no other one follows."""

    key: VariantKey
    reason: str


@dataclass(frozen=True, slots=True)
class ProcessGone:
    """The answer to StartUnload. lost: it could not be ended, so all that it holds is leaked."""

    key: VariantKey
    lost: bool = False


@dataclass(frozen=True, slots=True)
class LeaksCleared:
    """All processes of a variant that could not be ended are gone after all."""

    key: VariantKey


@dataclass(frozen=True, slots=True)
class Slept:
    """It is asleep. `context_bytes`: what the process still has on its device, besides what sleeping does not
    free. `parked_bytes`: what its parked weights take; None: as was reserved."""

    key: VariantKey
    context_bytes: int
    parked_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Woke:
    """The weights are back, and the variant takes `measured`, with the KV memory that it has now."""

    key: VariantKey
    measured: Estimate


@dataclass(frozen=True, slots=True)
class KvWanted:
    """A ready variant could use `bytes` more KV memory."""

    key: VariantKey
    bytes: int


@dataclass(frozen=True, slots=True)
class KvMoved:
    """The answer to MoveKv: `source` has unmapped `bytes` of KV memory; 0 if it could not."""

    source: VariantKey
    bytes: int


# ---- administrators and time


@dataclass(frozen=True, slots=True)
class AdminLoad:
    """Load it, for no request, whatever failed before. may_evict: whether others may leave or sleep for it;
    if not, it is refused once that would be needed. `problem`: as of Asked."""

    operation: int
    key: VariantKey
    estimate: Estimate
    may_evict: bool = True
    problem: str | None = None


@dataclass(frozen=True, slots=True)
class AdminUnload:
    """Unload it. `deadline_s`: for DRAIN, seconds until what is left is cut; None: never."""

    operation: int
    key: VariantKey
    mode: UnloadMode = UnloadMode.DRAIN
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True)
class AdminSleep:
    """Put an idle ready variant to sleep; done at once if it sleeps already."""

    operation: int
    key: VariantKey


@dataclass(frozen=True, slots=True)
class AdminWake:
    """Wake a sleeping variant; done at once if it is ready."""

    operation: int
    key: VariantKey


@dataclass(frozen=True, slots=True)
class AdminCancel:
    """Call off the operation `target`, a wish for `key`, as far as that is possible."""

    operation: int
    key: VariantKey
    target: int


@dataclass(frozen=True, slots=True)
class Patched:
    """A model was registered, or its settings changed.

    estimates: where the limits of its KV cache changed, what its variants take when they are loaded next.
    """

    entry: ModelEntry
    estimates: Mapping[VariantKey, Estimate] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, slots=True)
class Removed:
    """Forget a model none of whose variants is loaded or waited for."""

    operation: int
    model_id: str


@dataclass(frozen=True, slots=True)
class BudgetPatched:
    """A device has another budget."""

    device: str
    budget: Budget


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed. The owner sends one at least every second."""


Event: TypeAlias = (
    Asked
    | Left
    | LeaseReleased
    | Loaded
    | LoadFailed
    | WorkerLost
    | WorkerBack
    | WorkerDied
    | ProcessGone
    | LeaksCleared
    | Slept
    | Woke
    | KvWanted
    | KvMoved
    | AdminLoad
    | AdminUnload
    | AdminSleep
    | AdminWake
    | AdminCancel
    | Patched
    | Removed
    | BudgetPatched
    | Tick
)

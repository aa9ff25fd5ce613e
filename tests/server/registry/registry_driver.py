"""A registry under a test's control: a clock that is set by hand, and short words for common events.

Purpose: let tests read as stories.
Does not know: what a test expects.
Invariant: after every event the registry's own integrity check holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

from memory_efficient_gpt_server.registry.effects import Effect
from memory_efficient_gpt_server.registry.events import (
    Asked,
    Event,
    LeaseReleased,
    Loaded,
    Patched,
    ProcessGone,
    Slept,
    Tick,
)
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.records import Policy, RegistryState, VariantRecord
from memory_efficient_gpt_server.registry.reducer import step
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import Estimate, ModelEntry, VariantKey

GPU = "cuda:0"
A, B, C = (VariantKey(model_id) for model_id in "ABC")

E = TypeVar("E")


def elastic(weights_bytes: int = 60, **fields: Any) -> Estimate:
    """As `size`, with a KV cache that can be moved."""
    return size(weights_bytes, **{"kv_least_bytes": 0, "kv_most_bytes": 1000, **fields})


def size(weights_bytes: int = 60, **fields: Any) -> Estimate:
    """An estimate on the GPU."""
    return Estimate(**{"device": GPU, "weights_bytes": weights_bytes, **fields})


class Driver:
    """Models A, B and C, registered with the same settings, on a GPU of 100 bytes unless told otherwise."""

    def __init__(
        self,
        policy: Policy | None = None,
        budgets: Mapping[str, Budget] | None = None,
        **entry: Any,
    ) -> None:
        entries = {key.model_id: ModelEntry(id=key.model_id, source="x", **entry) for key in (A, B, C)}
        self.state = RegistryState.initial(budgets or {GPU: Budget(100)}, entries, policy)
        self.now_s = 0.0
        self.effects: tuple[Effect, ...] = ()
        self._last_waiter = 0

    def feed(self, event: Event, after_s: float = 0.0) -> tuple[Effect, ...]:
        """What the registry wants after this event, `after_s` seconds later."""
        self.now_s += after_s
        self.state, self.effects = step(self.state, event, self.now_s)
        self.state.check_integrity()
        return self.effects

    def tick(self, after_s: float = 0.0) -> tuple[Effect, ...]:
        """Time passes."""
        return self.feed(Tick(), after_s)

    def ask(self, key: VariantKey, estimate: Estimate | None = None, after_s: float = 0.0) -> int:
        """Someone asks; returns the waiter's id. `effects` has what follows."""
        self._last_waiter += 1
        self.feed(Asked(self._last_waiter, key, estimate or size()), after_s)
        return self._last_waiter

    def load(self, key: VariantKey, estimate: Estimate | None = None, load_s: float = 1.0) -> int:
        """Ask for what is not loaded and let the load succeed; returns the lease."""
        lease = self.ask(key, estimate)
        self.feed(Loaded(key, estimate or size()), load_s)
        assert lease in self.record(key).leases, f"{key} was not granted: {self.effects}"
        return lease

    def load_idle(self, key: VariantKey, estimate: Estimate | None = None, load_s: float = 1.0) -> None:
        """A loaded model that nobody uses."""
        self.feed(LeaseReleased(self.load(key, estimate, load_s), key))

    def gone(self, key: VariantKey, after_s: float = 0.0, *, lost: bool = False) -> tuple[Effect, ...]:
        """The process has ended; lost: it has not, and what it holds is leaked."""
        return self.feed(ProcessGone(key, lost), after_s)

    def slept(self, key: VariantKey) -> tuple[Effect, ...]:
        """The weights are parked, and the device is empty."""
        return self.feed(Slept(key, 0))

    def patch(self, key: VariantKey, **changes: Any) -> tuple[Effect, ...]:
        """Change a model's settings."""
        return self.feed(Patched(replace(self.state.entries[key.model_id], **changes)))

    def record(self, key: VariantKey) -> VariantRecord:
        """What the registry knows of a variant."""
        return self.state.records[key]

    def states(self) -> dict[str, State]:
        """Model id -> state, of all that were ever asked for."""
        return {key.model_id: record.state for key, record in self.state.records.items()}

    def used(self, device: str = GPU) -> int:
        """Bytes that are booked."""
        return self.state.ledger.used[device]

    def only(self, kind: type[E]) -> E:
        """The one effect of that kind of the last event."""
        (effect,) = self.all(kind)
        return effect

    def all(self, kind: type[E]) -> list[E]:
        """The effects of that kind of the last event."""
        return [effect for effect in self.effects if isinstance(effect, kind)]

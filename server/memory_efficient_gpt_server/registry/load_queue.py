"""Who waits for which variant, and the two brakes: too many swaps, too many failures.

Purpose: order and bounds of waiting as pure values.
Does not know: bytes, states, what a load costs.
Invariant: a waiter is in one group at most, and is answered or gone by its deadline.

All that wait for one variant form a group and are served by one load, so that the asks A B A B cost two
loads. Groups are served by priority, then by who came first (but see `in_order` for those that have just left
for another); a group whose first waiter's patience is over
comes before all others, whatever their priority.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from memory_efficient_gpt_server.registry.variants import VariantKey


@dataclass(frozen=True, slots=True)
class Waiter:
    """Someone who wants a variant to be ready. Times are seconds of the caller's clock.

    id: unique among waiters, leases and operations; a granted lease has the same one. wants_lease: false for
    an administrator who only wants it loaded. may_evict: whether others may leave or sleep for that.
    """

    id: int
    asked_s: float
    deadline_s: float
    wants_lease: bool = True
    may_evict: bool = True


@dataclass(frozen=True, slots=True)
class LoadQueue:
    """Groups of waiters by variant, in order of arrival. Methods return new queues."""

    groups: Mapping[VariantKey, tuple[Waiter, ...]] = field(default_factory=lambda: MappingProxyType({}))

    def __contains__(self, key: VariantKey) -> bool:
        return key in self.groups

    def __len__(self) -> int:
        """Waiters in all groups."""
        return sum(map(len, self.groups.values()))

    def of(self, key: VariantKey) -> tuple[Waiter, ...]:
        """Who waits for a variant, the first that came first."""
        return self.groups.get(key, ())

    def spares_others(self, key: VariantKey) -> bool:
        """Whether nobody may leave or sleep for the variant: of those who wait for it, none wants that."""
        group = self.of(key)
        return bool(group) and not any(w.may_evict for w in group)

    def join(self, key: VariantKey, waiter: Waiter) -> LoadQueue:
        """Put a waiter behind the others of its group."""
        return LoadQueue({**self.groups, key: (*self.of(key), waiter)})

    def leave(self, key: VariantKey, waiter_id: int) -> LoadQueue:
        """Without a waiter; unknown ones are fine."""
        left = tuple([w for w in self.of(key) if w.id != waiter_id])
        return self if len(left) == len(self.of(key)) else self._with(key, left)

    def without(self, key: VariantKey) -> LoadQueue:
        """Without a whole group."""
        return self._with(key, ()) if key in self.groups else self

    def expired(self, now_s: float) -> list[tuple[VariantKey, Waiter]]:
        """Waiters whose deadline has come."""
        return [(k, w) for k, group in self.groups.items() for w in group if w.deadline_s <= now_s]

    def impatient(self, key: VariantKey, now_s: float, patience_s: float) -> bool:
        """Whether the group's first waiter has waited longer than `patience_s`."""
        return self.groups[key][0].asked_s + patience_s <= now_s

    def in_order(
        self,
        now_s: float,
        patience_s: float,
        priority: Callable[[VariantKey], int],
        yields_to: Callable[[VariantKey], VariantKey | None] = lambda _: None,
    ) -> list[VariantKey]:
        """Variants in the order in which they should be loaded.

        yields_to: for whom a variant has left, if that one still waits to be loaded. It comes before the one
        that made room for it, however great that one's priority: else the swap was for nothing.
        """
        if len(self.groups) < 2:
            return list(self.groups)

        def rank(key: VariantKey) -> tuple[bool, int, float, bool]:
            impatient = self.impatient(key, now_s, patience_s)
            importance, asked_s = priority(key), self.groups[key][0].asked_s
            first = yields_to(key)
            yields = first is not None and first in self.groups
            if first is not None and yields:
                importance = min(importance, priority(first))
                asked_s = max(asked_s, self.groups[first][0].asked_s)
            return not impatient, 0 if impatient else -importance, asked_s, yields

        return sorted(self.groups, key=rank)

    def _with(self, key: VariantKey, waiters: tuple[Waiter, ...]) -> LoadQueue:
        groups = {k: group for k, group in self.groups.items() if k != key or waiters}
        if waiters:
            groups[key] = waiters
        return LoadQueue(groups)


@dataclass(frozen=True, slots=True)
class ChurnGuard:
    """At most `most_swaps` evictions in favour of another model within `window_s` seconds.

    Beyond that the machine copies weights instead of computing; loads that need no eviction go on. It is for
    whoever asks to ignore it while nobody computes (scheduling.py).
    """

    most_swaps: int
    window_s: float
    swaps_s: tuple[float, ...] = ()

    def swapped(self, now_s: float, count: int) -> ChurnGuard:
        """After `count` evictions at `now_s`."""
        recent = tuple([t for t in self.swaps_s if t > now_s - self.window_s])
        return ChurnGuard(self.most_swaps, self.window_s, recent + (now_s,) * count)

    def wait_s(self, now_s: float) -> float:
        """Seconds until a load may evict again; 0 if it may now."""
        recent = [t for t in self.swaps_s if t > now_s - self.window_s]
        if len(recent) < self.most_swaps:
            return 0.0
        return recent[len(recent) - self.most_swaps] + self.window_s - now_s


@dataclass(frozen=True, slots=True)
class FailureRule:
    """How long a variant is left alone after failures: 1, 2 s ...; after `most` of them until one expires."""

    most: int = 3
    expiry_s: float = 900.0
    first_delay_s: float = 1.0

    def struck(self, strikes_s: tuple[float, ...], now_s: float) -> tuple[float, ...]:
        """The recent failures, one of now among them."""
        return (*self.recent(strikes_s, now_s), now_s)

    def recent(self, strikes_s: tuple[float, ...], now_s: float) -> tuple[float, ...]:
        """Failures that have not expired."""
        return tuple([t for t in strikes_s if t > now_s - self.expiry_s])

    def out(self, strikes_s: tuple[float, ...], now_s: float) -> bool:
        """Whether it has failed too often of late."""
        return len(self.recent(strikes_s, now_s)) >= self.most

    def retry_at_s(self, strikes_s: tuple[float, ...], now_s: float) -> float:
        """When it may be tried again; `strikes_s` has at least the failure that has just happened."""
        recent = self.recent(strikes_s, now_s)
        if len(recent) >= self.most:
            return recent[len(recent) - self.most] + self.expiry_s
        return now_s + self.first_delay_s * 2.0 ** (len(recent) - 1)

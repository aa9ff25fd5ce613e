"""Prometheus' histogram as plain numbers.

Purpose: count values per bucket on the event loop, without locks.
Does not know: Prometheus' classes, what is measured.
Invariant: a value that equals a bound counts below it, as Prometheus' `le` says.
"""

from __future__ import annotations

from bisect import bisect_left


class Histogram:
    """Counts per bucket and a sum."""

    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        """Record `value`, `times` times."""
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def cumulative(self) -> tuple[list[tuple[str, float]], float]:
        """Prometheus' form: counts up to each bound, and the sum."""
        running, buckets = 0, []
        for bound, count in zip((*map(str, self._bounds), "+Inf"), self._counts, strict=True):
            running += count
            buckets.append((bound, float(running)))
        return buckets, self._sum

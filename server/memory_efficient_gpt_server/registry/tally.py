"""What the registry counts: loads, evictions, sleeps, their times.

Purpose: plain numbers for Prometheus and for administrators.
Does not know: Prometheus.
Invariant: only ids of registered models are counted under; everything happens on the event loop.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import Final

from memory_efficient_gpt_server.histogram import Histogram

LOAD_BUCKETS: Final = (
    0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 600.0,
)  # fmt: skip

WAKE_BUCKETS: Final = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 60.0)


class Tally:
    """loads: by (model id, "success" or "failure"). unloads and sleeps: by (model id, reason)."""

    def __init__(self) -> None:
        self.loads: Counter[tuple[str, str]] = Counter()
        self.unloads: Counter[tuple[str, str]] = Counter()
        self.sleeps: Counter[tuple[str, str]] = Counter()
        self.wake_s: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(WAKE_BUCKETS))
        self.load_s: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(LOAD_BUCKETS))
        self.wait_s: defaultdict[str, Histogram] = defaultdict(lambda: Histogram(LOAD_BUCKETS))

    def waited(self, model_id: str, seconds: float) -> None:
        """A request that found its model not ready was answered after so long: granted, refused or left."""
        self.wait_s[model_id].observe(seconds)

    def loaded(self, model_id: str, seconds: float) -> None:
        """A load has succeeded after so long."""
        self.loads[model_id, "success"] += 1
        self.load_s[model_id].observe(seconds)

    def failed(self, model_id: str) -> None:
        """A load has failed."""
        self.loads[model_id, "failure"] += 1

    def unloaded(self, model_id: str, reason: str) -> None:
        """A process is told to end."""
        self.unloads[model_id, reason] += 1

    def slept(self, model_id: str, reason: str) -> None:
        """A model is told to sleep."""
        self.sleeps[model_id, reason] += 1

    def woke(self, model_id: str, seconds: float) -> None:
        """A model has woken after so long."""
        self.wake_s[model_id].observe(seconds)

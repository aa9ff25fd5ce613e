"""An engine's counters across the lives of its workers.

Purpose: what ended workers counted, kept when the next one begins at zero.
Does not know: processes, Prometheus.
Invariant: across lives only totals are added up; what describes the present (sequences running, free blocks)
is that of living engines.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from typing import Final

from memory_efficient_gpt.engine_info import EngineStats

COUNTERS: Final = (
    "prefix_queries_tokens", "prefix_hits_tokens", "num_preemptions", "prompt_tokens", "generated_tokens",
    "steps", "step_seconds", "host_seconds",
)  # fmt: skip


def total(stats: Iterable[EngineStats]) -> EngineStats:
    """The sum of several engines in every respect: of what they counted, and of what they have now."""
    summed = list(stats)
    return EngineStats(**{f.name: sum(getattr(one, f.name) for one in summed) for f in fields(EngineStats)})


def add_counters(before: EngineStats, last: EngineStats) -> EngineStats:
    """The sum of both, as far as it makes sense; everything else is zero."""
    return EngineStats(**{name: getattr(before, name) + getattr(last, name) for name in COUNTERS})

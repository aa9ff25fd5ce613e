"""CPU threads, shared out among models.

Purpose: the number of threads of each model's engine.
Does not know: workers, how many CPUs there are.
Invariant: a model that asks for a number gets it; every other has at least one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from memory_efficient_gpt.config import EngineConfig


def divide_threads(configs: Sequence[EngineConfig], num_threads: int) -> list[EngineConfig]:
    """Give each config that leaves `num_threads` open an equal share of the CPU threads, at least one.

    Threads that other configs ask for by number are theirs; the rest is divided, the first models get
    the remainder.
    """
    open_ones = [config for config in configs if config.num_threads is None]
    left = num_threads - sum(config.num_threads or 0 for config in configs)
    shares = iter(
        max(1, left // len(open_ones) + (rank < left % len(open_ones))) for rank in range(len(open_ones))
    )
    return [c if c.num_threads is not None else replace(c, num_threads=next(shares)) for c in configs]

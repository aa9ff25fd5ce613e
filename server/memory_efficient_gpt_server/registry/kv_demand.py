"""Whether an engine could use more KV memory, from what it tells of itself.

Purpose: the policy behind KvWanted, pure.
Does not know: who has memory; whether it will be given.
Invariant: an engine whose KV cache keeps its size wants nothing, nor does one whose sequences all run.
"""

from __future__ import annotations

import math
from typing import Final

from memory_efficient_gpt.engine_info import EngineInfo, EngineStats

FULL: Final = 0.9
"""Share of the blocks in use from which on waiting sequences are thought to wait for blocks soon."""
LEAST_GROWTH: Final = 0.125
"""By which share of its blocks an engine grows at least, so that it does not ask for every single one."""


def wanted_kv_bytes(info: EngineInfo, stats: EngineStats, preempted: bool) -> int:
    """How many bytes more it could use now; 0: it has enough.

    preempted: whether sequences lost their blocks since it was last looked at. As much is wanted as lets all
    waiting sequences run, if each takes what those that run have taken, and not less than moves at a time.
    """
    blocks = stats.num_kv_blocks
    if info.kv_most_bytes is None or blocks <= 0:
        return 0
    used = blocks - stats.num_free_blocks
    crowded = stats.num_waiting > 0 and used >= FULL * blocks
    if not (stats.num_waiting_for_blocks or preempted or crowded):
        return 0
    each = math.ceil(used / stats.num_running) if stats.num_running else 1
    more = max(max(1, stats.num_waiting) * max(1, each), math.ceil(LEAST_GROWTH * blocks))
    return max(more * info.kv_block_bytes, info.kv_granule_bytes)

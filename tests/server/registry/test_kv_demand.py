"""When an engine wants more KV memory, and how much."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memory_efficient_gpt.engine_info import EngineStats
from memory_efficient_gpt_server.registry.kv_demand import wanted_kv_bytes
from tests.server.scripted_model import INFO

ELASTIC = replace(
    INFO, num_kv_blocks=99, kv_cache_bytes=1000, kv_block_bytes=10, kv_least_bytes=10, kv_most_bytes=10**6
)
"""100 blocks of 10 bytes, one of them the trash block."""
BUSY = EngineStats(num_kv_blocks=100, num_free_blocks=0, num_running=10)


def test_sequences_that_wait_for_blocks_want_as_many_as_those_that_run_have() -> None:
    stats = replace(BUSY, num_waiting=4, num_waiting_for_blocks=4)
    assert wanted_kv_bytes(ELASTIC, stats, preempted=False) == 4 * 10 * 10


@pytest.mark.parametrize(("free", "wants"), [(10, True), (11, False)])
def test_work_that_waits_beside_a_nearly_full_cache_wants_more(free: int, wants: bool) -> None:
    stats = replace(BUSY, num_free_blocks=free, num_waiting=1)
    assert (wanted_kv_bytes(ELASTIC, stats, preempted=False) > 0) is wants


def test_preemption_wants_more_though_nobody_waits_now() -> None:
    assert wanted_kv_bytes(ELASTIC, BUSY, preempted=True) == 13 * 10  # an eighth of all at least
    assert wanted_kv_bytes(ELASTIC, BUSY, preempted=False) == 0


def test_an_idle_engine_and_one_that_waits_for_slots_want_nothing() -> None:
    assert wanted_kv_bytes(ELASTIC, EngineStats(num_kv_blocks=100, num_free_blocks=100), False) == 0
    stats = replace(BUSY, num_free_blocks=50, num_waiting=9)
    assert wanted_kv_bytes(ELASTIC, stats, preempted=False) == 0
    assert wanted_kv_bytes(ELASTIC, EngineStats(), preempted=True) == 0


def test_no_less_is_wanted_than_moves_at_a_time() -> None:
    coarse = replace(ELASTIC, kv_granule_bytes=5000)
    assert wanted_kv_bytes(coarse, BUSY, preempted=True) == 5000
    assert wanted_kv_bytes(coarse, BUSY, preempted=False) == 0
    stats = replace(BUSY, num_waiting=60, num_waiting_for_blocks=60)
    assert wanted_kv_bytes(coarse, stats, preempted=False) == 60 * 10 * 10


def test_a_cache_of_fixed_size_wants_nothing() -> None:
    stats = replace(BUSY, num_waiting=4, num_waiting_for_blocks=4)
    assert wanted_kv_bytes(INFO, stats, preempted=True) == 0


def test_with_nothing_running_a_share_of_the_cache_is_wanted() -> None:
    stats = EngineStats(num_kv_blocks=100, num_free_blocks=3, num_waiting=1, num_waiting_for_blocks=1)
    assert wanted_kv_bytes(ELASTIC, stats, preempted=False) == 13 * 10

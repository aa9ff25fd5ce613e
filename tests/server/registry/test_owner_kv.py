"""The owner and KV memory: engines are told in the right order, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from memory_efficient_gpt.engine_info import EngineStats
from memory_efficient_gpt.errors import EngineFailedError, ModelLoadError
from memory_efficient_gpt_server.registry.events import Event, KvMoved
from memory_efficient_gpt_server.registry.kv_moves import KvMoves
from memory_efficient_gpt_server.registry.kv_room import kv_bytes
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST, VariantKey
from tests.server.registry.fake_engines import FakeEngine, FakeHost, reaches
from tests.server.registry.holders import end, holder, leased, settle

CROWDED = EngineStats(
    num_kv_blocks=29, num_free_blocks=0, num_running=1, num_waiting=1, num_waiting_for_blocks=1
)
"""Wants as much again as it has: 29 blocks of 1 byte."""


def _host(**options: Any) -> FakeHost:
    """A and B with 30 KV bytes each, of which they keep 10, and 20 free bytes."""
    host = FakeHost(sizes={"A": 10, "B": 10, "C": 25}, **options)
    for model_id in "AB":
        host.kv[model_id] = (30, 100)
        host.entries[model_id] = {"kv_soft_limit_bytes": 10}
    return host


def _kv(registry: Registry) -> tuple[int, ...]:
    return tuple(kv_bytes(registry.state.ledger, VariantKey(model_id)) for model_id in "AB")


async def _until(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.005)


def test_a_burst_takes_free_bytes_then_those_of_an_idle_model_which_shrinks_first() -> None:
    async def run() -> None:
        host = _host()
        async with host.registry() as registry:
            await leased(registry, "A")
            busy = await holder(registry, "B")
            a, b = host.engine("A"), host.engine("B")
            a.may_move.clear()
            b.stats = CROWDED
            await _until(lambda: a.kv_limits)
            assert (a.kv_limits, b.kv_limits) == ([21], [50])  # 20 were free, 9 more are wanted
            assert _kv(registry) == (30, 50)
            b.stats = EngineStats()
            a.may_move.set()
            await _until(lambda: len(b.kv_limits) == 2)
            assert b.kv_limits == [50, 59] and _kv(registry) == (21, 59)
            assert registry.state.ledger.used[HOST] == 100
            await end(busy)

    asyncio.run(run())


def test_only_what_was_really_unmapped_is_given_on() -> None:
    async def run() -> None:
        host = _host()
        async with host.registry() as registry:
            await leased(registry, "A")
            busy = await holder(registry, "B")
            host.engine("A").kv_in_use = 27
            host.engine("B").stats = CROWDED
            await _until(lambda: len(host.engine("B").kv_limits) == 2)
            assert _kv(registry) == (27, 53)
            await end(busy)

    asyncio.run(run())


def test_a_load_takes_idle_kv_bytes_and_evicts_nobody() -> None:
    async def run() -> None:
        host = _host()
        async with host.registry() as registry:
            await leased(registry, "A")
            await leased(registry, "B")
            assert (await registry.plan("C")).verdict == "after_shrinking"
            await leased(registry, "C")
            assert host.engine("A").kv_limits == [25]
            assert {i: registry.engine(i).state for i in "ABC"} == dict.fromkeys("ABC", "ready")

    asyncio.run(run())


def test_a_giver_that_is_unloaded_in_the_middle_frees_its_bytes_with_its_process() -> None:
    async def run() -> None:
        host = _host()
        async with host.registry() as registry:
            await leased(registry, "A")
            busy = await holder(registry, "B")
            a = host.engine("A")
            a.may_move.clear()
            host.engine("B").stats = CROWDED
            await _until(lambda: a.kv_limits)
            await (await registry.unload("A"))
            assert a.closed and registry.engine("A").state == State.UNLOADED
            a.may_move.set()
            await settle()
            assert registry.state.ledger.used[HOST] <= 100
            await end(busy)

    asyncio.run(run())


def test_a_taker_that_dies_in_the_middle_leaves_the_bytes_free() -> None:
    async def run() -> None:
        host = _host()
        async with host.registry() as registry:
            await leased(registry, "A")
            busy = await holder(registry, "B")
            a, b = host.engine("A"), host.engine("B")
            a.may_move.clear()
            b.stats = CROWDED
            await _until(lambda: a.kv_limits)
            b.state, b.reason = "failed", "it keeps dying"
            await reaches(registry, "B", State.UNLOADED)
            a.may_move.set()
            await _until(lambda: _kv(registry) == (21, 0))
            assert registry.state.ledger.used[HOST] == 31 and b.kv_limits == [50]
            with pytest.raises(EngineFailedError):
                await busy

    asyncio.run(run())


@pytest.mark.parametrize("how", ["timeout", "refusal", "bug"])
def test_an_engine_that_does_not_answer_keeps_its_bytes(how: str) -> None:
    class Deaf(FakeEngine):
        async def set_kv_limit(self, num_bytes: int) -> int:
            if how == "timeout":
                await asyncio.sleep(10)
            raise ModelLoadError("no") if how == "refusal" else KeyError("bug")

    async def run() -> None:
        told: list[Event] = []
        moves, key = KvMoves(told.append, timeout_s=0.01), VariantKey("A")
        moves.shrink(key, Deaf(1), 5, 20)
        moves.grow(key, Deaf(1), 30)
        await _until(lambda: told)
        assert told == [KvMoved(key, 0)]
        await moves.close()

    asyncio.run(run())


def test_a_cache_of_fixed_size_is_never_moved() -> None:
    async def run() -> None:
        host = FakeHost(sizes={"A": 10, "B": 10})
        async with host.registry() as registry:
            busy = await holder(registry, "A")
            engine = host.engine("A")
            engine.stats = replace(CROWDED, num_preemptions=5)
            await asyncio.sleep(0.6)
            assert engine.kv_limits == []
            await end(busy)

    asyncio.run(run())


def test_a_giver_that_sleeps_calls_its_move_off_and_is_told_its_limit_before_it_wakes() -> None:
    async def run() -> None:
        host = _host()
        host.sleepy.add("A")
        async with host.registry() as registry:
            await leased(registry, "A")
            busy = await holder(registry, "B")
            a, b = host.engine("A"), host.engine("B")
            a.may_move.clear()
            b.stats = CROWDED
            await _until(lambda: a.kv_limits)
            b.stats = EngineStats()
            sleeping = await registry.sleep("A")
            a.may_move.set()
            await sleeping
            assert _kv(registry) == (0, 50) and b.kv_limits == [50], "nothing moved"
            told = a.told.copy()
            await leased(registry, "A")
            assert a.told == [*told, 21, "wake"] and _kv(registry) == (21, 50)
            assert registry.state.ledger.used[HOST] == 91
            await end(busy)

    asyncio.run(run())


@pytest.mark.parametrize("how", ["refusal", "silence"])
def test_a_sleeper_that_does_not_take_its_limit_is_ended_and_loaded_anew(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory_efficient_gpt_server.registry.processes.ANSWER_TIMEOUT_S", 0.05)

    async def run() -> None:
        host = _host()
        host.sleepy.add("A")
        async with host.registry() as registry:
            await leased(registry, "A")
            await (await registry.sleep("A"))
            first = host.engine("A")
            if how == "refusal":
                first.closed = True
            else:
                first.may_move.clear()
            await leased(registry, "A")
            assert first.closed and "wake" not in first.told and len(host.engines["A"]) == 2
            assert _kv(registry) == (30, 0)

    asyncio.run(run())

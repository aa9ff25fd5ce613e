"""Engines that can't be ended: what they hold is leaked, and free again when they are gone after all."""

from __future__ import annotations

import asyncio

import pytest

from memory_efficient_gpt_server.registry import endings
from memory_efficient_gpt_server.registry.endings import Endings
from memory_efficient_gpt_server.registry.events import Event, LeaksCleared
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST
from tests.server.registry.fake_engines import FakeEngine, FakeHost
from tests.server.registry.holders import leased, settle
from tests.server.registry.registry_driver import A


class Unclosable(FakeEngine):
    """Its end fails."""

    async def close(self, drain_s: float = 0.0) -> None:
        await self.may_close.wait()
        raise OSError("no such process")


async def test_leaks_are_cleared_when_the_last_lost_process_of_a_variant_is_gone() -> None:
    told: list[Event] = []
    desk = Endings(told.append, timeout_s=0.01)
    stuck = [FakeEngine(1), FakeEngine(1)]
    for engine in stuck:
        engine.may_close.clear()
        assert not await desk.end(A, engine)
    assert await desk.end(A, FakeEngine(1)), "this one goes"
    stuck[0].may_close.set()
    await settle()
    assert told == []
    stuck[1].may_close.set()
    await settle()
    assert told == [LeaksCleared(A)]


async def test_an_end_that_fails_is_a_loss_for_good() -> None:
    told: list[Event] = []
    desk = Endings(told.append, timeout_s=0.01)
    assert not await desk.end(A, Unclosable(1))
    late = Unclosable(1)
    late.may_close.clear()
    assert not await desk.end(A, late)
    late.may_close.set()
    await settle()
    assert told == []


async def test_a_server_that_ends_waits_for_none_of_them() -> None:
    desk = Endings(lambda _: pytest.fail("nothing is gone"), timeout_s=0.01)
    engine = FakeEngine(1)
    engine.may_close.clear()
    await desk.end(A, engine)
    desk.give_up()
    await settle()
    assert not engine.closed


async def test_a_model_whose_worker_is_lost_can_be_loaded_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(endings.Endings.__init__, "__defaults__", (0.01,))
    host = FakeHost(sizes={"A": 40})
    async with host.registry() as registry:
        await leased(registry, "A")
        lost = host.engine("A")
        lost.may_close.clear()
        await (await registry.unload("A"))
        assert registry.engine("A").state == State.UNLOADED
        assert registry.state.ledger.leaked_bytes(HOST) == 40
        await leased(registry, "A")
        assert registry.engine("A").state == State.READY and registry.state.ledger.used[HOST] == 80
        lost.may_close.set()
        async with asyncio.timeout(5):
            while registry.state.ledger.leaked_bytes(HOST):  # noqa: ASYNC110 - the ledger has no event
                await asyncio.sleep(0.001)
        assert registry.state.ledger.used[HOST] == 40

"""The owner with fake engines on a GPU: who sleeps, who wakes, and what is booked meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from memory_efficient_gpt_server.errors import (
    InsufficientMemoryError,
    ModelBusyError,
    ModelPinnedError,
    WrongStateError,
)
from memory_efficient_gpt_server.registry.states import State
from tests.server.registry.fake_engines import FakeHost, reaches
from tests.server.registry.holders import end, holder, leased, settle


async def test_a_model_in_the_way_sleeps_and_wakes_in_the_same_process() -> None:
    host = FakeHost(host_budget=60)
    async with host.registry() as registry:
        await leased(registry, "A")
        first = host.engine("A")
        asking = asyncio.create_task(leased(registry, "B"))
        await reaches(registry, "A", State.ASLEEP)
        assert registry.state.ledger.used == {"cuda:0": 63, "cpu": 60}, "3 bytes are still on the device"
        await asking
        assert first.state == "asleep" and registry.tally.sleeps == {("A", "budget"): 1}
        await leased(registry, "A")
        assert host.engines["A"] == [first] and first.state == "ready"
        assert registry.engine("B").state == State.UNLOADED, "the host had no room for it"
        assert registry.state.ledger.used == {"cuda:0": 60, "cpu": 0}
        assert registry.tally.wake_s["A"].cumulative()[0][-1][1] == 1


async def test_all_who_ask_for_a_sleeping_model_share_one_wake_up() -> None:
    host = FakeHost(host_budget=100)
    async with host.registry() as registry:
        await leased(registry, "A")
        await (await registry.sleep("A"))
        assert registry.engine("A").state == "asleep" and registry.engine("A").reason == "admin"
        host.engine("A").may_move.clear()
        asking = [asyncio.create_task(leased(registry, "A")) for _ in range(3)]
        await reaches(registry, "A", State.WAKING)
        host.engine("A").may_move.set()
        await asyncio.gather(*asking)
        assert len(host.engines["A"]) == 1


async def test_administrators_put_to_sleep_and_wake_and_hear_when_it_is_done() -> None:
    host = FakeHost(host_budget=100)
    async with host.registry() as registry:
        await leased(registry, "A")
        host.engine("A").may_move.clear()
        sleeping = [await registry.sleep("A"), await registry.sleep("A")]
        await settle()
        assert registry.engine("A").state == "sleeping" and not any(s.done() for s in sleeping)
        host.engine("A").may_move.set()
        await asyncio.gather(*sleeping)
        assert (await registry.sleep("A")).done()
        await (await registry.wake("A"))
        assert registry.engine("A").state == "ready" and (await registry.wake("A")).done()


async def test_what_can_not_sleep_or_wake_says_why() -> None:
    host = FakeHost(host_budget=59)
    host.entries["B"]["pinned"] = True
    async with host.registry() as registry:
        with pytest.raises(WrongStateError, match="it is unloaded; only a ready one can sleep"):
            await (await registry.sleep("A"))
        with pytest.raises(WrongStateError, match="it is unloaded; only a sleeping one can wake"):
            await (await registry.wake("A"))
        using = await holder(registry, "A")
        with pytest.raises(ModelBusyError, match="try again when it is idle"):
            await (await registry.sleep("A"))
        await end(using)
        with pytest.raises(
            InsufficientMemoryError, match=r"60 bytes of host memory, where 59.*host_budget_bytes"
        ):
            await (await registry.sleep("A"))
        await leased(registry, "B")
        with pytest.raises(ModelPinnedError):
            await (await registry.sleep("B"))


async def test_a_model_of_a_cpu_without_a_cache_of_ours_can_not_sleep() -> None:
    async with FakeHost().registry() as registry:
        await leased(registry, "A")
        with pytest.raises(WrongStateError, match="nothing to give back"):
            await (await registry.sleep("A"))


@pytest.mark.parametrize("moment", ["sleep", "wake"])
def test_an_engine_that_fails_on_its_way_is_ended_and_loaded_anew(moment: str) -> None:
    async def run() -> None:
        host = FakeHost(host_budget=100)
        async with host.registry() as registry:
            await leased(registry, "A")
            first = host.engine("A")
            if moment == "wake":
                await (await registry.sleep("A"))
                first.fails = "the driver is gone"
            else:
                first.fails = "the driver is gone"
                with pytest.raises(WrongStateError, match=r"could not sleep: the driver is gone"):
                    await (await registry.sleep("A"))
            await leased(registry, "A")
            assert first.closed and len(host.engines["A"]) == 2
            assert registry.state.ledger.used == {"cuda:0": 60, "cpu": 0}

    asyncio.run(run())


async def test_an_engine_that_dies_in_its_sleep_is_noticed() -> None:
    host = FakeHost(host_budget=100)
    async with host.registry() as registry:
        await leased(registry, "A")
        await (await registry.sleep("A"))
        host.engine("A").state, host.engine("A").reason = "failed", "it was killed"
        await reaches(registry, "A", State.UNLOADED)
        assert registry.state.ledger.used == {"cuda:0": 0, "cpu": 0}


async def test_an_unload_or_the_servers_end_does_not_wait_for_a_sleep() -> None:
    host = FakeHost(host_budget=100)
    async with host.registry() as registry:
        for model in ("A", "B"):
            await leased(registry, model)
            host.engine(model).may_move.clear()
            sleeping = await registry.sleep(model)
            if model == "A":
                await (await registry.unload(model))
                with pytest.raises(WrongStateError, match="being unloaded"):
                    await sleeping
                assert registry.engine("A").state == "unloaded"

"""The owner where its tasks meet: variants that sleep, KV memory on its way, budgets, removals, the end."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest

from memory_efficient_gpt.engine_info import EngineStats
from memory_efficient_gpt.errors import EngineFailedError, ModelNotFoundError
from memory_efficient_gpt_server.errors import ModelBusyError, ModelPinnedError
from memory_efficient_gpt_server.registry.changes import change_budget, remove_model
from memory_efficient_gpt_server.registry.choice import Choices
from memory_efficient_gpt_server.registry.events import UnloadMode
from memory_efficient_gpt_server.registry.kv_room import kv_bytes
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST, VariantKey
from memory_efficient_gpt_server.served_variant import ServedVariant
from tests.server.registry.fake_engines import FakeHost, reaches
from tests.server.registry.holders import end, holder, leased, settle

OWN, INT4 = VariantKey("A"), VariantKey("A", "int4")
CROWDED = EngineStats(
    num_kv_blocks=29, num_free_blocks=0, num_running=1, num_waiting=1, num_waiting_for_blocks=1
)


def _variants(**options: int) -> FakeHost:
    """A with an int4 variant of 20 bytes, on a GPU: both can sleep."""
    host = FakeHost(sizes={str(INT4): 20}, host_budget=100, **options)
    host.choices["A"] = Choices((INT4,))
    return host


def _elastic(**options: int) -> FakeHost:
    """A and B with 30 KV bytes each, of which they keep 10, and 20 free bytes."""
    host = FakeHost(sizes={"A": 10, "B": 10, "C": 25}, **options)
    for model_id in "AB":
        host.kv[model_id] = (30, 100)
        host.entries[model_id] = {"kv_soft_limit_bytes": 10}
        host.sleepy.add(model_id)
    return host


def _kv(registry: Registry) -> tuple[int, ...]:
    return tuple(kv_bytes(registry.state.ledger, VariantKey(model_id)) for model_id in "AB")


async def _until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.005)


async def _move_in_flight(host: FakeHost, registry: Registry) -> asyncio.Task[None]:
    """B, in use, has all free bytes; A was told to give it 9 and has not answered. Returns who uses B."""
    await leased(registry, "A")
    busy = await holder(registry, "B")
    host.engine("A").may_move.clear()
    host.engine("B").stats = CROWDED
    await _until(lambda: host.engine("A").kv_limits)
    host.engine("B").stats = EngineStats()
    return busy


async def test_a_variant_sleeps_and_wakes_while_another_one_of_the_model_serves() -> None:
    host = _variants()
    async with host.registry() as registry:
        using = await holder(registry, OWN)
        await leased(registry, INT4)
        await (await registry.sleep(INT4))
        assert [registry.engine(key).state for key in (OWN, INT4)] == ["ready", "asleep"]
        assert not registry.needs("A"), "a sleeping variant makes nobody unready"
        await leased(registry, INT4)
        assert [len(host.engines[str(key)]) for key in (OWN, INT4)] == [1, 1]
        await end(using)


async def test_a_model_is_removed_once_each_of_its_variants_is_unloaded() -> None:
    host = _variants()
    async with host.registry() as registry:
        for key in (OWN, INT4):
            await leased(registry, key)
        await (await registry.sleep(INT4))
        await (await registry.unload("A"))
        assert [registry.engine(key).state for key in (OWN, INT4)] == ["unloaded", "asleep"]
        with pytest.raises(ModelBusyError, match=r"A\[quantization=int4\] is asleep.*its `optimizations`"):
            await remove_model(registry, "A")
        await (await registry.unload(INT4))
        assert await remove_model(registry, "A") == "A"
        with pytest.raises(ModelNotFoundError):
            await leased(registry, INT4)


async def test_a_model_that_gives_kv_memory_is_not_removed() -> None:
    host = _elastic()
    async with host.registry() as registry:
        busy = await _move_in_flight(host, registry)
        with pytest.raises(ModelBusyError, match="A is ready"):
            await remove_model(registry, "A")
        host.engine("A").may_move.set()
        await _until(lambda: _kv(registry) == (21, 59))
        await end(busy)


async def test_a_pin_is_about_the_model_as_configured_also_for_sleep() -> None:
    host = _variants()
    host.entries["A"]["pinned"] = True
    async with host.registry() as registry:
        for key in (OWN, INT4):
            await leased(registry, key)
        await (await registry.sleep(INT4))
        with pytest.raises(ModelPinnedError):
            await (await registry.sleep("A"))


async def test_a_request_whose_model_is_told_to_leave_in_the_same_moment_is_served() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        await leased(registry, "A")
        variant, states = ServedVariant("A", registry.engine("A"), registry), []

        async def work() -> None:
            async with variant.lease() as info:
                states.append((registry.engine("A").state, info.weights_bytes))

        working = asyncio.create_task(work())
        unloading = asyncio.create_task(registry.unload("A"))
        await working
        assert states == [("draining", 60)]
        await (await unloading)


async def test_a_giver_that_dies_in_the_middle_frees_its_bytes_with_its_process() -> None:
    host = _elastic()
    async with host.registry() as registry:
        busy = await _move_in_flight(host, registry)
        a = host.engine("A")
        a.state, a.reason = "failed", "it keeps dying"
        await reaches(registry, "A", State.UNLOADED)
        a.may_move.set()
        await settle()
        assert _kv(registry) == (0, 50) and registry.state.ledger.used[HOST] == 60
        await end(busy)


async def test_kv_memory_that_is_on_its_way_stays_within_a_budget_that_shrinks() -> None:
    host = _elastic()
    async with host.registry() as registry:
        busy = await _move_in_flight(host, registry)
        await change_budget(registry, HOST, 92)
        host.engine("A").may_move.set()
        await _until(
            lambda: registry.state.ledger.used[HOST] <= 92 and registry.state.records[OWN].giving is None
        )
        assert (_kv(registry), host.engine("B").kv_limits) == ((21, 50), [50]), "A's 9 bytes are needed here"
        assert registry.engine("A").state == registry.engine("B").state == "ready"
        await end(busy)


@pytest.mark.parametrize("mode", [None, UnloadMode.ABORT])
async def test_the_end_waits_for_no_kv_memory_on_its_way(mode: UnloadMode | None) -> None:
    host = _elastic()
    registry = host.make()
    registry.start()
    busy = await _move_in_flight(host, registry)
    if mode is not None:
        await registry.unload("A", mode)
    began = time.monotonic()
    await registry.close()
    assert time.monotonic() - began < 1 and host.engine("A").closed and host.engine("B").closed
    await end(busy)


async def test_the_end_waits_for_no_sleep_and_no_waking() -> None:
    host = _variants(budget=200)
    registry = host.make()
    registry.start()
    for key in (OWN, INT4):
        await leased(registry, key)
    await (await registry.sleep(INT4))
    host.engine(str(INT4)).may_move.clear()
    host.engine("A").may_move.clear()
    operations = [await registry.wake(INT4), await registry.sleep("A")]
    assert [registry.engine(key).state for key in (OWN, INT4)] == ["sleeping", "waking"]
    began = time.monotonic()
    await registry.close()
    assert time.monotonic() - began < 1 and all(operation.state == "failed" for operation in operations)


async def test_a_worker_that_dies_with_work_aboard_ends_it_though_a_variant_sleeps() -> None:
    host = _variants()
    async with host.registry() as registry:
        await leased(registry, INT4)
        await (await registry.sleep(INT4))
        using = await holder(registry, OWN)
        host.engine("A").state = "failed"
        with pytest.raises(EngineFailedError):
            await using
        assert registry.engine(INT4).state == "asleep"

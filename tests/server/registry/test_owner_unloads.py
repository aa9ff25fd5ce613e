"""The owner with fake engines: what administrators end, and how."""

from __future__ import annotations

import asyncio

import pytest

from memory_efficient_gpt_server.errors import (
    ModelBusyError,
    ModelPinnedError,
    ModelUnloadingError,
)
from memory_efficient_gpt_server.registry.events import UnloadMode
from memory_efficient_gpt_server.registry.owner import Registry
from tests.server.registry.fake_engines import FakeHost
from tests.server.registry.holders import end, holder, leased, settle


async def test_an_unload_waits_for_the_work_under_way() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        using = await holder(registry, "A")
        unloaded = await registry.unload("A")
        await settle()
        assert not unloaded.done() and registry.engine("A").state == "draining"
        await end(using)
        await unloaded
        assert registry.engine("A").state == "unloaded"


async def test_an_abort_ends_the_work_with_an_error() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        using = await holder(registry, "A")
        await (await registry.unload("A", UnloadMode.ABORT))
        with pytest.raises(ModelUnloadingError):
            await using


async def test_an_abort_that_became_another_error_leaves_no_cancellation_behind() -> None:
    host = FakeHost()
    entered = asyncio.Event()

    async def fail_when_cut(registry: Registry) -> None:
        async with registry.lease("A"):
            entered.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ValueError("its own") from None

    async def work(registry: Registry) -> int:
        with pytest.raises(ValueError, match="its own"):
            await fail_when_cut(registry)
        task = asyncio.current_task()
        assert task is not None
        return task.cancelling()

    async with host.registry() as registry:
        working = asyncio.create_task(work(registry))
        await entered.wait()
        await (await registry.unload("A", UnloadMode.ABORT))
        assert await working == 0


async def test_an_abort_of_a_request_whose_client_leaves_ends_as_a_cancellation() -> None:
    async with FakeHost().registry() as registry:
        lease = registry.lease("A")
        entered = asyncio.Event()

        async def work() -> None:
            async with lease:
                entered.set()
                await asyncio.Event().wait()

        working = asyncio.create_task(work())
        await entered.wait()
        lease.abort(ModelUnloadingError("it is unloaded"))
        working.cancel()
        with pytest.raises(asyncio.CancelledError):
            await working


async def test_a_drain_has_a_deadline() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        using = await holder(registry, "A")
        await (await registry.unload("A", deadline_s=0.05))
        with pytest.raises(ModelUnloadingError):
            await using


async def test_what_is_pinned_or_in_use_is_not_unloaded() -> None:
    host = FakeHost(sizes={"A": 40, "B": 40})
    host.entries["B"]["pinned"] = True
    async with host.registry() as registry:
        using = await holder(registry, "A")
        with pytest.raises(ModelBusyError):
            await (await registry.unload("A", UnloadMode.IF_IDLE))
        await (await registry.load("B"))
        with pytest.raises(ModelPinnedError):
            await (await registry.unload("B"))
        await end(using)
        await leased(registry, "C")
        assert registry.engine("B").state == "ready" and registry.engine("A").state == "unloaded"

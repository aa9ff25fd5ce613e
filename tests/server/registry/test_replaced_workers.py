"""Workers that die while a model is loaded: who comes meanwhile waits for the next one, as for a load."""

from __future__ import annotations

import asyncio

import pytest

from memory_efficient_gpt_server.errors import ModelLoadingError
from memory_efficient_gpt_server.registry.effects import (
    Finish,
    GrantLease,
    RefusalKind,
    Refuse,
    StartLoad,
    StartUnload,
)
from memory_efficient_gpt_server.registry.events import (
    AdminLoad,
    AdminSleep,
    Asked,
    LeaseReleased,
    ProcessGone,
    WorkerBack,
    WorkerDied,
    WorkerLost,
)
from memory_efficient_gpt_server.registry.records import Policy
from tests.server.registry.fake_engines import FakeHost
from tests.server.registry.holders import end, holder, leased, settle
from tests.server.registry.registry_driver import A, Driver, size

OPERATION = 1000


def test_who_comes_while_a_worker_is_replaced_is_served_by_the_next_one() -> None:
    driver = Driver()
    lease = driver.load(A)
    driver.feed(WorkerLost(A))
    waiter = driver.ask(A)
    assert driver.effects == () and driver.record(A).leases == {lease}
    driver.feed(WorkerBack(A), 1.5)
    assert driver.only(GrantLease) == GrantLease(waiter, A)
    assert driver.record(A).leases == {lease, waiter}


def test_the_wait_for_the_next_worker_ends_as_that_for_a_load() -> None:
    driver = Driver(Policy(max_wait_s=30.0))
    driver.load_idle(A)
    driver.feed(WorkerLost(A))
    driver.ask(A)
    driver.tick(31.0)
    assert driver.only(Refuse).kind is RefusalKind.MODEL_LOADING
    driver.feed(Asked(OPERATION, A, size(), 0.0))
    assert driver.only(Refuse).kind is RefusalKind.MODEL_NOT_LOADED


def test_if_no_worker_follows_the_model_is_loaded_for_who_waits() -> None:
    driver = Driver()
    driver.load_idle(A)
    driver.feed(WorkerLost(A))
    driver.ask(A)
    driver.feed(WorkerDied(A, "it keeps dying"))
    assert driver.only(StartUnload).key == A and not driver.all(Refuse)
    driver.feed(ProcessGone(A))
    assert driver.only(StartLoad).key == A


def test_a_model_whose_worker_is_replaced_does_not_fall_asleep() -> None:
    driver = Driver()
    driver.load_idle(A, size(can_sleep=True))
    driver.feed(WorkerLost(A))
    driver.feed(AdminSleep(OPERATION, A))
    refused = driver.only(Refuse)
    assert refused.kind is RefusalKind.WRONG_STATE and "being replaced" in str(refused.detail)


def test_an_administrators_load_is_done_when_the_next_worker_is_ready() -> None:
    driver = Driver()
    driver.load_idle(A)
    driver.feed(WorkerLost(A))
    driver.feed(AdminLoad(OPERATION, A, size()))
    assert not driver.all(Finish)
    driver.feed(WorkerBack(A))
    assert driver.only(Finish) == Finish(OPERATION)


def test_a_lease_that_ends_while_its_worker_is_replaced_is_given_back() -> None:
    driver = Driver()
    lease = driver.load(A)
    driver.feed(WorkerLost(A))
    driver.feed(LeaseReleased(lease, A))
    assert not driver.record(A).leases


async def test_a_request_waits_though_the_worker_died_only_now() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        holding = await holder(registry, "A")
        engine = host.engine("A")
        engine.state = "loading"
        asking = asyncio.create_task(leased(registry, "A"))
        await settle()
        assert not asking.done()
        engine.state = "ready"
        async with asyncio.timeout(2):
            await asking
        await end(holding)


async def test_who_waits_for_no_load_does_not_wait_for_the_next_worker_either() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        await leased(registry, "A")
        host.engine("A").state = "loading"
        with pytest.raises(ModelLoadingError):
            async with registry.lease("A", 0.0):
                pass
        host.engine("A").state = "ready"

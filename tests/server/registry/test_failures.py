"""What counts as a failed load, and how long a variant is left alone for it."""

from __future__ import annotations

import pytest

from memory_efficient_gpt_server.errors import LoadFailedError
from memory_efficient_gpt_server.registry.effects import GrantLease, RefusalKind, Refuse, StartLoad
from memory_efficient_gpt_server.registry.events import AdminLoad, AdminSleep, Loaded, LoadFailed, WorkerDied
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.model_view import model_view
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST
from tests.server.registry.fake_engines import FakeHost
from tests.server.registry.holders import leased, settle
from tests.server.registry.registry_driver import GPU, A, Driver, size

OPERATION = 1000
SLEEPY = {GPU: Budget(100), HOST: Budget(1000)}


def test_workers_that_die_in_their_sleep_are_replaced_however_often() -> None:
    driver, estimate = Driver(budgets=SLEEPY), size(60, can_sleep=True)
    for turn in range(5):
        driver.load_idle(A, estimate)
        driver.feed(AdminSleep(OPERATION + turn, A))
        if turn % 2:
            driver.slept(A)
        driver.feed(WorkerDied(A, "SIGKILL in its sleep"))
        driver.gone(A)
    assert driver.record(A).state is State.UNLOADED
    driver.ask(A, estimate)
    assert driver.only(StartLoad).key == A


def test_a_load_that_succeeds_makes_good_for_those_that_failed() -> None:
    driver = Driver()
    for _ in range(2):
        _fail(driver)
    driver.ask(A, after_s=5.0)
    driver.feed(Loaded(A, size()))
    assert driver.all(GrantLease) and driver.record(A).strikes_s == ()


def test_an_administrators_load_that_fails_too_does_not_shorten_the_pause() -> None:
    driver = Driver()
    for _ in range(3):
        _fail(driver)
    driver.feed(AdminLoad(OPERATION, A, size()), 10.0)
    assert driver.only(StartLoad).key == A, "an administrator's load is tried at once"
    driver.feed(LoadFailed(A, "damaged"))
    assert driver.only(Refuse).waiter == OPERATION
    driver.gone(A)
    driver.ask(A, after_s=60.0)
    refused = driver.only(Refuse)
    assert refused.kind is RefusalKind.LOAD_FAILED and (refused.retry_after_s or 0) > 600


def _fail(driver: Driver) -> None:
    driver.ask(A, after_s=10.0)
    driver.feed(LoadFailed(A, "damaged"))
    driver.gone(A)


# ---- checkpoints that can't even be looked at


async def test_an_unusable_checkpoint_is_a_failed_load_counted_shown_and_not_retried_at_once() -> None:
    host = FakeHost()
    host.broken = {"A"}
    async with host.registry() as registry:
        for _ in range(4):
            with pytest.raises(LoadFailedError, match=r"weights\.safetensors is truncated"):
                await leased(registry, "A")
        view = model_view(registry, registry.hosted("A").key)
        assert (view["state"], view["estimated_bytes"]) == ("failed", None)
        assert "truncated" in view["reason"] and view["retry_in_s"] > 0
        assert registry.tally.loads == {("A", "failure"): 1}, "those that follow are told of the pause"


async def test_an_administrators_load_of_an_unusable_checkpoint_is_an_operation_that_failed() -> None:
    host = FakeHost()
    host.broken = {"A"}
    async with host.registry() as registry:
        operation = await registry.load("A")
        with pytest.raises(LoadFailedError, match="truncated"):
            operation.result()
        assert [(o.what, o.state) for o in registry.operations] == [("load", "failed")]
        host.broken = set()
        await (await registry.load("A"))  # tried at once
        await leased(registry, "A")


async def test_a_model_that_was_never_loaded_was_idle_for_no_time() -> None:
    host = FakeHost()
    async with host.registry() as registry:
        with pytest.raises(Exception, match="not loaded"):
            async with registry.lease("A", 0.0):
                pass
        key = registry.hosted("A").key
        assert model_view(registry, key)["idle_s"] is None
        await leased(registry, "A")
        await settle()
        assert 0 <= model_view(registry, key)["idle_s"] < 5
        assert model_view(registry, key)["measured_bytes"]
        await (await registry.unload("A"))
        assert model_view(registry, key)["measured_bytes"] is None

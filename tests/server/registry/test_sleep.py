"""Models that sleep: on the host only their KV cache goes; who puts them to sleep, wakes or ends them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from memory_efficient_gpt_server.registry.effects import (
    Finish,
    GrantLease,
    RefusalKind,
    Refuse,
    StartLoad,
    StartSleep,
    StartUnload,
    StartWake,
    UnloadReason,
)
from memory_efficient_gpt_server.registry.events import (
    AdminSleep,
    AdminUnload,
    AdminWake,
    KvMoved,
    KvWanted,
    LeaseReleased,
    Loaded,
    Slept,
    Woke,
    WorkerDied,
)
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.planning import LoadRequest, Verdict, plan
from memory_efficient_gpt_server.registry.records import Policy
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST, Estimate
from tests.server.registry.registry_driver import GPU, A, B, C, Driver, size

SLEEPY = {GPU: Budget(100), HOST: Budget(200)}
OPERATION = 900


def on_host(weights_bytes: int, kv_bytes: int) -> Estimate:
    """A model of a CPU-only machine."""
    return Estimate(
        device=HOST, weights_bytes=weights_bytes, kv_bytes=kv_bytes, can_sleep=kv_bytes > 0
    )  # fmt: skip


def refusal(driver: Driver) -> Refuse:
    return driver.only(Refuse)


def asleep(driver: Driver, estimate: Estimate) -> None:
    driver.load_idle(A, estimate)
    driver.feed(AdminSleep(OPERATION, A))
    driver.slept(A)
    assert driver.record(A).state is State.ASLEEP


# ---- on the host


def test_on_the_host_a_model_sleeps_if_its_kv_cache_is_enough_and_wakes_for_it_alone() -> None:
    driver = Driver(budgets={HOST: Budget(100)})
    driver.load_idle(A, on_host(50, 30))
    waiter = driver.ask(B, on_host(40, 10))
    assert driver.only(StartSleep).key == A and not driver.all(StartUnload)
    assert driver.used(HOST) == 80, "what is being freed is in use"
    driver.slept(A)
    assert driver.used(HOST) == 50 + 50 and driver.only(StartLoad).key == B
    driver.feed(Loaded(B, on_host(40, 10)), 1.0)
    driver.feed(LeaseReleased(waiter, B))
    waiter = driver.ask(A, on_host(50, 30))
    (unloaded,) = driver.all(StartUnload)
    assert unloaded.key == B and not driver.all(StartSleep), "its 10 are not enough for 30"
    driver.gone(B)
    assert driver.only(StartWake).key == A and driver.used(HOST) == 80
    driver.feed(Woke(A, on_host(50, 30)))
    assert driver.only(GrantLease).waiter == waiter and driver.used(HOST) == 80


def test_on_the_host_a_model_is_unloaded_if_its_kv_cache_is_not_enough() -> None:
    driver = Driver(budgets={HOST: Budget(100)})
    driver.load_idle(A, on_host(50, 30))
    assert plan(LoadRequest(B, on_host(50, 0)), driver.state, 1.0).sleep == (A,)
    assert plan(LoadRequest(B, on_host(51, 0)), driver.state, 1.0).evict == (A,)
    driver.ask(B, on_host(51, 0))
    assert driver.only(StartUnload).key == A


def test_on_the_host_several_models_sleep_together_before_one_is_unloaded() -> None:
    driver = Driver(budgets={HOST: Budget(100)})
    driver.load_idle(A, on_host(30, 20))
    driver.load_idle(B, on_host(30, 20))
    its_plan = plan(LoadRequest(C, on_host(40, 0)), driver.state, 10.0)
    assert set(its_plan.sleep) == {A, B} and its_plan.evict == ()


def test_a_model_that_has_given_its_kv_cache_away_is_unloaded() -> None:
    driver = Driver(budgets={HOST: Budget(100)}, kv_soft_limit_bytes=0)
    driver.load_idle(A, replace(on_host(50, 30), kv_least_bytes=0, kv_most_bytes=30))
    driver.load(B, Estimate(device=HOST, weights_bytes=10, kv_bytes=10, kv_least_bytes=10, kv_most_bytes=40))
    driver.feed(KvWanted(B, 30))
    driver.feed(KvMoved(A, 30))
    assert driver.used(HOST) == 50 + 10 + 40
    its_plan = plan(LoadRequest(C, on_host(50, 0)), driver.state, driver.now_s)
    assert (its_plan.evict, its_plan.sleep) == ((A,), ())


def test_on_the_host_a_drained_model_sleeps_if_that_is_enough() -> None:
    for needed, effect in ((50, StartSleep), (51, StartUnload)):
        driver = Driver(Policy(patience_s=0.0), budgets={HOST: Budget(100)})
        lease = driver.load(A, on_host(50, 30))
        driver.ask(B, on_host(needed, 0))
        assert driver.record(A).state is State.DRAINING
        driver.feed(LeaseReleased(lease, A))
        assert driver.states()["A"] == ("sleeping" if effect is StartSleep else "unloading")
        assert len(driver.all(effect)) == 1


# ---- administrators


def test_sleep_and_wake_are_done_at_once_where_there_is_nothing_to_do() -> None:
    driver = Driver(budgets=SLEEPY)
    driver.load_idle(A, size(60, can_sleep=True))
    driver.feed(AdminWake(OPERATION, A))
    assert driver.all(Finish) == [Finish(OPERATION)] and not driver.all(StartWake)
    driver.feed(AdminSleep(OPERATION + 1, A))
    driver.feed(AdminSleep(OPERATION + 2, A))
    assert not driver.effects, "it is under way for both"
    assert driver.slept(A) == (Finish(OPERATION + 1), Finish(OPERATION + 2))
    assert driver.feed(AdminSleep(OPERATION + 3, A)) == (Finish(OPERATION + 3),)
    assert driver.record(A).life.reason == UnloadReason.ADMIN


@pytest.mark.parametrize(
    ("estimate", "entry", "kind", "told"),
    [
        (size(60), {}, RefusalKind.WRONG_STATE, "nothing to give back"),
        (size(60, can_sleep=True), {"pinned": True}, RefusalKind.MODEL_PINNED, ""),
        (size(90, can_sleep=True), {}, RefusalKind.INSUFFICIENT_MEMORY, "90 bytes of host memory, where 80"),
    ],
)
def test_a_sleep_that_can_not_be_says_why(
    estimate: Estimate, entry: dict[str, Any], kind: RefusalKind, told: str
) -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(80)}, **entry)
    driver.load_idle(A, estimate)
    driver.feed(AdminSleep(OPERATION, A))
    assert refusal(driver).kind is kind and told in (refusal(driver).detail or "")
    assert driver.record(A).state is State.READY


def test_states_that_neither_sleep_nor_wake_are_named() -> None:
    driver = Driver(budgets=SLEEPY)
    driver.feed(AdminSleep(OPERATION, A))
    assert "it is unloaded; only a ready one can sleep" in str(refusal(driver).detail)
    driver.ask(A, size(60, can_sleep=True))
    driver.feed(AdminSleep(OPERATION + 1, A))
    assert "it is loading" in str(refusal(driver).detail)
    driver.feed(AdminWake(OPERATION + 2, B))
    assert "it is unloaded; only a sleeping one can wake" in str(refusal(driver).detail)


def test_a_sleeper_that_someone_waits_for_is_busy() -> None:
    driver = Driver(budgets=SLEEPY)
    asleep(driver, size(60, can_sleep=True))
    driver.load(B, size(100))  # in use, so A can't wake
    driver.ask(A, size(60, can_sleep=True))
    driver.feed(AdminSleep(OPERATION + 1, A))
    assert refusal(driver).kind is RefusalKind.MODEL_BUSY


# ---- what follows by itself


def test_a_sleeper_leaves_after_its_idle_time() -> None:
    driver = Driver(budgets=SLEEPY, ttl_s=10.0)
    asleep(driver, size(60, can_sleep=True))
    driver.tick(9.0)
    assert driver.record(A).state is State.ASLEEP
    driver.tick(1.0)
    assert driver.only(StartUnload).reason is UnloadReason.TTL


def test_a_sleeper_that_someone_waits_for_outlives_its_idle_time() -> None:
    driver = Driver(budgets=SLEEPY, ttl_s=10.0)
    asleep(driver, size(60, can_sleep=True))
    lease = driver.load(B, size(100))
    driver.ask(A, size(60, can_sleep=True))
    driver.tick(15.0)
    assert driver.record(A).state is State.ASLEEP and lease in driver.record(B).leases


def test_what_parked_weights_really_take_is_booked() -> None:
    driver = Driver(budgets=SLEEPY)
    driver.load_idle(A, size(60, can_sleep=True))
    driver.feed(AdminSleep(OPERATION, A))
    driver.feed(Slept(A, 3, 64))
    assert (driver.used(GPU), driver.used(HOST)) == (3, 64)


def test_what_parked_weights_really_take_is_booked_though_the_process_is_being_ended() -> None:
    driver = Driver(budgets=SLEEPY)
    driver.load_idle(A, size(60, can_sleep=True))
    driver.feed(AdminSleep(OPERATION, A))
    driver.feed(AdminUnload(OPERATION + 1, A))
    driver.feed(Slept(A, 3, 64))
    assert (driver.used(GPU), driver.used(HOST)) == (60, 64)
    driver.gone(A)
    assert (driver.used(GPU), driver.used(HOST)) == (0, 0)


def test_more_parked_bytes_than_there_is_room_for_end_the_sleeper() -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(60)})
    driver.load_idle(A, size(60, can_sleep=True))
    driver.feed(AdminSleep(OPERATION, A))
    driver.feed(Slept(A, 3, 64))
    assert driver.only(StartUnload).reason is UnloadReason.OVERCOMMIT


@pytest.mark.parametrize("state", ["sleeping", "asleep", "waking"])
def test_a_worker_that_dies_in_its_sleep_is_loaded_anew_for_who_waits(state: str) -> None:
    driver = Driver(budgets=SLEEPY)
    estimate = size(60, can_sleep=True)
    driver.load_idle(A, estimate)
    driver.feed(AdminSleep(OPERATION, A))
    if state != "sleeping":
        driver.slept(A)
    if state == "waking":
        driver.ask(A, estimate)
    assert driver.record(A).state == state
    driver.feed(WorkerDied(A, "killed"))
    waiter = driver.ask(A, estimate) if state != "waking" else 2
    driver.gone(A)
    assert driver.only(StartLoad).key == A and driver.used(HOST) == 0
    driver.feed(Loaded(A, estimate))
    assert driver.only(GrantLease).waiter == waiter


def test_a_plan_for_a_sleeper_says_how_long_it_takes_to_wake() -> None:
    driver = Driver(budgets=SLEEPY)
    asleep(driver, size(60, can_sleep=True))
    driver.feed(AdminWake(OPERATION + 1, A))
    driver.feed(Woke(A, size(60, can_sleep=True)), 0.25)
    driver.feed(AdminSleep(OPERATION + 2, A))
    driver.slept(A)
    its_plan = plan(LoadRequest(A, size(60, can_sleep=True)), driver.state, driver.now_s)
    assert (its_plan.verdict, its_plan.eta_s) == (Verdict.NOW, 0.25)

"""What administrators bring about."""

from __future__ import annotations

import pytest

from memory_efficient_gpt_server.registry.effects import (
    Abort,
    AbortReason,
    Finish,
    GrantLease,
    RefusalKind,
    Refuse,
    StartLoad,
    StartUnload,
    StartWake,
    UnloadReason,
)
from memory_efficient_gpt_server.registry.events import (
    AdminCancel,
    AdminLoad,
    AdminSleep,
    AdminUnload,
    AdminWake,
    LeaseReleased,
    Loaded,
    LoadFailed,
    Removed,
    UnloadMode,
    Woke,
)
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST, VariantKey
from tests.server.registry.registry_driver import GPU, A, B, Driver, size

OPERATION = 900
SLEEPY = {GPU: Budget(100), HOST: Budget(100)}


def _refusal(driver: Driver) -> RefusalKind:
    refusal = driver.only(Refuse)
    assert refusal.waiter == OPERATION
    return refusal.kind


def _unload(driver: Driver, mode: UnloadMode, deadline_s: float | None = None) -> None:
    driver.feed(AdminUnload(OPERATION, A, mode, deadline_s))


# ---- load


def test_a_load_without_a_request_is_finished_when_ready_and_takes_no_lease() -> None:
    driver = Driver()
    driver.feed(AdminLoad(OPERATION, A, size()))
    driver.feed(Loaded(A, size()))
    assert driver.only(Finish) == Finish(OPERATION)
    assert driver.record(A).leases == frozenset()
    driver.feed(AdminLoad(OPERATION + 1, A, size()))
    assert driver.only(Finish) == Finish(OPERATION + 1)


def test_an_administrator_may_retry_what_is_blocked_by_failures() -> None:
    driver = Driver()
    for _ in range(3):
        driver.ask(A, after_s=10.0)
        driver.feed(LoadFailed(A, "damaged"))
        driver.gone(A)
    driver.feed(AdminLoad(OPERATION, A, size()))
    assert driver.only(StartLoad).key == A
    driver.feed(LoadFailed(A, "damaged"))
    assert _refusal(driver) is RefusalKind.LOAD_FAILED


def test_a_load_of_an_unknown_model_or_one_too_large_is_refused() -> None:
    driver = Driver()
    driver.feed(AdminLoad(OPERATION, VariantKey("D"), size()))
    assert _refusal(driver) is RefusalKind.MODEL_NOT_FOUND
    driver.feed(AdminLoad(OPERATION, A, size(101)))
    assert _refusal(driver) is RefusalKind.INSUFFICIENT_MEMORY


# ---- unload


def test_a_drain_lets_streams_end_and_refuses_new_ones() -> None:
    driver = Driver()
    lease = driver.load(A)
    _unload(driver, UnloadMode.DRAIN)
    assert driver.record(A).state is State.DRAINING
    driver.ask(A)
    assert driver.only(Refuse).kind is RefusalKind.DRAINING
    assert driver.tick(10_000.0) == ()
    driver.feed(LeaseReleased(lease, A))
    assert driver.only(StartUnload).reason is UnloadReason.ADMIN
    driver.ask(A)
    assert driver.only(Refuse).kind is RefusalKind.DRAINING
    assert driver.gone(A) == (Finish(OPERATION),)
    driver.ask(A)
    assert driver.only(StartLoad).key == A


def test_a_drain_deadline_cuts_what_is_left() -> None:
    driver = Driver()
    lease = driver.load(A)
    _unload(driver, UnloadMode.DRAIN, deadline_s=30.0)
    assert driver.tick(29.0) == ()
    driver.tick(1.0)
    assert driver.only(Abort) == Abort(lease, A, AbortReason.DRAIN_DEADLINE)
    assert driver.only(StartUnload).key == A


def test_a_second_drain_can_only_shorten_the_deadline() -> None:
    driver = Driver()
    driver.load(A)
    _unload(driver, UnloadMode.DRAIN, deadline_s=30.0)
    driver.feed(AdminUnload(OPERATION + 1, A, UnloadMode.DRAIN, None))
    assert driver.record(A).drain_deadline_s == pytest.approx(driver.now_s + 30.0)
    driver.feed(AdminUnload(OPERATION + 2, A, UnloadMode.DRAIN, 10.0))
    assert driver.record(A).drain_deadline_s == pytest.approx(driver.now_s + 10.0)
    driver.tick(10.0)
    driver.gone(A)
    assert [f.operation for f in driver.all(Finish)] == [OPERATION, OPERATION + 1, OPERATION + 2]


def test_a_drain_by_an_administrator_is_not_called_off_with_the_load_it_began_for() -> None:
    driver = Driver()
    lease = driver.load(A)
    driver.ask(B)
    driver.tick(20.0)
    assert driver.record(A).drain_for == B
    _unload(driver, UnloadMode.DRAIN)
    driver.feed(AdminUnload(OPERATION + 1, B, UnloadMode.ABORT))
    assert driver.record(A).state is State.DRAINING
    driver.feed(LeaseReleased(lease, A))
    assert driver.only(StartUnload).key == A


def test_an_abort_cuts_at_once() -> None:
    driver = Driver()
    lease = driver.load(A)
    _unload(driver, UnloadMode.ABORT)
    assert driver.effects == (Abort(lease, A, AbortReason.ADMIN), StartUnload(A, UnloadReason.ADMIN))


def test_if_idle_refuses_while_anyone_uses_it_or_waits() -> None:
    driver = Driver()
    driver.ask(A)
    _unload(driver, UnloadMode.IF_IDLE)
    assert _refusal(driver) is RefusalKind.MODEL_BUSY
    driver.feed(Loaded(A, size()))
    _unload(driver, UnloadMode.IF_IDLE)
    assert _refusal(driver) is RefusalKind.MODEL_BUSY
    driver.feed(LeaseReleased(1, A))
    _unload(driver, UnloadMode.IF_IDLE)
    assert driver.only(StartUnload).key == A


def test_a_pinned_model_is_not_unloaded() -> None:
    driver = Driver(pinned=True)
    driver.load(A)
    _unload(driver, UnloadMode.ABORT)
    assert _refusal(driver) is RefusalKind.MODEL_PINNED


def test_an_unload_during_a_load_ends_it_and_refuses_who_waits() -> None:
    driver = Driver()
    waiter = driver.ask(A)
    _unload(driver, UnloadMode.DRAIN)
    refusal = driver.only(Refuse)
    assert (refusal.waiter, refusal.kind) == (waiter, RefusalKind.DRAINING)
    assert driver.only(StartUnload).key == A
    assert driver.feed(Loaded(A, size())) == ()
    assert driver.gone(A) == (Finish(OPERATION),)


def test_an_unload_of_what_is_not_loaded_is_finished_at_once() -> None:
    driver = Driver()
    _unload(driver, UnloadMode.DRAIN)
    assert driver.only(Finish).operation == OPERATION
    driver.load(B)
    waiter = driver.ask(A)
    _unload(driver, UnloadMode.DRAIN)
    assert driver.only(Refuse).waiter == waiter
    assert driver.only(Finish).operation == OPERATION
    assert driver.record(A).state is State.UNLOADED


def test_an_unload_of_a_failed_model_forgets_its_failures() -> None:
    driver = Driver()
    driver.ask(A)
    driver.feed(LoadFailed(A, "damaged"))
    driver.gone(A)
    _unload(driver, UnloadMode.DRAIN)
    driver.ask(A)
    assert driver.only(StartLoad).key == A


# ---- sleep and wake


def test_an_idle_model_sleeps_and_wakes_on_request() -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(60)})
    driver.load_idle(A, size(60, can_sleep=True))
    driver.feed(AdminSleep(OPERATION, A))
    assert driver.slept(A) == (Finish(OPERATION),)
    assert (driver.used(GPU), driver.used(HOST)) == (0, 60)
    driver.feed(AdminWake(OPERATION + 1, A))
    assert driver.only(StartWake).key == A
    assert driver.feed(Woke(A, size(60, can_sleep=True))) == (Finish(OPERATION + 1),)


def test_sleep_is_refused_where_it_is_impossible() -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(59)})
    driver.feed(AdminSleep(OPERATION, A))
    assert _refusal(driver) is RefusalKind.WRONG_STATE
    lease = driver.load(A, size(60, can_sleep=True))
    driver.feed(AdminSleep(OPERATION, A))
    assert _refusal(driver) is RefusalKind.MODEL_BUSY
    driver.feed(LeaseReleased(lease, A))
    driver.feed(AdminSleep(OPERATION, A))
    assert _refusal(driver) is RefusalKind.INSUFFICIENT_MEMORY
    driver.feed(AdminWake(OPERATION, B))
    assert _refusal(driver) is RefusalKind.WRONG_STATE


def test_an_unload_ends_a_model_that_falls_asleep_and_answers_both() -> None:
    driver = Driver(budgets=SLEEPY)
    driver.load_idle(A, size(60, can_sleep=True))
    driver.feed(AdminSleep(OPERATION, A))
    driver.feed(AdminUnload(OPERATION + 1, A))
    assert _refusal(driver) is RefusalKind.WRONG_STATE
    driver.slept(A)
    assert driver.gone(A) == (Finish(OPERATION + 1),)
    assert driver.used(HOST) == 0


def test_who_asks_while_a_model_falls_asleep_wakes_it() -> None:
    driver = Driver(budgets=SLEEPY)
    estimate = size(60, can_sleep=True)
    driver.load_idle(A, estimate)
    driver.feed(AdminSleep(OPERATION, A))
    waiter = driver.ask(A, estimate)
    assert driver.slept(A) == (Finish(OPERATION), StartWake(A, 0))
    driver.feed(Woke(A, estimate))
    assert driver.only(GrantLease).waiter == waiter


# ---- the table of models


def test_a_model_is_forgotten_only_when_nothing_of_it_is_left() -> None:
    driver = Driver()
    driver.load_idle(A)
    driver.feed(Removed(OPERATION, "A"))
    assert _refusal(driver) is RefusalKind.MODEL_BUSY
    driver.feed(AdminUnload(OPERATION, A))
    driver.gone(A, lost=True)
    driver.feed(Removed(OPERATION, "A"))
    assert _refusal(driver) is RefusalKind.MODEL_BUSY  # its leak must keep a name
    driver = Driver()
    driver.load_idle(A)
    driver.feed(AdminUnload(OPERATION, A))
    driver.gone(A)
    driver.feed(Removed(OPERATION, "A"))
    assert driver.only(Finish).operation == OPERATION
    driver.ask(A)
    assert driver.only(Refuse).kind is RefusalKind.MODEL_NOT_FOUND
    driver.feed(Removed(OPERATION, "A"))
    assert _refusal(driver) is RefusalKind.MODEL_NOT_FOUND


# ---- calling an operation off


def _cancel(driver: Driver, key: VariantKey, target: int) -> tuple[RefusalKind, ...]:
    """What the operation, and then whoever called it off, were refused with."""
    driver.feed(AdminCancel(OPERATION + 50, key, target))
    return tuple([refusal.kind for refusal in driver.all(Refuse)])


def test_a_load_that_only_the_administrator_wanted_is_stopped() -> None:
    driver = Driver()
    driver.feed(AdminLoad(OPERATION, A, size()))
    assert _cancel(driver, A, OPERATION) == (RefusalKind.CANCELLED,)
    assert driver.only(StartUnload) == StartUnload(A, UnloadReason.ADMIN)
    assert driver.only(Finish).operation == OPERATION + 50
    driver.gone(A)
    assert driver.record(A).state is State.UNLOADED and driver.used() == 0


def test_a_load_that_others_wait_for_goes_on() -> None:
    driver = Driver()
    driver.feed(AdminLoad(OPERATION, A, size()))
    waiter = driver.ask(A)
    assert _cancel(driver, A, OPERATION) == (RefusalKind.CANCELLED,)
    assert not driver.all(StartUnload)
    driver.feed(Loaded(A, size()))
    assert driver.all(GrantLease) == [GrantLease(waiter, A)] and not driver.all(Finish)


def test_a_load_that_has_not_begun_is_forgotten() -> None:
    driver = Driver()
    driver.load(A)
    driver.feed(AdminLoad(OPERATION, B, size()))
    assert driver.record(B).state is State.QUEUED
    assert _cancel(driver, B, OPERATION) == (RefusalKind.CANCELLED,)
    assert driver.record(B).state is State.UNLOADED and B not in driver.state.queue


def test_a_drain_ends_and_the_model_serves_again() -> None:
    driver = Driver()
    lease = driver.load(A)
    driver.feed(AdminUnload(OPERATION, A, UnloadMode.DRAIN, 9.0))
    driver.ask(A)
    assert driver.only(Refuse).kind is RefusalKind.DRAINING
    driver.feed(AdminLoad(OPERATION + 1, A, size()))
    assert _cancel(driver, A, OPERATION) == (RefusalKind.CANCELLED,)
    assert [finish.operation for finish in driver.all(Finish)] == [OPERATION + 50, OPERATION + 1]
    assert driver.record(A).state is State.READY
    granted = driver.ask(A)
    driver.tick(20.0)
    assert driver.record(A).leases == {lease, granted}, "the deadline was called off, too"


def test_a_drain_that_another_administrator_wants_goes_on() -> None:
    driver = Driver()
    lease = driver.load(A)
    driver.feed(AdminUnload(OPERATION, A))
    driver.feed(AdminUnload(OPERATION + 1, A, UnloadMode.DRAIN, 9.0))
    assert _cancel(driver, A, OPERATION) == (RefusalKind.CANCELLED,)
    driver.feed(LeaseReleased(lease, A))
    assert driver.all(StartUnload) == [StartUnload(A, UnloadReason.ADMIN)]
    driver.gone(A)
    assert driver.only(Finish).operation == OPERATION + 1


def test_what_cannot_be_stopped_half_way_is_refused_and_goes_on() -> None:
    driver = Driver(budgets=SLEEPY)
    driver.load_idle(A, size(can_sleep=True))
    driver.feed(AdminSleep(OPERATION, A))
    assert _cancel(driver, A, OPERATION) == (RefusalKind.WRONG_STATE,)
    driver.slept(A)
    assert driver.only(Finish).operation == OPERATION
    assert _cancel(driver, A, OPERATION) == (RefusalKind.WRONG_STATE,), "it has ended"
    driver.feed(AdminUnload(OPERATION + 1, A))
    assert _cancel(driver, A, OPERATION + 1) == (RefusalKind.WRONG_STATE,)
    driver.gone(A)
    assert driver.only(Finish).operation == OPERATION + 1
    assert _cancel(driver, B, OPERATION) == (RefusalKind.WRONG_STATE,), "it was never heard of"


def test_a_wake_up_that_nobody_waits_for_any_more_is_not_stopped() -> None:
    driver = Driver(budgets=SLEEPY)
    driver.load_idle(A, size(can_sleep=True))
    driver.feed(AdminSleep(OPERATION, A))
    driver.slept(A)
    driver.feed(AdminWake(OPERATION + 1, A))
    assert _cancel(driver, A, OPERATION + 1) == (RefusalKind.CANCELLED,)
    driver.feed(Woke(A, size(can_sleep=True)))
    assert driver.record(A).state is State.READY and not driver.effects

"""What follows by itself: deadlines, evictions, drains and sleep."""

from __future__ import annotations

from typing import Any

import pytest

from memory_efficient_gpt_server.registry.effects import (
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
    AdminUnload,
    Asked,
    LeaksCleared,
    LeaseReleased,
    Left,
    Loaded,
    Slept,
    Woke,
)
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.records import Policy
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST, VariantKey
from tests.server.registry.registry_driver import GPU, A, B, C, Driver, size

SLEEPY = {GPU: Budget(100), HOST: Budget(100)}


# ---- eviction


def test_an_idle_model_goes_and_its_bytes_are_used_only_when_its_process_is_gone() -> None:
    driver = Driver()
    driver.load_idle(A)
    driver.ask(B)
    assert driver.effects == (StartUnload(A, UnloadReason.BUDGET),)
    assert driver.record(A).life.reason == "budget"
    assert driver.tick(5.0) == ()
    assert driver.gone(A) == (StartLoad(B, size()),)


def test_a_process_that_cannot_be_ended_makes_no_room_until_it_is_gone() -> None:
    driver = Driver()
    driver.load_idle(A)
    driver.ask(B, size(90))
    driver.gone(A, lost=True)
    assert driver.only(Refuse).kind is RefusalKind.INSUFFICIENT_MEMORY
    driver.ask(B, size(40))
    assert driver.only(StartLoad).key == B and driver.used() == 100
    driver.feed(LeaksCleared(A))
    assert driver.used() == 40


def test_a_stream_is_never_cut_by_an_eviction() -> None:
    driver = Driver(Policy(patience_s=5.0))
    lease = driver.load(A)
    driver.ask(B)
    assert driver.record(A).state is State.READY
    driver.tick(5.0)
    assert driver.record(A).state is State.DRAINING
    assert driver.tick(200.0) == ()
    driver.feed(LeaseReleased(lease, A))
    assert driver.effects == (StartUnload(A, UnloadReason.BUDGET),)


def test_a_draining_model_gives_no_new_lease_and_its_askers_come_after_the_waiting() -> None:
    driver = Driver(Policy(patience_s=5.0))
    lease = driver.load(A)
    first = driver.ask(B)
    driver.tick(5.0)
    late = driver.ask(A)
    assert not driver.effects
    driver.feed(LeaseReleased(lease, A))
    driver.gone(A)
    assert driver.states() == {"A": "queued", "B": "loading"}
    driver.feed(Loaded(B, size()))
    assert driver.effects == (GrantLease(first, B),)
    driver.feed(LeaseReleased(first, B))
    driver.gone(B)
    driver.feed(Loaded(A, size()))
    assert driver.only(GrantLease).waiter == late


def test_a_drain_is_called_off_when_the_one_it_was_for_has_left() -> None:
    driver = Driver(Policy(patience_s=5.0))
    driver.load(A)
    wanting = driver.ask(B)
    driver.tick(5.0)
    late = driver.ask(A)
    driver.feed(Left(wanting, B))
    assert driver.only(GrantLease).waiter == late
    assert driver.record(A).state is State.READY


def test_a_drain_is_called_off_when_another_model_becomes_idle_first() -> None:
    driver = Driver(Policy(patience_s=5.0))
    driver.load(A, size(50))
    lease = driver.load(C, size(50))
    driver.ask(B, size(50))
    driver.tick(5.0)
    assert driver.states() == {"A": "draining", "B": "queued", "C": "ready"}
    driver.feed(LeaseReleased(lease, C))
    driver.gone(C)
    driver.tick()
    assert driver.states() == {"A": "ready", "B": "loading", "C": "unloaded"}


def test_a_long_drain_for_someone_else_does_not_keep_small_loads_waiting() -> None:
    driver = Driver(Policy(patience_s=50.0))
    driver.load(A, size(60))
    driver.feed(AdminUnload(900, A))
    driver.ask(B, size(60))
    driver.ask(C, size(40))
    assert driver.only(StartLoad).key == C


def test_a_drain_is_called_off_when_its_model_is_pinned() -> None:
    driver = Driver(Policy(patience_s=5.0))
    driver.load(A)
    driver.ask(B)
    driver.tick(5.0)
    driver.patch(A, pinned=True)
    assert driver.record(A).state is State.READY


def test_a_group_that_cannot_begin_is_overtaken_until_its_patience_is_over() -> None:
    driver = Driver(Policy(patience_s=5.0))
    driver.load(A, size(60))
    driver.ask(B, size(60))
    driver.ask(C, size(10))
    assert driver.only(StartLoad).key == C
    driver.feed(Loaded(C, size(10)))
    driver.tick(5.0)
    driver.ask(VariantKey("C", "int4"), size(10))
    assert driver.all(StartLoad) == []


def test_bytes_freed_for_one_group_are_not_taken_by_a_later_one() -> None:
    driver = Driver()
    driver.load_idle(A, size(60))
    driver.ask(B, size(90))
    driver.ask(C, size(30))
    assert driver.states() == {"A": "unloading", "B": "queued", "C": "queued"}
    driver.gone(A)
    assert driver.only(StartLoad).key == B


def test_room_that_is_only_being_made_is_not_taken_in_the_same_step_either() -> None:
    driver = Driver(Policy(max_loads=1))
    driver.load_idle(A, size(50))
    small = VariantKey("A", "int4")
    driver.ask(small, size(10))
    driver.ask(B, size(80))
    driver.ask(C, size(30))
    driver.feed(Loaded(small, size(10)))
    assert driver.only(StartUnload).key == A
    assert driver.all(StartLoad) == []


def test_a_young_model_is_not_evicted() -> None:
    driver = Driver(min_residency_s=30.0)
    driver.load_idle(A)
    driver.ask(B)
    assert driver.tick(29.0) == ()
    driver.tick(1.0)
    assert driver.only(StartUnload).key == A


def swapped_once(**policy: Any) -> tuple[Driver, int]:
    """B has replaced A, C is in use, and there were as many swaps as there may be. Returns C's lease too."""
    driver = Driver(Policy(most_swaps=1, churn_window_s=100.0, max_wait_s=50.0, **policy))
    lease = driver.load(C, size(20))
    driver.load_idle(A)
    waiter = driver.ask(B)
    driver.gone(A)
    driver.feed(Loaded(B, size()))
    driver.feed(LeaseReleased(waiter, B))
    return driver, lease


def test_swaps_stop_when_there_were_too_many_and_the_refusal_says_so() -> None:
    driver, _ = swapped_once(patience_s=1.0)
    driver.ask(A)
    driver.tick(10.0)
    assert driver.record(B).state is State.READY
    driver.tick(40.0)
    refusal = driver.only(Refuse)
    assert refusal.kind is RefusalKind.CHURN_LIMITED
    assert refusal.retry_after_s == pytest.approx(50.0)
    driver.ask(A, after_s=50.0)
    assert driver.only(StartUnload).key == B


def test_however_many_swaps_there_were_models_that_nobody_uses_keep_nobody_waiting() -> None:
    driver, lease = swapped_once()
    driver.ask(A)
    assert driver.effects == ()
    driver.feed(LeaseReleased(lease, C))
    assert driver.only(StartUnload).key == B


def test_a_model_idle_for_its_ttl_is_unloaded_unless_pinned() -> None:
    driver = Driver(ttl_s=60.0)
    lease = driver.load(A)
    driver.tick(100.0)
    driver.feed(LeaseReleased(lease, A))
    assert driver.tick(59.0) == ()
    driver.patch(A, pinned=True)
    assert driver.tick(10.0) == ()
    driver.patch(A, pinned=False)
    assert driver.effects == (StartUnload(A, UnloadReason.TTL),)


# ---- bounds of waiting


def test_nobody_waits_longer_than_allowed_and_is_told_why() -> None:
    driver = Driver(Policy(max_wait_s=50.0, patience_s=100.0))
    driver.load(A, load_s=60.0)
    driver.ask(B)
    assert driver.tick(49.0) == ()
    driver.tick(1.0)
    refusal = driver.only(Refuse)
    assert refusal.kind is RefusalKind.MODELS_BUSY
    assert refusal.retry_after_s == pytest.approx(5.0 + 60.0)
    assert driver.record(B).state is State.UNLOADED


def test_a_wait_that_ends_during_the_load_is_told_so_and_the_load_goes_on() -> None:
    driver = Driver(Policy(max_wait_s=50.0, load_bytes_per_s=1.0))
    driver.ask(A, size(60))
    driver.tick(50.0)
    refusal = driver.only(Refuse)
    assert refusal.kind is RefusalKind.MODEL_LOADING
    assert refusal.retry_after_s == pytest.approx(10.0)
    assert driver.record(A).state is State.LOADING


def test_a_client_may_wait_less_than_others_but_not_more() -> None:
    driver = Driver(Policy(max_wait_s=50.0))
    driver.feed(Asked(1, A, size(), wait_s=5.0))
    driver.feed(Asked(2, A, size(), wait_s=500.0))
    driver.tick(5.0)
    assert driver.only(Refuse).waiter == 1
    driver.tick(45.0)
    assert driver.only(Refuse).waiter == 2


# ---- sleep


def test_a_victim_sleeps_and_wakes_without_a_load() -> None:
    driver = Driver(budgets=SLEEPY)
    driver.load_idle(A, size(60, can_sleep=True))
    lease = driver.ask(B)
    assert driver.only(StartSleep) == StartSleep(A, UnloadReason.BUDGET)
    assert (driver.used(GPU), driver.used(HOST)) == (60, 60)  # both while it copies
    driver.slept(A)
    driver.feed(Loaded(B, size()))
    waiter = driver.ask(A, size(60, can_sleep=True))
    driver.feed(LeaseReleased(lease, B))
    assert driver.record(A).state is State.ASLEEP
    driver.gone(B)
    assert driver.only(StartWake).key == A
    driver.feed(Woke(A, size(60, can_sleep=True)), 0.5)
    assert driver.only(GrantLease).waiter == waiter
    assert (driver.used(GPU), driver.used(HOST)) == (60, 0)
    assert driver.record(A).timings.wake_s == pytest.approx(0.5)


def test_a_sleeper_is_unloaded_when_the_host_is_needed() -> None:
    driver = Driver(budgets=SLEEPY)
    driver.load_idle(A, size(60, can_sleep=True))
    driver.ask(B)
    driver.slept(A)
    driver.ask(C, size(50, device=HOST))
    assert driver.only(StartUnload).key == A


def _sleeper_and_busy_model(*asks: VariantKey) -> Driver:
    """A sleeps in all of the host's memory, B is in use, and these wait: A for B's memory, C for A's."""
    policy = Policy(max_loads=1, patience_s=5.0)
    driver = Driver(policy, budgets={GPU: Budget(100), HOST: Budget(65)})
    driver.load_idle(A, size(60, can_sleep=True))
    driver.ask(B)
    driver.slept(A)
    for key in asks:
        driver.ask(key, size(50, device=HOST) if key is C else size(60, can_sleep=True))
    driver.feed(Loaded(B, size()))
    assert driver.states() == {"A": "asleep", "B": "ready", "C": "queued"}
    return driver


def test_a_sleeper_that_someone_waits_for_does_not_block_who_came_earlier() -> None:
    driver = _sleeper_and_busy_model(C, A)
    driver.tick(5.0)
    assert driver.only(StartUnload).key == A
    driver.gone(A)
    assert driver.only(StartLoad).key == C


def test_a_sleeper_that_is_first_in_line_is_not_evicted_by_those_behind_it() -> None:
    driver = _sleeper_and_busy_model(A, C)
    driver.tick(5.0)
    assert driver.all(StartUnload) == []
    assert driver.states() == {"A": "asleep", "B": "draining", "C": "queued"}


def test_a_drained_model_is_unloaded_where_its_sleep_would_not_free_enough() -> None:
    for context_bytes, effect in ((0, StartSleep), (5, StartUnload)):
        driver = Driver(Policy(patience_s=0.0), budgets=SLEEPY)
        estimate = size(60, can_sleep=True, context_bytes=context_bytes)
        lease = driver.load(A, estimate)
        driver.ask(B, size(100))
        assert driver.record(A).state is State.DRAINING
        driver.feed(LeaseReleased(lease, A))
        assert isinstance(driver.effects[-1], effect)


def test_the_measured_context_of_a_sleeper_is_booked() -> None:
    driver = Driver(budgets=SLEEPY)
    driver.load_idle(A, size(60, can_sleep=True, context_bytes=2))
    driver.ask(B)
    driver.feed(Slept(A, 4))
    assert driver.state.ledger.held_bytes(A, GPU) == 4


def test_who_left_for_another_does_not_take_its_room_however_important_it_is() -> None:
    driver = Driver()
    driver.load_idle(A, size(60))
    driver.patch(A, priority=3)
    driver.ask(B, size(60))
    assert driver.only(StartUnload).key == A
    driver.ask(A, size(60))
    driver.gone(A)
    assert driver.only(StartLoad).key == B
    lease = driver.record(B)
    driver.feed(Loaded(B, size(60)))
    assert lease.key == B and driver.states() == {"A": "queued", "B": "ready"}


def test_who_left_for_another_comes_first_again_once_nobody_waits_for_that_one() -> None:
    driver = Driver()
    driver.load_idle(A, size(60))
    driver.patch(A, priority=3)
    left = driver.ask(B, size(60))
    driver.ask(C, size(60))
    driver.ask(A, size(60))
    driver.feed(Left(left, B))
    driver.gone(A)
    assert driver.only(StartLoad).key == A

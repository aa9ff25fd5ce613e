"""Limits of KV memory that change while models run: who gives what back, and what later loads begin with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from memory_efficient_gpt_server.registry.effects import GrowKv, MoveKv, StartLoad, StartWake
from memory_efficient_gpt_server.registry.events import (
    BudgetPatched,
    KvMoved,
    KvWanted,
    LeaseReleased,
    Patched,
)
from memory_efficient_gpt_server.registry.kv_room import kv_bytes
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.planning import LoadRequest, Verdict, plan
from memory_efficient_gpt_server.registry.variants import HOST, Estimate, Kind, VariantKey
from tests.server.registry.registry_driver import GPU, A, B, C, Driver, elastic, size

OWN = elastic(20, kv_bytes=30)


def _idle() -> Driver:
    """A is idle with 30 KV bytes; 50 are free."""
    driver = Driver()
    driver.load_idle(A, OWN)
    return driver


def _relimit(driver: Driver, key: VariantKey, estimate: Estimate, **limits: Any) -> None:
    """As an administrator does it: what later loads take comes along."""
    driver.feed(Patched(replace(driver.state.entries[key.model_id], **limits), {key: estimate}))


def _kv(driver: Driver, key: VariantKey = A) -> int:
    return kv_bytes(driver.state.ledger, key)


def test_an_idle_model_gives_back_at_once_what_is_beyond_its_new_limit() -> None:
    driver = _idle()
    driver.patch(A, kv_hard_limit_bytes=12)
    assert driver.effects == (MoveKv(A, None, 18),)
    assert _kv(driver) == 30  # until it has
    assert driver.tick(1.0) == ()
    assert driver.feed(KvMoved(A, 18)) == ()
    assert _kv(driver) == 12 and driver.used() == 32
    assert driver.tick(1.0) == ()


def test_it_keeps_what_one_request_needs_whatever_the_limit() -> None:
    driver = Driver()
    driver.load_idle(A, elastic(20, kv_bytes=30, kv_least_bytes=25))
    driver.patch(A, kv_hard_limit_bytes=12)
    assert driver.effects == (MoveKv(A, None, 5),)


def test_a_limit_is_stronger_than_what_a_model_keeps_for_itself() -> None:
    driver = _idle()
    driver.patch(A, kv_soft_limit_bytes=10, kv_hard_limit_bytes=10)
    driver.feed(KvMoved(A, 20))
    driver.load(B, elastic(10, kv_bytes=20))
    assert driver.feed(KvWanted(B, 50)) == (GrowKv(B, 40),)  # A has nothing to spare


def test_what_requests_hold_stays_until_they_end() -> None:
    driver = Driver()
    lease = driver.load(A, OWN)
    driver.patch(A, kv_hard_limit_bytes=12)
    assert driver.effects == (MoveKv(A, None, 18),)
    assert driver.feed(KvMoved(A, 4)) == ()  # the rest is in use
    assert _kv(driver) == 26 and driver.tick(1.0) == ()
    assert driver.feed(LeaseReleased(lease, A)) == (MoveKv(A, None, 14),)
    driver.feed(KvMoved(A, 14))
    assert _kv(driver) == 12


def test_an_idle_one_that_could_not_give_is_asked_again_after_a_while() -> None:
    driver = _idle()
    driver.patch(A, kv_hard_limit_bytes=12)
    assert driver.feed(KvMoved(A, 0)) == ()  # as one whose worker was being replaced
    assert driver.tick(1.0) == (MoveKv(A, None, 18),)
    assert driver.feed(KvMoved(A, 17)) == ()
    assert driver.tick(1.0) == (MoveKv(A, None, 1),)


def test_what_is_on_its_way_to_another_model_arrives_before_the_rest_goes() -> None:
    driver = Driver(budgets={GPU: Budget(80)}, kv_soft_limit_bytes=20)
    driver.load_idle(A, OWN)
    driver.load(B, elastic(10, kv_bytes=20))
    assert driver.feed(KvWanted(B, 10)) == (MoveKv(A, B, 10),)
    driver.patch(A, kv_soft_limit_bytes=None, kv_hard_limit_bytes=12)
    assert driver.effects == ()
    assert driver.feed(KvMoved(A, 10)) == (GrowKv(B, 10), MoveKv(A, None, 8))


def test_a_taker_whose_limit_fell_meanwhile_takes_no_more_than_it_may() -> None:
    driver = Driver(budgets={GPU: Budget(80)}, kv_soft_limit_bytes=10)
    driver.load_idle(A, OWN)
    driver.load(B, elastic(10, kv_bytes=20))
    driver.feed(KvWanted(B, 15))
    driver.patch(B, kv_hard_limit_bytes=22)
    assert driver.feed(KvMoved(A, 15)) == (GrowKv(B, 2),)
    assert _kv(driver, B) == 22 and _kv(driver) == 15


def test_a_limit_that_is_taken_away_lets_it_grow_again() -> None:
    driver = Driver(kv_hard_limit_bytes=30)
    driver.load(A, OWN)
    assert driver.feed(KvWanted(A, 10)) == ()
    driver.patch(A, kv_hard_limit_bytes=None)
    assert driver.feed(KvWanted(A, 10)) == (GrowKv(A, 10),)


def test_a_cache_that_keeps_its_size_keeps_it() -> None:
    driver = Driver()
    driver.load_idle(A, size(20, kv_bytes=30))
    driver.patch(A, kv_hard_limit_bytes=12)
    assert driver.effects == () and driver.tick(1.0) == ()


def test_a_higher_soft_limit_holds_against_others_and_a_lower_one_gives_more() -> None:
    driver = Driver(budgets={GPU: Budget(80)}, kv_soft_limit_bytes=30)
    driver.load_idle(A, OWN)
    driver.load(B, elastic(10, kv_bytes=20))
    assert driver.feed(KvWanted(B, 10)) == ()
    driver.patch(A, kv_soft_limit_bytes=5)
    assert not driver.effects  # it keeps what nobody wants
    assert driver.feed(KvWanted(B, 40)) == (MoveKv(A, B, 25),)


def test_bytes_that_come_back_are_there_for_a_load_that_waits() -> None:
    driver = Driver(budgets={GPU: Budget(60)})
    driver.load(A, OWN)
    driver.ask(C, size(25))
    assert not driver.effects
    driver.patch(A, kv_hard_limit_bytes=15)
    assert driver.effects == (MoveKv(A, None, 15),)
    assert plan(LoadRequest(C, size(25)), driver.state, driver.now_s).verdict is Verdict.AFTER_FREEING
    assert driver.feed(KvMoved(A, 15)) == (StartLoad(C, size(25)),)


# ---- what later loads and wake-ups take


def test_a_load_after_the_change_reserves_what_it_will_begin_with() -> None:
    driver = _idle()
    _relimit(driver, A, elastic(20, kv_bytes=50), kv_soft_limit_bytes=50)
    assert driver.effects == () and driver.record(A).needs.kv_bytes == 30, "the process is as it was"
    driver.patch(A, ttl_s=0.0)
    driver.gone(A)
    driver.patch(A, ttl_s=None)
    assert driver.record(A).needs.kv_bytes == 50
    driver.ask(A, elastic(20, kv_bytes=50))
    assert driver.only(StartLoad).reserved.kv_bytes == 50 and driver.used() == 70


def test_plans_know_what_a_model_has_now_and_what_it_will_come_back_with() -> None:
    driver = _idle()
    later = elastic(20, kv_bytes=12)
    _relimit(driver, A, later, kv_hard_limit_bytes=12)
    driver.feed(KvMoved(A, 18))
    assert plan(LoadRequest(A, later), driver.state, driver.now_s).bytes[Kind.KV] == 12
    driver.patch(A, ttl_s=0.0)
    assert driver.states()["A"] == "unloading" and driver.record(A).needs.kv_bytes == 30
    assert plan(LoadRequest(A, later), driver.state, driver.now_s).needed == {GPU: 32}


def test_a_load_that_waits_takes_what_the_new_limits_say() -> None:
    driver = Driver(budgets={GPU: Budget(60)})
    driver.load(B, size(35))
    driver.ask(A, OWN)
    assert driver.effects == ()
    _relimit(driver, A, elastic(20, kv_bytes=5), kv_hard_limit_bytes=5)
    assert driver.only(StartLoad).reserved.kv_bytes == 5


def test_what_was_measured_of_an_unloaded_model_is_not_believed_of_another_size() -> None:
    driver = _idle()
    driver.patch(A, ttl_s=0.0)
    driver.gone(A)
    _relimit(driver, A, elastic(20, kv_bytes=7), kv_hard_limit_bytes=7, ttl_s=None)
    assert plan(LoadRequest(A, OWN), driver.state, driver.now_s).bytes[Kind.KV] == 30  # as the asker says
    assert driver.record(A).needs.kv_bytes == 7


def test_a_sleeper_wakes_within_a_limit_that_was_set_while_it_slept() -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(100)})
    driver.load_idle(A, elastic(20, kv_bytes=30, can_sleep=True))
    driver.load(B, size(10))
    driver.ask(C, size(60))
    driver.slept(A)
    driver.feed(BudgetPatched(GPU, Budget(300)))
    _relimit(driver, A, elastic(20, kv_bytes=12, can_sleep=True), kv_hard_limit_bytes=12)
    driver.ask(A, OWN)
    assert driver.only(StartWake).kv_bytes == 12
    assert _kv(driver) == 12


def test_one_that_falls_asleep_beyond_its_limit_wakes_within_it() -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(100)})
    driver.load_idle(A, elastic(20, kv_bytes=30, can_sleep=True))
    driver.patch(A, kv_hard_limit_bytes=12)
    driver.feed(KvMoved(A, 0))
    driver.ask(C, size(70))
    driver.slept(A)
    assert driver.record(A).kv_on_waking_bytes == 12

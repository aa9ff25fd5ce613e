"""KV memory of models that sleep: what becomes of it, and what they wake with."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from memory_efficient_gpt_server.registry.effects import GrantLease, GrowKv, MoveKv, StartLoad, StartWake
from memory_efficient_gpt_server.registry.events import (
    AdminSleep,
    AdminUnload,
    AdminWake,
    BudgetPatched,
    KvMoved,
    KvWanted,
    LeaseReleased,
    Slept,
    Woke,
)
from memory_efficient_gpt_server.registry.kv_room import kv_bytes
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.planning import LoadRequest, Verdict, plan
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST, Estimate, VariantKey
from tests.server.registry.registry_driver import A, B, C, Driver

OPERATION = 900
LOADED = Estimate(
    device=HOST, weights_bytes=20, kv_bytes=20, kv_least_bytes=5, kv_most_bytes=100, can_sleep=True
)


def two_models(**entry: Any) -> Driver:
    """A is idle, B in use, both with 20 KV bytes; 20 bytes are free."""
    driver = Driver(budgets={HOST: Budget(100)}, **entry)
    driver.load_idle(A, LOADED)
    driver.load(B, LOADED)
    return driver


def put_to_sleep(driver: Driver, key: VariantKey) -> None:
    driver.feed(AdminSleep(OPERATION, key))
    driver.feed(Slept(key, 0))
    assert driver.record(key).state is State.ASLEEP


def kv(driver: Driver, key: VariantKey) -> int:
    return kv_bytes(driver.state.ledger, key)


def test_what_a_cache_had_grown_by_is_not_in_the_way_of_its_waking() -> None:
    driver = two_models()
    driver.feed(KvWanted(A, 20))
    assert kv(driver, A) == 40
    put_to_sleep(driver, A)
    assert kv(driver, A) == 0 and driver.used(HOST) == 60
    driver.feed(KvWanted(B, 20))
    assert driver.used(HOST) == 80
    its_plan = plan(LoadRequest(A, LOADED), driver.state, driver.now_s)
    assert (its_plan.verdict, its_plan.needed) == (Verdict.NOW, {HOST: 20})
    driver.feed(AdminWake(OPERATION + 1, A))
    assert driver.all(StartWake) == [StartWake(A, 20)] and driver.used(HOST) == 100, "booked before it wakes"
    driver.feed(Woke(A, LOADED))
    assert kv(driver, A) == 20


def test_what_it_gave_away_does_not_come_back_by_itself() -> None:
    driver = two_models(kv_soft_limit_bytes=8)
    driver.feed(KvWanted(B, 32))
    driver.feed(KvMoved(A, 12))
    assert (kv(driver, A), kv(driver, B)) == (8, 52)
    put_to_sleep(driver, A)
    waiter = driver.ask(A, LOADED)
    assert driver.all(StartWake) == [StartWake(A, 8)]
    driver.feed(Woke(A, replace(LOADED, kv_bytes=8)))
    assert driver.all(GrantLease) == [GrantLease(waiter, A)]
    assert kv(driver, A) == 8 and driver.used(HOST) == 100


def test_its_next_load_begins_as_the_first_whatever_it_woke_with() -> None:
    driver = two_models(kv_soft_limit_bytes=8)
    driver.feed(KvWanted(B, 32))
    driver.feed(KvMoved(A, 12))
    put_to_sleep(driver, A)
    driver.feed(AdminWake(OPERATION + 1, A))
    driver.feed(Woke(A, replace(LOADED, kv_bytes=8)))
    driver.feed(AdminUnload(OPERATION + 2, A))
    driver.gone(A)
    driver.feed(BudgetPatched(HOST, Budget(200)))
    driver.ask(A, LOADED)
    assert driver.only(StartLoad).reserved == LOADED, "its worker would take 20 and only 8 were booked"


def test_a_move_is_off_once_its_giver_is_put_to_sleep_and_what_was_told_to_go_is_gone() -> None:
    driver = two_models(kv_soft_limit_bytes=8)
    driver.feed(KvWanted(B, 32))
    assert driver.record(A).giving is not None
    driver.feed(AdminSleep(OPERATION, A))
    assert driver.feed(KvMoved(A, 12)) == (), "late news"
    assert (kv(driver, A), kv(driver, B)) == (20, 40)
    driver.feed(Slept(A, 0))
    driver.feed(AdminWake(OPERATION + 1, A))
    assert driver.all(StartWake) == [StartWake(A, 8)]


def test_a_sleeping_model_neither_wants_nor_gives_nor_takes() -> None:
    driver = two_models(kv_soft_limit_bytes=8)
    driver.feed(LeaseReleased(2, B))
    driver.feed(KvWanted(A, 32))
    assert driver.all(MoveKv) == [MoveKv(B, A, 12)]
    put_to_sleep(driver, A)
    assert driver.feed(KvMoved(B, 12)) == () and kv(driver, B) == 8, "who it was for sleeps: it is free"
    assert driver.feed(KvWanted(A, 10)) == ()
    assert driver.feed(KvWanted(B, 1000)) == (GrowKv(B, 52),), "nothing of the sleeper's"


def test_a_victim_gives_its_spare_bytes_first_and_sleeps_if_that_is_not_enough() -> None:
    driver = two_models(kv_soft_limit_bytes=8)
    result = plan(LoadRequest(C, Estimate(device=HOST, weights_bytes=32)), driver.state, driver.now_s)
    assert (result.shrink, result.sleep, result.evict) == ({A: 12}, (), ())
    result = plan(LoadRequest(C, Estimate(device=HOST, weights_bytes=40)), driver.state, driver.now_s)
    assert (result.shrink, result.sleep, result.evict) == ({}, (A,), ())
    result = plan(LoadRequest(C, Estimate(device=HOST, weights_bytes=41)), driver.state, driver.now_s)
    assert (result.shrink, result.sleep, result.evict) == ({}, (), (A,))

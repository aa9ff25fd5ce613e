"""KV memory that wanders: between models, and to loads that wait."""

from __future__ import annotations

from typing import Any

import pytest

from memory_efficient_gpt_server.registry.effects import GrowKv, MoveKv, StartLoad, StartSleep, StartUnload
from memory_efficient_gpt_server.registry.events import (
    BudgetPatched,
    KvMoved,
    KvWanted,
    LeaseReleased,
    WorkerDied,
)
from memory_efficient_gpt_server.registry.kv_room import kv_bytes, kv_limit_bytes
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.planning import LoadRequest, Verdict, plan
from memory_efficient_gpt_server.registry.variants import HOST, Estimate, VariantKey
from tests.server.registry.registry_driver import GPU, A, B, C, Driver, elastic, size


def _driver(**entry: Any) -> Driver:
    """A is idle with 30 KV bytes, B is in use with 20; 20 bytes are free."""
    limits = {"kv_soft_limit_bytes": 10, "kv_hard_limit_bytes": 60, **entry}
    driver = Driver(budgets={GPU: Budget(100)}, **limits)
    driver.load_idle(A, elastic(20, kv_bytes=30))
    driver.load(B, elastic(10, kv_bytes=20))
    return driver


def _kv(driver: Driver, *keys: VariantKey) -> tuple[int, ...]:
    return tuple(kv_bytes(driver.state.ledger, key) for key in keys or (A, B))


# ---- from one to another


def test_free_bytes_are_booked_before_the_worker_maps_them() -> None:
    driver = _driver()
    assert driver.feed(KvWanted(B, 15)) == (GrowKv(B, 15),)
    assert _kv(driver) == (30, 35)
    assert driver.used() == 95


def test_an_idle_model_gives_down_to_its_soft_limit_and_the_taker_grows_once_it_has() -> None:
    driver = _driver()
    assert driver.feed(KvWanted(B, 39)) == (GrowKv(B, 20), MoveKv(A, B, 19))
    assert _kv(driver) == (30, 40)  # A has not unmapped anything yet
    assert kv_limit_bytes(driver.state, A) == 11
    assert driver.feed(KvMoved(A, 19)) == (GrowKv(B, 19),)
    assert _kv(driver) == (11, 59) and kv_limit_bytes(driver.state, A) == 11
    assert driver.used() == 100
    driver.patch(B, kv_hard_limit_bytes=None)
    assert driver.feed(KvWanted(B, 1000)) == (MoveKv(A, B, 1),)


def test_who_gave_gets_its_bytes_back_when_its_turn_has_come() -> None:
    driver = _driver()
    driver.feed(KvWanted(B, 39))
    driver.feed(KvMoved(A, 19))
    driver.feed(LeaseReleased(2, B))
    driver.ask(A)
    assert driver.feed(KvWanted(A, 1000)) == (MoveKv(B, A, 49),)
    assert driver.feed(KvMoved(B, 49)) == (GrowKv(A, 49),)
    assert _kv(driver) == (60, 10)


def test_nobody_grows_beyond_its_hard_limit_or_its_address_space() -> None:
    driver = _driver()
    driver.patch(B, kv_hard_limit_bytes=50)
    assert driver.feed(KvWanted(B, 1000)) == (GrowKv(B, 20), MoveKv(A, B, 10))
    assert driver.feed(KvWanted(B, 1000)) == ()  # what is on its way counts
    driver = Driver()
    driver.load(A, elastic(10, kv_bytes=20, kv_most_bytes=25))
    assert driver.feed(KvWanted(A, 1000)) == (GrowKv(A, 5),)


def test_a_cache_of_fixed_size_neither_gives_nor_grows() -> None:
    driver = Driver(kv_soft_limit_bytes=0)
    driver.load_idle(A, size(20, kv_bytes=30))
    driver.load(B, elastic(10, kv_bytes=20))
    assert driver.feed(KvWanted(B, 39)) == (GrowKv(B, 20),)
    assert driver.feed(KvWanted(A, 5)) == ()


def test_without_a_soft_limit_a_model_keeps_what_it_was_loaded_with() -> None:
    driver = _driver()
    driver.patch(A, kv_soft_limit_bytes=None)
    assert driver.feed(KvWanted(B, 39)) == (GrowKv(B, 20),)
    driver.feed(LeaseReleased(2, B))
    driver.patch(B, kv_soft_limit_bytes=None)
    assert driver.feed(KvWanted(A, 39)) == (MoveKv(B, A, 20),)


def test_nobody_gives_what_it_needs_for_one_request() -> None:
    driver = Driver(kv_soft_limit_bytes=0)
    driver.load_idle(A, elastic(20, kv_bytes=30, kv_least_bytes=25))
    driver.load(B, elastic(30, kv_bytes=20))
    assert driver.feed(KvWanted(B, 39)) == (MoveKv(A, B, 5),)


def test_a_model_in_use_gives_what_it_does_not_use_unless_it_wanted_more_of_late() -> None:
    driver = _driver()
    driver.ask(A)
    driver.feed(KvWanted(A, 5))
    assert driver.feed(KvWanted(B, 30)) == (GrowKv(B, 15),)
    assert driver.feed(KvWanted(B, 10), after_s=3.0) == (MoveKv(A, B, 10),)
    assert driver.feed(KvMoved(A, 4)) == (GrowKv(B, 4),)  # the rest is in use
    assert _kv(driver) == (31, 39)


def test_a_giver_gives_to_one_at_a_time() -> None:
    driver = Driver(budgets={GPU: Budget(90)}, kv_soft_limit_bytes=0)
    driver.load_idle(A, elastic(10, kv_bytes=40))
    driver.load(B, elastic(10, kv_bytes=10))
    driver.load(C, elastic(10, kv_bytes=10))
    assert driver.feed(KvWanted(B, 10)) == (MoveKv(A, B, 10),)
    assert driver.feed(KvWanted(C, 10)) == ()
    assert driver.feed(KvWanted(A, 10)) == ()
    driver.feed(KvMoved(A, 10))
    assert driver.feed(KvWanted(C, 10)) == (MoveKv(A, C, 10),)


def test_one_that_could_not_give_is_asked_again_only_after_it_was_used() -> None:
    driver = _driver()
    driver.feed(KvWanted(B, 39))
    assert driver.feed(KvMoved(A, 0)) == ()
    assert driver.feed(KvWanted(B, 19)) == ()
    driver.feed(LeaseReleased(driver.ask(A), A))
    assert driver.feed(KvWanted(B, 19)) == (MoveKv(A, B, 19),)


def test_a_worker_that_unmaps_more_than_it_was_told_leaves_the_rest_free() -> None:
    driver = _driver()
    driver.feed(KvWanted(B, 39))
    assert driver.feed(KvMoved(A, 22)) == (GrowKv(B, 19),)
    assert driver.used() == 97


# ---- what happens meanwhile


def test_bytes_for_a_model_that_is_gone_are_nobodys() -> None:
    driver = _driver(ttl_s=None)
    driver.feed(KvWanted(B, 39))
    driver.feed(WorkerDied(B, "killed"))
    assert driver.feed(KvMoved(A, 19)) == ()
    driver.gone(B)
    assert _kv(driver) == (11, 0) and driver.used() == 31


def test_a_giver_that_is_unloaded_gives_its_bytes_back_once() -> None:
    driver = _driver()
    driver.feed(KvWanted(B, 39))
    driver.patch(A, ttl_s=0.0)
    assert driver.only(StartUnload).key == A
    assert driver.feed(KvMoved(A, 19)) == ()
    assert _kv(driver) == (30, 40)
    driver.gone(A)
    assert driver.feed(KvMoved(A, 19)) == ()
    assert _kv(driver) == (0, 40) and driver.used() == 50


def test_a_giver_that_falls_asleep_gives_its_bytes_back_once() -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(100)}, kv_soft_limit_bytes=10)
    driver.load_idle(A, elastic(20, kv_bytes=30, can_sleep=True))
    driver.load(B, elastic(10, kv_bytes=20))
    driver.feed(KvWanted(B, 39))
    driver.ask(C, size(70))
    driver.tick(25.0)
    assert driver.only(StartSleep).key == A
    assert driver.feed(KvMoved(A, 19)) == ()
    driver.slept(A)
    assert _kv(driver) == (0, 40)


def test_news_of_a_move_that_nobody_wanted_change_nothing() -> None:
    driver = _driver()
    before = driver.state
    assert driver.feed(KvMoved(A, 5)) == () and driver.feed(KvMoved(C, 5)) == ()
    assert driver.state == before


def test_a_model_that_is_not_ready_gets_nothing() -> None:
    driver = Driver()
    driver.ask(A, elastic(20))
    assert driver.feed(KvWanted(A, 5)) == ()
    assert driver.feed(KvWanted(C, 5)) == ()


# ---- loads


def test_loads_that_wait_come_before_a_larger_cache() -> None:
    driver = _driver()
    driver.patch(A, min_residency_s=1000.0, kv_soft_limit_bytes=None)
    driver.patch(B, kv_soft_limit_bytes=None)
    driver.ask(C, size(60))
    assert driver.all(GrowKv) == []
    assert driver.feed(KvWanted(B, 10)) == ()


def test_a_load_takes_what_idle_models_have_to_spare_and_nobody_leaves() -> None:
    driver = _driver()
    result = plan(LoadRequest(C, size(35)), driver.state, driver.now_s)
    assert (result.verdict, result.evict, result.shrink) == (Verdict.AFTER_SHRINKING, (), {A: 15})
    assert result.fits and result.eta_s is not None
    driver.ask(C, size(35))
    assert driver.effects == (MoveKv(A, None, 15),)
    assert driver.tick(1.0) == ()
    assert driver.feed(KvMoved(A, 15)) == (StartLoad(C, size(35)),)
    assert driver.used() == 100


def test_pinned_and_young_models_give_what_they_have_to_spare() -> None:
    driver = _driver(pinned=True, min_residency_s=1000.0)
    driver.ask(C, size(35))
    assert driver.effects == (MoveKv(A, None, 15),)
    assert plan(LoadRequest(C, size(56)), driver.state, driver.now_s).verdict is Verdict.NEVER


def test_if_spare_bytes_are_not_enough_they_save_others_from_leaving() -> None:
    driver = Driver(budgets={GPU: Budget(140)}, kv_soft_limit_bytes=10)
    driver.load_idle(A, elastic(30, kv_bytes=30))
    driver.tick(50.0)
    driver.load_idle(B, elastic(40, kv_bytes=30))
    driver.patch(B, priority=1)
    result = plan(LoadRequest(C, size(75)), driver.state, driver.now_s)  # 10 are free
    assert (result.verdict, result.evict, result.shrink) == (Verdict.AFTER_EVICTION, (A,), {B: 5})
    assert plan(LoadRequest(C, size(70)), driver.state, driver.now_s).shrink == {}


def test_a_load_that_got_less_than_was_promised_evicts() -> None:
    driver = _driver()
    driver.ask(C, size(35))
    driver.feed(KvMoved(A, 3))
    assert driver.only(StartUnload).key == A


def test_models_in_use_give_to_loads_what_they_do_not_use() -> None:
    driver = _driver()
    driver.ask(A)
    driver.feed(KvWanted(B, 20))
    driver.ask(C, size(35))
    assert driver.effects == (MoveKv(A, None, 20), MoveKv(B, None, 15))
    driver.feed(KvMoved(A, 20))
    assert driver.feed(KvMoved(B, 15)) == (StartLoad(C, size(35)),)


def test_a_user_that_could_not_give_is_not_asked_at_once_again() -> None:
    driver = _driver()
    driver.ask(A)
    driver.ask(B)
    driver.ask(C, size(35))
    assert driver.effects == (MoveKv(A, None, 15),)
    assert driver.feed(KvMoved(A, 0)) == (MoveKv(B, None, 10),)
    assert driver.feed(KvMoved(B, 0)) == () and driver.tick(1.0) == ()
    assert driver.feed(LeaseReleased(2, B)) == (MoveKv(B, None, 10),)


def test_users_of_an_overcommitted_device_give_what_they_do_not_use_before_any_is_drained() -> None:
    driver = _driver()
    driver.ask(A)
    assert driver.feed(BudgetPatched(GPU, Budget(65))) == (MoveKv(A, None, 15),)
    driver.feed(KvMoved(A, 0))
    assert driver.effects == (MoveKv(B, None, 10),)
    driver.feed(KvMoved(B, 0))
    assert "draining" in driver.states().values()


def test_an_overcommitted_device_is_relieved_by_spare_bytes_first() -> None:
    driver = _driver()
    driver.feed(BudgetPatched(GPU, Budget(70)))
    assert driver.effects == (MoveKv(A, None, 10),)
    driver.feed(KvMoved(A, 10))
    assert not driver.all(StartUnload)
    assert driver.used() == 70


def test_a_range_has_two_ends() -> None:
    with pytest.raises(ValueError, match="both a least and a most"):
        Estimate(device=GPU, weights_bytes=1, kv_least_bytes=1)

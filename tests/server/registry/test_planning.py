"""Whether a load fits, at what cost, and when."""

from __future__ import annotations

from dataclasses import replace

import pytest

from memory_efficient_gpt_server.registry.events import (
    AdminSleep,
    AdminWake,
    BudgetPatched,
    Slept,
    Woke,
    WorkerDied,
)
from memory_efficient_gpt_server.registry.ledger import Budget, LedgerError
from memory_efficient_gpt_server.registry.planning import Candidate, LoadRequest, Plan, Verdict, plan
from memory_efficient_gpt_server.registry.records import Policy
from memory_efficient_gpt_server.registry.variants import HOST, Amount, Estimate, Kind, VariantKey
from tests.server.registry.registry_driver import GPU, A, B, C, Driver, size


def _plan(driver: Driver, key: VariantKey, estimate: Estimate, **options: tuple[Candidate, ...]) -> Plan:
    return plan(LoadRequest(key, estimate, **options), driver.state, driver.now_s)


def test_a_plan_for_an_empty_device_tells_bytes_by_kind_and_a_guessed_time() -> None:
    driver = Driver(Policy(load_bytes_per_s=10.0))
    result = _plan(driver, A, size(60, kv_bytes=20))
    assert result.verdict is Verdict.NOW
    assert result.fits
    assert result.bytes == {Kind.WEIGHTS: 60, Kind.KV: 20}
    assert result.needed == {GPU: 80}
    assert result.eta_s == pytest.approx(8.0)


def test_the_time_comes_from_measured_loads_once_there_are_some() -> None:
    driver = Driver(Policy(load_bytes_per_s=1e9), {GPU: Budget(1000)})
    driver.load_idle(A, size(60), load_s=3.0)
    assert _plan(driver, B, size(40)).eta_s == pytest.approx(2.0)  # 20 bytes per second


def test_the_plan_names_who_would_go_and_adds_the_time_for_that() -> None:
    driver = Driver(Policy(unload_s=2.0))
    driver.load_idle(A, size(60), load_s=3.0)
    result = _plan(driver, B, size(60))
    assert (result.verdict, result.evict, result.sleep) == (Verdict.AFTER_EVICTION, (A,), ())
    assert result.eta_s == pytest.approx(5.0)
    assert driver.states() == {"A": "ready"}, "a plan changes nothing"


def test_the_slowest_of_several_victims_decides_the_time() -> None:
    driver = Driver(Policy(unload_s=2.0), ttl_s=0.0, pinned=True)
    for key, unload_s in ((A, 9.0), (C, 1.0)):
        driver.load_idle(key, size(50), load_s=3.0)
        driver.patch(key, pinned=False)
        driver.gone(key, unload_s)
        driver.patch(key, ttl_s=None)
        driver.load_idle(key, size(50), load_s=3.0)
    result = _plan(driver, B, size(100))
    assert set(result.evict) == {A, C}
    assert result.eta_s == pytest.approx(6.0 + 9.0)


def test_a_load_that_waits_for_an_unload_takes_as_much_longer() -> None:
    driver = Driver(Policy(unload_s=2.0, load_bytes_per_s=10.0), ttl_s=0.0)
    driver.load(A, size(50), load_s=5.0)
    driver.feed(WorkerDied(A, "?"))
    assert _plan(driver, B, size(60)).eta_s == pytest.approx(6.0 + 2.0)
    assert _plan(driver, B, size(50)).eta_s == pytest.approx(5.0)  # there is room for that at once


def test_a_load_that_waits_for_its_turn_takes_as_much_longer() -> None:
    driver = Driver(Policy(max_loads=2, load_bytes_per_s=10.0))
    driver.ask(A, size(40))
    driver.ask(VariantKey("A", "int4"), size(10))
    driver.tick(0.5)
    assert _plan(driver, B, size(50)).eta_s == pytest.approx(5.0 + 0.5)


def test_sleep_is_preferred_where_the_host_has_room() -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(80)})
    driver.load_idle(A, size(60, can_sleep=True))
    assert _plan(driver, B, size(60)).sleep == (A,)
    assert _plan(driver, B, size(60, host_bytes=21)).evict == (A,)  # then the host has no room for A


def test_larger_than_the_budget_minus_pins_evicts_nobody() -> None:
    driver = Driver(budgets={GPU: Budget(100, headroom_bytes=10)})
    driver.load_idle(A, size(30))
    driver.load_idle(C, size(30))
    assert _plan(driver, B, size(91)).verdict is Verdict.NEVER
    assert _plan(driver, B, size(90)).verdict is Verdict.AFTER_EVICTION
    driver.patch(A, pinned=True)
    result = _plan(driver, B, size(61))
    assert (result.verdict, result.evict, result.reservable, result.eta_s) == (
        Verdict.NEVER,
        (),
        {GPU: 60},
        None,
    )
    assert not result.fits


def test_leaked_bytes_are_as_good_as_pinned() -> None:
    driver = Driver()
    driver.load_idle(A, size(20))
    driver.patch(A, ttl_s=0.0)
    driver.gone(A, lost=True)
    assert _plan(driver, B, size(81)).verdict is Verdict.NEVER
    assert _plan(driver, B, size(80)).verdict is Verdict.NOW


def test_what_others_than_models_hold_is_as_good_as_pinned() -> None:
    driver = Driver()
    ledger = driver.state.ledger.reserve("dataset cache", (Amount(GPU, Kind.WORKSPACE, 30),))
    driver.state = replace(driver.state, ledger=ledger)
    assert _plan(driver, B, size(71)).verdict is Verdict.NEVER
    assert _plan(driver, B, size(70)).verdict is Verdict.NOW


def test_a_sleeper_cannot_use_what_its_own_context_takes() -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(60)})
    estimate = size(60, context_bytes=5, can_sleep=True)
    driver.load_idle(A, estimate)
    driver.feed(AdminSleep(900, A))
    driver.feed(Slept(A, 5))
    for budget_bytes, verdict in ((64, Verdict.NEVER), (65, Verdict.NOW)):
        driver.feed(BudgetPatched(GPU, Budget(budget_bytes)))
        assert _plan(driver, A, estimate).verdict is verdict


def test_a_model_in_use_makes_it_busy_and_is_named() -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(100)})
    driver.load(A)
    driver.load(C, size(10, device=HOST))  # not in the way
    result = _plan(driver, B, size(60))
    assert (result.verdict, result.blocked_by, result.evict, result.eta_s) == (Verdict.BUSY, (A,), (), None)


def test_bytes_that_are_being_freed_are_waited_for_instead_of_evicting_more() -> None:
    driver = Driver()
    driver.load_idle(A, size(50))
    driver.load_idle(C, size(50))
    driver.patch(A, ttl_s=0.0)
    assert driver.states() == {"A": "unloading", "C": "ready"}
    result = _plan(driver, B, size(50))
    assert (result.verdict, result.evict) == (Verdict.AFTER_FREEING, ())
    assert _plan(driver, B, size(51)).evict == (C,)


def test_promised_bytes_are_not_planned_twice() -> None:
    driver = Driver()
    request = LoadRequest(B, size(50))
    assert plan(request, driver.state, 0.0, claimed={GPU: 50}).verdict is Verdict.NOW
    assert plan(request, driver.state, 0.0, claimed={GPU: 51}).verdict is Verdict.BUSY


def test_a_ready_model_is_there_at_once_and_a_loading_one_soon() -> None:
    driver = Driver(Policy(load_bytes_per_s=10.0))
    driver.ask(A, size(60))
    driver.tick(2.0)
    assert _plan(driver, A, size(60)).eta_s == pytest.approx(4.0)
    driver = Driver()
    driver.load(A)
    assert _plan(driver, A, size(60)).eta_s == 0.0


def test_a_waking_model_is_there_after_what_its_last_wake_up_took() -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(100)})
    estimate = size(60, can_sleep=True)
    driver.load_idle(A, estimate)
    for number in (900, 902):
        driver.feed(AdminSleep(number, A))
        driver.slept(A)
        driver.feed(AdminWake(number + 1, A))
        if number == 900:
            driver.feed(Woke(A, estimate), 4.0)
    driver.tick(1.5)
    assert _plan(driver, A, estimate).eta_s == pytest.approx(2.5)
    driver.feed(Woke(A, estimate))
    driver.feed(AdminSleep(904, A))
    driver.slept(A)
    result = _plan(driver, A, estimate)
    assert result.needed == {GPU: 60}
    assert result.eta_s == pytest.approx(1.5)


def test_what_was_measured_counts_more_than_the_estimate() -> None:
    driver = Driver()
    driver.ask(A, size(60))
    driver.load_idle(B, size(30))
    assert _plan(driver, B, size(95)).bytes == {Kind.WEIGHTS: 30}


def test_alternatives_are_those_candidates_that_fit() -> None:
    driver = Driver()
    candidates = (
        Candidate("int8", VariantKey("A", "int8"), size(120)),
        Candidate("int4", VariantKey("A", "int4"), size(60)),
        Candidate("8k context", VariantKey("A", max_model_len=8192), size(90)),
    )
    result = _plan(driver, A, size(240), candidates=candidates)
    assert result.verdict is Verdict.NEVER
    assert [(a.label, a.plan.needed) for a in result.alternatives] == [
        ("int4", {GPU: 60}),
        ("8k context", {GPU: 90}),
    ]


def test_an_unknown_device_is_an_error() -> None:
    with pytest.raises(LedgerError, match="cuda:7"):
        _plan(Driver(), A, size(1, device="cuda:7"))

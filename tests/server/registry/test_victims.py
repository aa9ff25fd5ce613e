"""Whom to evict, to put to sleep or to drain."""

from __future__ import annotations

from typing import Any

from memory_efficient_gpt_server.registry.effects import RefusalKind, Refuse
from memory_efficient_gpt_server.registry.events import AdminSleep, AdminUnload, UnloadMode
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.records import Policy
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST, VariantKey
from memory_efficient_gpt_server.registry.victims import Way, choose_victims
from tests.server.registry.registry_driver import GPU, A, B, C, Driver, size

BUDGETS = {GPU: Budget(1000), HOST: Budget(100)}


def _loaded(*models: tuple[VariantKey, int, float], **fields: Any) -> Driver:
    """Idle models, loaded one after another; (key, weights, seconds of the load)."""
    driver = Driver(Policy(max_loads=3), BUDGETS)
    for key, weights, load_s in models:
        driver.load_idle(key, size(weights, **fields), load_s)
    return driver


def _ways(driver: Driver, missing: int, **options: Any) -> dict[str, Way]:
    victims = choose_victims(driver.state, {GPU: missing}, driver.now_s, **options)
    assert victims.covered
    return {key.model_id: way for key, way in victims.ways.items()}


def test_the_least_recently_used_goes_first() -> None:
    driver = _loaded((A, 60, 1.0), (B, 60, 1.0), (C, 60, 1.0))
    driver.tick(10.0)
    assert _ways(driver, 50) == {"A": Way.EVICT}
    assert _ways(driver, 70) == {"A": Way.EVICT, "B": Way.EVICT}


def test_a_model_that_reloads_slowly_is_spared() -> None:
    driver = _loaded((A, 60, 30.0), (B, 60, 1.0))
    driver.tick(10.0)
    assert _ways(driver, 50) == {"B": Way.EVICT}


def test_a_model_that_frees_little_is_spared_and_too_small_ones_are_let_go_again() -> None:
    driver = _loaded((A, 5, 1.0), (B, 60, 1.0))
    driver.tick(10.0)
    assert _ways(driver, 50) == {"B": Way.EVICT}
    driver.tick(10_000.0)
    driver.load_idle(C, size(5))
    assert "C" not in _ways(driver, 50)


def test_lower_priority_goes_first_however_recent() -> None:
    driver = _loaded((A, 60, 1.0), (B, 60, 1.0))
    driver.patch(A, priority=1)
    driver.tick(10.0)
    assert _ways(driver, 50) == {"B": Way.EVICT}


def test_leased_pinned_and_young_models_stay() -> None:
    driver = _loaded((A, 60, 1.0), (B, 60, 1.0))
    driver.ask(A)
    driver.patch(B, pinned=True)
    driver.load_idle(C, size(60))
    driver.patch(C, min_residency_s=30.0)
    driver.tick(29.0)
    assert not choose_victims(driver.state, {GPU: 1}, driver.now_s).covered
    driver.tick(1.0)
    assert _ways(driver, 1) == {"C": Way.EVICT}


def test_a_sleeper_may_go_however_young() -> None:
    driver = _loaded((A, 60, 1.0), can_sleep=True)
    driver.feed(AdminSleep(900, A))
    driver.slept(A)
    driver.patch(A, min_residency_s=1000.0)
    assert choose_victims(driver.state, {HOST: 60}, driver.now_s).by(Way.EVICT) == (A,)


def test_models_in_use_are_drained_after_all_idle_ones_and_only_if_allowed() -> None:
    driver = _loaded((A, 60, 1.0), (B, 60, 1.0))
    driver.ask(A)
    driver.tick(100.0)
    assert not choose_victims(driver.state, {GPU: 100}, driver.now_s).covered
    assert _ways(driver, 100, allow_busy=True) == {"B": Way.EVICT, "A": Way.DRAIN}
    assert _ways(driver, 50, allow_busy=True) == {"B": Way.EVICT}


def test_who_fits_into_host_memory_sleeps() -> None:
    driver = _loaded((A, 60, 1.0), (B, 60, 1.0), can_sleep=True, context_bytes=2)
    driver.tick(10.0)
    assert _ways(driver, 100, host_room_bytes=100) == {"A": Way.SLEEP, "B": Way.EVICT}
    assert _ways(driver, 50, host_room_bytes=59) == {"A": Way.EVICT}
    assert _ways(driver, 50, host_room_bytes=60) == {"A": Way.SLEEP}


def test_nobody_sleeps_if_only_unloading_frees_enough() -> None:
    driver = _loaded((A, 60, 1.0), can_sleep=True, context_bytes=2)
    assert _ways(driver, 60, host_room_bytes=100) == {"A": Way.SLEEP}
    assert _ways(driver, 61, host_room_bytes=100) == {"A": Way.EVICT}


def test_nobody_is_parked_in_the_host_memory_that_is_missing() -> None:
    driver = _loaded((A, 60, 1.0), can_sleep=True, host_bytes=3)
    victims = choose_victims(driver.state, {HOST: 3}, driver.now_s, host_room_bytes=100)
    assert victims.by(Way.EVICT) == (A,)


def test_what_cannot_be_covered_is_said() -> None:
    driver = _loaded((A, 60, 1.0))
    assert not choose_victims(driver.state, {GPU: 61}, driver.now_s).covered
    assert not choose_victims(driver.state, {GPU: 1}, driver.now_s, exclude=(A,)).covered


def test_a_pin_holds_the_model_as_configured_and_not_the_variants_that_clients_choose() -> None:
    variant = VariantKey("A", "int4")
    driver = Driver(pinned=True)
    driver.load_idle(A, size(40))
    driver.load_idle(variant, size(40))
    driver.ask(B, size(40))
    assert driver.record(variant).state is State.UNLOADING and driver.record(A).state is State.READY
    driver.gone(variant)
    driver.feed(AdminUnload(99, A, UnloadMode.DRAIN))
    assert driver.only(Refuse).kind is RefusalKind.MODEL_PINNED

"""KV memory that wanders."""

from __future__ import annotations

from memory_efficient_gpt_server.registry.effects import GrowKv, MoveKv
from memory_efficient_gpt_server.registry.events import KvMoved, KvWanted
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.variants import Kind, VariantKey
from tests.server.registry.registry_driver import GPU, A, B, C, Driver, size


def _driver() -> Driver:
    """A is idle with 30 KV bytes, B is in use with 20; 20 bytes are free."""
    driver = Driver(budgets={GPU: Budget(100)}, kv_soft_limit_bytes=10, kv_hard_limit_bytes=60)
    driver.load_idle(A, size(20, kv_bytes=30))
    driver.load(B, size(10, kv_bytes=20))
    return driver


def _kv(driver: Driver, key: VariantKey) -> int:
    return sum(e.bytes for e in driver.state.ledger.of(key) if e.kind is Kind.KV)


def test_free_bytes_are_booked_before_the_worker_maps_them() -> None:
    driver = _driver()
    assert driver.feed(KvWanted(B, 15)) == (GrowKv(B, 15),)
    assert _kv(driver, B) == 35
    assert driver.used() == 95


def test_an_idle_model_gives_down_to_its_soft_limit() -> None:
    driver = _driver()
    assert driver.feed(KvWanted(B, 39)) == (GrowKv(B, 20), MoveKv(A, B, 19))
    assert (_kv(driver, A), _kv(driver, B)) == (30, 40)  # A has not unmapped anything yet
    driver.feed(KvMoved(A, B, 19))
    assert (_kv(driver, A), _kv(driver, B)) == (11, 59)
    assert driver.used() == 100
    driver.patch(B, kv_hard_limit_bytes=None)
    assert driver.feed(KvWanted(B, 1000)) == (MoveKv(A, B, 1),)


def test_nobody_grows_beyond_the_hard_limit() -> None:
    driver = _driver()
    driver.patch(B, kv_hard_limit_bytes=50)
    assert driver.feed(KvWanted(B, 1000)) == (GrowKv(B, 20), MoveKv(A, B, 10))


def test_a_model_in_use_gives_nothing_and_neither_does_one_without_a_soft_limit() -> None:
    driver = _driver()
    driver.ask(A)
    assert driver.feed(KvWanted(B, 39)) == (GrowKv(B, 20),)
    driver = _driver()
    driver.patch(A, kv_soft_limit_bytes=None)
    assert driver.feed(KvWanted(B, 39)) == (GrowKv(B, 20),)


def test_loads_that_wait_come_before_a_larger_cache() -> None:
    driver = _driver()
    driver.patch(A, min_residency_s=1000.0)
    driver.ask(C, size(60))
    assert driver.all(GrowKv) == []
    assert driver.feed(KvWanted(B, 10)) == (MoveKv(A, B, 10),)


def test_bytes_for_a_model_that_is_gone_are_nobodys() -> None:
    driver = _driver()
    driver.feed(KvWanted(B, 39))
    driver.patch(A, ttl_s=0.0)
    driver.gone(A)
    driver.feed(KvMoved(B, A, 5))
    assert (_kv(driver, A), _kv(driver, B)) == (0, 35)
    driver.feed(KvMoved(B, None, 5))
    assert _kv(driver, B) == 30


def test_bytes_that_turn_out_to_come_from_nowhere_are_shown() -> None:
    driver = _driver()
    driver.feed(KvWanted(B, 39))
    driver.patch(A, ttl_s=0.0)
    driver.gone(A)
    driver.feed(KvMoved(A, B, 19))
    assert _kv(driver, B) == 59


def test_a_model_that_is_not_ready_gets_nothing() -> None:
    driver = Driver()
    driver.ask(A, size(20))
    assert driver.feed(KvWanted(A, 5)) == ()
    assert driver.feed(KvWanted(C, 5)) == ()

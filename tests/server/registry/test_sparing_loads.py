"""Loads for which nobody may leave or sleep."""

from __future__ import annotations

from memory_efficient_gpt_server.registry.effects import (
    Finish,
    MoveKv,
    RefusalKind,
    Refuse,
    StartLoad,
    StartUnload,
    StartWake,
)
from memory_efficient_gpt_server.registry.events import (
    AdminLoad,
    AdminUnload,
    KvMoved,
    LeaseReleased,
    Left,
    Loaded,
)
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.planning import Verdict
from memory_efficient_gpt_server.registry.records import Policy
from memory_efficient_gpt_server.registry.variants import HOST, Estimate, VariantKey
from tests.server.registry.registry_driver import GPU, A, B, C, Driver, elastic, size

OPERATION = 900


def _load(driver: Driver, key: VariantKey, estimate: Estimate, operation: int = OPERATION) -> None:
    driver.feed(AdminLoad(operation, key, estimate, may_evict=False))


def _refused(driver: Driver, verdict: Verdict) -> Refuse:
    refusal = driver.only(Refuse)
    assert (refusal.waiter, refusal.kind) == (OPERATION, RefusalKind.EVICTION_NEEDED)
    assert refusal.plan is not None and refusal.plan.verdict is verdict
    assert not driver.state.queue.groups
    return refusal


def test_it_is_loaded_if_there_is_room() -> None:
    driver = Driver()
    driver.load_idle(A, size(60))
    _load(driver, B, size(40))
    assert driver.only(StartLoad).key == B
    assert driver.feed(Loaded(B, size(40))) == (Finish(OPERATION),)


def test_it_is_refused_with_the_plan_if_somebody_would_have_to_leave_and_nobody_does() -> None:
    driver = Driver()
    driver.load_idle(A, size(60))
    _load(driver, B, size(50))
    assert _refused(driver, Verdict.AFTER_EVICTION).plan.evict == (A,)  # type: ignore[union-attr]
    assert driver.effects == (driver.only(Refuse),)
    assert driver.states() == {"A": "ready", "B": "unloaded"} and driver.used() == 60


def test_it_is_refused_if_somebody_would_have_to_sleep() -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(100)})
    driver.load_idle(A, size(60, can_sleep=True))
    _load(driver, B, size(50))
    assert _refused(driver, Verdict.AFTER_EVICTION).plan.sleep == (A,)  # type: ignore[union-attr]


def test_it_does_not_wait_for_models_in_use() -> None:
    driver = Driver()
    driver.load(A, size(60))
    _load(driver, B, size(50))
    assert _refused(driver, Verdict.BUSY).plan.blocked_by == (A,)  # type: ignore[union-attr]


def test_what_can_never_fit_is_insufficient_memory_as_for_others() -> None:
    driver = Driver()
    _load(driver, B, size(101))
    assert driver.only(Refuse).kind is RefusalKind.INSUFFICIENT_MEMORY


def test_it_waits_for_what_leaves_anyway_and_for_its_turn() -> None:
    driver = Driver(Policy(max_loads=1))
    driver.load_idle(A, size(60))
    driver.feed(AdminUnload(901, A))
    _load(driver, B, size(60))
    assert not driver.effects
    driver.gone(A)
    assert driver.only(StartLoad).key == B
    _load(driver, C, size(30), 902)
    assert not driver.effects
    driver.feed(Loaded(B, size(60)))
    assert driver.only(StartLoad).key == C


def test_idle_models_give_kv_memory_for_it() -> None:
    driver = Driver(kv_soft_limit_bytes=10)
    driver.load_idle(A, elastic(40, kv_bytes=30))
    _load(driver, B, size(45))
    assert driver.effects == (MoveKv(A, None, 15),)
    driver.feed(KvMoved(A, 15))
    assert driver.only(StartLoad).key == B


def test_if_less_is_given_than_was_promised_it_is_refused() -> None:
    driver = Driver(kv_soft_limit_bytes=10)
    driver.load_idle(A, elastic(40, kv_bytes=30))
    _load(driver, B, size(45))
    driver.feed(KvMoved(A, 3))
    _refused(driver, Verdict.AFTER_EVICTION)
    assert not driver.all(StartUnload)


def test_room_that_another_takes_first_is_not_made_again() -> None:
    driver = Driver(Policy(max_loads=1))
    driver.ask(A, size(60))
    _load(driver, B, size(40))
    assert not driver.effects
    driver.feed(Loaded(A, size(70)))
    _refused(driver, Verdict.BUSY)


def test_others_who_wait_for_the_same_model_may_have_it_make_room() -> None:
    driver = Driver()
    driver.load_idle(A, size(60))
    driver.load(C, size(30))
    waiting = driver.ask(B, size(50))
    assert driver.only(StartUnload).key == A
    _load(driver, B, size(50))
    assert not driver.all(Refuse)
    driver.gone(A)
    assert driver.only(StartLoad).key == B
    driver.feed(Loaded(B, size(50)))
    assert driver.all(Finish) == [Finish(OPERATION)] and waiting in driver.record(B).leases


def test_a_drain_for_those_who_may_ends_when_only_it_is_left() -> None:
    driver = Driver(Policy(patience_s=3.0))
    lease = driver.load(A, size(60))
    waiting = driver.ask(B, size(50))
    driver.tick(5.0)
    assert driver.states()["A"] == "draining"
    _load(driver, B, size(50))
    assert not driver.all(Refuse)
    driver.feed(Left(waiting, B))
    assert driver.states()["A"] == "ready"
    _refused(driver, Verdict.BUSY)
    assert not driver.feed(LeaseReleased(lease, A))


def test_one_that_takes_more_than_was_thought_goes_itself() -> None:
    driver = Driver()
    driver.load_idle(A, size(60))
    _load(driver, B, size(40))
    driver.feed(Loaded(B, size(50)))
    assert driver.only(StartUnload).key == B and driver.states()["A"] == "ready"
    driver.gone(B)
    _refused(driver, Verdict.AFTER_EVICTION)
    assert driver.states() == {"A": "ready", "B": "unloaded"}


def test_a_sleeper_wakes_only_if_there_is_room() -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(200)})
    driver.load_idle(A, size(60, can_sleep=True))
    waiting = driver.ask(B, size(80))
    driver.slept(A)
    driver.feed(Loaded(B, size(80)))
    driver.feed(LeaseReleased(waiting, B))
    _load(driver, A, size(60))
    _refused(driver, Verdict.AFTER_EVICTION)
    assert driver.states()["A"] == "asleep"
    driver.feed(AdminUnload(901, B))
    driver.gone(B)
    _load(driver, A, size(60))
    assert driver.only(StartWake).key == A

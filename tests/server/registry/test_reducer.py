"""What clients and workers bring about."""

from __future__ import annotations

import pytest

from memory_efficient_gpt_server.registry.effects import (
    Abort,
    AbortReason,
    GrantLease,
    RefusalKind,
    Refuse,
    StartLoad,
    StartUnload,
    UnloadReason,
)
from memory_efficient_gpt_server.registry.events import (
    Asked,
    BudgetPatched,
    LeaseReleased,
    Left,
    Loaded,
    LoadFailed,
    WorkerDied,
)
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.planning import Verdict
from memory_efficient_gpt_server.registry.records import Policy
from memory_efficient_gpt_server.registry.reducer import step
from memory_efficient_gpt_server.registry.states import IllegalTransitionError, State
from memory_efficient_gpt_server.registry.variants import VariantKey
from tests.server.registry.registry_driver import GPU, A, B, C, Driver, size

# ---- loads and leases


def test_one_load_serves_all_who_ask_and_their_leases_are_taken_in_the_same_step() -> None:
    driver = Driver()
    first = driver.ask(A)
    assert driver.only(StartLoad) == StartLoad(A, size())
    second = driver.ask(A)
    assert not driver.effects
    driver.feed(Loaded(A, size()), 2.0)
    assert driver.effects == (GrantLease(first, A), GrantLease(second, A))
    assert driver.record(A).leases == {first, second}


def test_a_ready_model_is_leased_at_once() -> None:
    driver = Driver()
    driver.load(A)
    waiter = driver.ask(A)
    assert driver.effects == (GrantLease(waiter, A),)


def test_a_step_changes_nothing_of_the_state_it_began_with() -> None:
    driver = Driver()
    driver.load(A)
    before, event = driver.state, Asked(99, A, size())
    leases = before.records[A].leases
    assert step(before, event, 5.0) == step(before, event, 5.0)
    assert before.records[A].leases == leases


def test_a_load_goes_on_when_its_clients_leave_and_the_next_one_finds_it() -> None:
    driver = Driver()
    waiter = driver.ask(A)
    assert driver.feed(Left(waiter, A)) == ()
    driver.feed(Loaded(A, size()))
    assert driver.effects == ()
    assert driver.record(A).state is State.READY


def test_a_load_that_has_not_begun_is_forgotten_with_its_last_waiter() -> None:
    driver = Driver()
    driver.load(B)
    first, second = driver.ask(A), driver.ask(A)
    driver.feed(Left(first, A))
    assert driver.record(A).state is State.QUEUED
    driver.feed(Left(second, A))
    assert driver.record(A).state is State.UNLOADED


def test_a_client_that_left_while_its_lease_was_granted_gives_it_back() -> None:
    driver = Driver()
    lease = driver.load(A)
    driver.feed(Left(lease, A))
    assert driver.record(A).leases == frozenset()


def test_unknown_models_and_full_queues_are_refused() -> None:
    driver = Driver(Policy(max_waiters=1))
    driver.ask(VariantKey("D"))
    assert driver.only(Refuse).kind is RefusalKind.MODEL_NOT_FOUND
    driver.ask(A)
    driver.ask(A)
    assert driver.only(Refuse).kind is RefusalKind.QUEUE_FULL


def test_who_does_not_want_to_wait_gets_a_model_only_if_it_is_loaded() -> None:
    driver = Driver()
    driver.feed(Asked(1, A, size(), wait_s=0.0))
    assert driver.only(Refuse).kind is RefusalKind.MODEL_NOT_LOADED
    assert driver.all(StartLoad) == []
    driver.load(A)
    driver.feed(Asked(77, A, size(), wait_s=0.0))
    assert driver.only(GrantLease).waiter == 77


def test_what_can_never_fit_is_refused_with_the_plan_and_evicts_nobody() -> None:
    driver = Driver()
    driver.load_idle(A)
    driver.ask(B, size(101))
    refusal = driver.only(Refuse)
    assert refusal.kind is RefusalKind.INSUFFICIENT_MEMORY
    assert refusal.plan is not None
    assert refusal.plan.verdict is Verdict.NEVER
    assert driver.states() == {"A": "ready", "B": "unloaded"}


def test_who_waits_is_refused_when_a_pin_takes_the_room_for_good() -> None:
    driver = Driver()
    driver.load(A)
    waiter = driver.ask(B)
    driver.patch(A, pinned=True)
    refusal = driver.only(Refuse)
    assert (refusal.waiter, refusal.kind) == (waiter, RefusalKind.INSUFFICIENT_MEMORY)
    assert driver.record(B).state is State.UNLOADED


def test_no_more_loads_run_at_a_time_than_allowed() -> None:
    driver = Driver(Policy(max_loads=1))
    driver.ask(A, size(10))
    driver.ask(B, size(10))
    assert driver.states() == {"A": "loading", "B": "queued"}
    driver.feed(Loaded(A, size(10)))
    assert driver.only(StartLoad).key == B


def test_room_for_several_is_used_by_no_more_loads_than_allowed() -> None:
    driver = Driver(Policy(max_loads=1))
    driver.load_idle(A, size(100))
    driver.ask(B, size(50))
    driver.ask(C, size(50))
    driver.gone(A)
    assert driver.only(StartLoad).key == B


def test_news_that_cannot_be_true_raises() -> None:
    driver = Driver()
    with pytest.raises(IllegalTransitionError, match="no process"):
        driver.feed(Loaded(A, size()))
    driver.load(A)
    with pytest.raises(IllegalTransitionError, match="is ready"):
        driver.feed(Loaded(A, size()))


def test_history_of_unloaded_variants_is_bounded() -> None:
    driver = Driver(Policy(most_records=3), budgets={GPU: Budget(100)})
    driver.load(A, size(10))
    for length in range(10, 20):
        driver.ask(VariantKey("B", max_model_len=length), size(1000), after_s=1.0)
    assert set(driver.state.records) == {A, *(VariantKey("B", max_model_len=length) for length in (18, 19))}


def test_a_failed_variant_is_not_forgotten_while_it_is_left_alone() -> None:
    driver = Driver(Policy(most_records=1))
    driver.ask(A)
    driver.feed(LoadFailed(A, "damaged"))
    driver.gone(A)
    driver.ask(B, size(1000))
    assert driver.record(A).state is State.FAILED
    driver.feed(Asked(60, VariantKey("B", "int4"), size(1000)), 1.0)
    assert A not in driver.state.records


# ---- failures


def test_a_failed_load_refuses_its_waiters_and_is_left_alone_for_a_while() -> None:
    driver = Driver()
    waiter = driver.ask(A, after_s=500.0)
    driver.feed(LoadFailed(A, "damaged"))
    refusal, unload = driver.effects
    assert isinstance(refusal, Refuse)
    assert refusal.retry_after_s == pytest.approx(1.0)
    assert driver.record(A).life.reason == "damaged"
    assert (refusal.waiter, refusal.kind, refusal.detail) == (waiter, RefusalKind.LOAD_FAILED, "damaged")
    assert unload == StartUnload(A, UnloadReason.FAILURE)
    driver.ask(A)
    assert driver.only(Refuse).kind is RefusalKind.LOAD_FAILED  # its process is not even gone
    driver.gone(A)
    assert driver.record(A).life.reason == "damaged"
    driver.ask(A)
    assert driver.only(Refuse).retry_after_s == pytest.approx(1.0)
    driver.ask(A, after_s=1.0)
    assert driver.only(StartLoad).key == A


def test_the_third_failure_blocks_loads_until_one_expires() -> None:
    driver = Driver()
    for _ in range(3):
        driver.ask(A, after_s=10.0)
        driver.feed(LoadFailed(A, "damaged"))
        driver.gone(A)
    driver.ask(A, after_s=870.0)
    assert driver.only(Refuse).retry_after_s == pytest.approx(10.0)
    driver.ask(A, after_s=10.0)
    assert driver.only(StartLoad).key == A


def test_who_comes_when_the_pause_is_over_but_the_process_is_not_waits_for_the_next() -> None:
    driver = Driver()
    driver.ask(A)
    driver.feed(LoadFailed(A, "damaged"))
    driver.ask(A, after_s=2.0)
    assert driver.effects == ()
    assert driver.gone(A) == (StartLoad(A, size()),)


def test_a_dead_worker_loses_its_leases_and_whoever_asks_again_gets_a_new_one() -> None:
    driver = Driver()
    lease = driver.load(A)
    driver.feed(WorkerDied(A, "SIGSEGV"))
    assert driver.effects == (Abort(lease, A, AbortReason.WORKER_DIED), StartUnload(A, UnloadReason.FAILURE))
    again = driver.ask(A)
    driver.gone(A)
    driver.feed(Loaded(A, size()))
    assert driver.only(GrantLease).waiter == again
    assert driver.feed(LeaseReleased(lease, A)) == ()  # the owner may still say so


def test_a_worker_that_keeps_dying_is_left_alone() -> None:
    driver = Driver()
    for _ in range(2):
        driver.load(A)
        driver.feed(WorkerDied(A, "SIGSEGV"))
        driver.gone(A)
        assert driver.record(A).state is State.UNLOADED
    driver.load(A)
    driver.feed(WorkerDied(A, "SIGSEGV"))
    driver.gone(A)
    assert driver.record(A).state is State.FAILED


# ---- measurements beyond what was reserved


def test_the_next_load_reserves_what_the_last_one_took() -> None:
    driver = Driver(ttl_s=10.0)
    lease = driver.ask(A, size(60))
    driver.feed(Loaded(A, size(70)))
    driver.feed(LeaseReleased(lease, A))
    assert driver.used() == 70
    driver.tick(10.0)
    driver.gone(A)
    driver.ask(A, size(60))
    assert driver.only(StartLoad).reserved == size(70)


def test_idle_models_go_when_a_newcomer_takes_more_than_reserved_however_young() -> None:
    driver = Driver(min_residency_s=1000.0)
    driver.load_idle(B, size(40))
    waiter = driver.ask(A, size(60))
    driver.feed(Loaded(A, size(70)))
    assert driver.state.ledger.overcommitted_bytes(GPU) == 10
    assert driver.effects == (StartUnload(B, UnloadReason.OVERCOMMIT), GrantLease(waiter, A))
    assert driver.state.churn.swaps_s == ()  # nobody asked for that


def test_a_newcomer_that_takes_more_goes_again_rather_than_those_in_use() -> None:
    driver = Driver(Policy(patience_s=5.0))
    lease = driver.load(B, size(40))
    waiter = driver.ask(A, size(60))
    driver.feed(Loaded(A, size(70)))
    assert driver.effects == (StartUnload(A, UnloadReason.OVERCOMMIT),)
    driver.gone(A)
    assert driver.state.ledger.overcommitted_bytes(GPU) == 0
    assert driver.states() == {"A": "queued", "B": "ready"}
    driver.feed(LeaseReleased(lease, B))
    driver.gone(B)
    driver.feed(Loaded(A, size(70)))
    assert driver.only(GrantLease).waiter == waiter


def test_a_newcomer_that_can_never_fit_as_measured_is_refused() -> None:
    driver = Driver()
    driver.ask(A, size(60))
    driver.feed(Loaded(A, size(110)))
    driver.gone(A)
    assert driver.only(Refuse).kind is RefusalKind.INSUFFICIENT_MEMORY
    assert driver.used() == 0


def test_a_smaller_budget_drains_who_is_in_use() -> None:
    driver = Driver()
    lease = driver.load(A, size(60))
    driver.feed(BudgetPatched(GPU, Budget(50)))
    assert driver.record(A).state is State.DRAINING
    driver.feed(LeaseReleased(lease, A))
    assert driver.only(StartUnload).reason is UnloadReason.OVERCOMMIT


def test_late_news_of_a_process_that_is_ending_still_counts_its_bytes() -> None:
    driver = Driver(budgets={GPU: Budget(200)})
    driver.ask(A, size(60))
    driver.feed(WorkerDied(A, "?"))
    assert driver.feed(Loaded(A, size(90))) == ()
    assert driver.used() == driver.state.ledger.freeing[GPU] == 90
    driver.gone(A)
    assert driver.used() == 0

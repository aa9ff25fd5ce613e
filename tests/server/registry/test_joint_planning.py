"""Plans for several loads at once: as the plan of each where there is one, and never at each other's cost."""

from __future__ import annotations

from typing import Any

import pytest

from memory_efficient_gpt_server.registry.events import BudgetPatched, Event, LeaseReleased
from memory_efficient_gpt_server.registry.joint_planning import JointPlan, plan_together
from memory_efficient_gpt_server.registry.ledger import Budget, LedgerError
from memory_efficient_gpt_server.registry.planning import Candidate, LoadRequest, Verdict, plan
from memory_efficient_gpt_server.registry.records import Policy
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST, Estimate, Kind, VariantKey
from memory_efficient_gpt_server.registry.victims import Way
from tests.server.registry.registry_driver import GPU, A, B, C, Driver, elastic, size
from tests.server.registry.simulation import Simulation

INT4 = VariantKey("B", "int4")


def _plan(driver: Driver, *loads: tuple[VariantKey, Estimate]) -> JointPlan:
    before = driver.state
    found = plan_together([LoadRequest(*load) for load in loads], driver.state, driver.now_s)
    assert driver.state == before
    return found


def _fitting(found: JointPlan) -> dict[str, bool]:
    return {str(load.key): load.fits for load in found.loads}


def test_what_fits_alone_may_not_fit_together() -> None:
    driver = Driver()
    assert _plan(driver, (A, size(60))).fits and _plan(driver, (B, size(60))).fits
    both = _plan(driver, (A, size(60)), (B, size(60)))
    assert (both.fits, both.verdict) == (False, Verdict.NEVER)
    assert both.needed == {GPU: 120} and both.reservable == {GPU: 100} and both.eta_s is None
    assert _fitting(both) == {"A": True, "B": False}
    assert [load.bytes for load in both.loads] == [{Kind.WEIGHTS: 60}] * 2
    assert [(c.text, c.keys, c.needed) for c in both.would_fit] == [
        ("without A", (B,), {GPU: 60}), ("without B", (A,), {GPU: 60}),
    ]  # fmt: skip


def test_one_that_does_not_fit_takes_nothing_from_later_ones() -> None:
    found = _plan(Driver(), (A, size(60)), (B, size(60)), (C, size(40)))
    assert _fitting(found) == {"A": True, "B": False, "C": True}
    assert [change.text for change in found.would_fit] == ["without A", "without B"]


def test_those_who_leave_are_named_once_for_all() -> None:
    driver = Driver(budgets={GPU: Budget(130)})
    driver.load_idle(A, size(60))
    found = _plan(driver, (B, size(40)), (C, size(50)))
    assert found.verdict is Verdict.AFTER_EVICTION and found.victims.by(Way.EVICT) == (A,)
    assert [load.verdict for load in found.loads] == [Verdict.NOW, Verdict.AFTER_EVICTION]
    assert _plan(driver, (B, size(40)), (C, size(30))).victims.ways == {}


def test_what_is_loaded_already_needs_nothing_and_does_not_leave_for_the_others() -> None:
    driver = Driver()
    driver.load_idle(A, size(60))
    assert _plan(driver, (B, size(60))).victims.by(Way.EVICT) == (A,)
    found = _plan(driver, (A, size(60)), (B, size(60)))
    assert found.verdict is Verdict.NEVER and found.needed == {GPU: 60} and found.reservable == {GPU: 40}
    assert _fitting(found) == {"A": True, "B": False} and found.loads[0].needed == {}
    assert _fitting(_plan(driver, (B, size(60)), (A, size(60)))) == {"B": True, "A": False}
    assert _plan(driver, (A, size(60)), (B, size(40))).verdict is Verdict.NOW


def test_one_that_stays_gives_the_kv_memory_that_it_can_spare() -> None:
    driver = Driver(kv_soft_limit_bytes=10)
    driver.load_idle(A, elastic(40, kv_bytes=40))
    found = _plan(driver, (A, elastic(40, kv_bytes=40)), (B, size(45)))
    assert found.verdict is Verdict.AFTER_SHRINKING and found.victims.kv_bytes == {A: 25}
    assert _plan(driver, (A, elastic(40, kv_bytes=40)), (B, size(51))).verdict is Verdict.NEVER


def test_models_in_use_block_all_that_need_their_room() -> None:
    driver = Driver()
    lease = driver.load(A, size(60))
    found = _plan(driver, (B, size(30)), (C, size(30)))
    assert (found.verdict, found.blocked_by, found.eta_s) == (Verdict.BUSY, (A,), None)
    assert _fitting(found) == {"B": True, "C": False}
    driver.feed(LeaseReleased(lease, A))
    assert _plan(driver, (B, size(30)), (C, size(30))).fits


def test_the_time_is_that_of_the_last_load_with_so_many_at_a_time() -> None:
    policy = Policy(max_loads=2, load_bytes_per_s=10.0, unload_s=2.0)
    driver = Driver(policy, budgets={GPU: Budget(300)})
    loads = ((A, size(60)), (B, size(40)), (C, size(30)))
    assert _plan(driver, *loads).eta_s == pytest.approx(4 + 3)
    driver.ask(A, size(60))
    assert _plan(driver, *loads).eta_s == pytest.approx(4 + 3)
    longer = ((B, size(70)), (C, size(30)))
    assert _plan(driver, *longer).eta_s == pytest.approx(6 + 3)  # A has one of the two places until then


def test_the_time_begins_when_there_is_room() -> None:
    driver = Driver(Policy(load_bytes_per_s=10.0, unload_s=2.0))
    driver.load_idle(A, size(60), load_s=6.0)
    assert _plan(driver, (B, size(40)), (C, size(50))).eta_s == pytest.approx(2 + 5)


def test_a_smaller_variant_of_one_is_proposed_before_leaving_it_out() -> None:
    smaller = (Candidate(str(INT4), INT4, size(20)),)
    requests = [LoadRequest(A, size(70)), LoadRequest(B, size(60), smaller)]
    found = plan_together(requests, Driver().state, 0.0)
    assert [(c.text, c.keys, c.needed) for c in found.would_fit] == [
        (f"with {INT4} for B", (A, INT4), {GPU: 90}),
        ("without A", (B,), {GPU: 60}),
        ("without B", (A,), {GPU: 70}),
    ]
    with_both = [*requests, LoadRequest(INT4, size(20))]
    assert not any("for B" in c.text for c in plan_together(with_both, Driver().state, 0.0).would_fit)


def test_devices_are_judged_each_by_itself() -> None:
    driver = Driver(budgets={GPU: Budget(100), HOST: Budget(10)})
    on_both: dict[str, Any] = {"host_bytes": 6}
    found = _plan(driver, (A, size(20, **on_both)), (B, size(20, **on_both)))
    assert found.needed == {GPU: 40, HOST: 12} and found.verdict is Verdict.NEVER
    driver.feed(BudgetPatched(HOST, Budget(12)))
    assert _plan(driver, (A, size(20, **on_both)), (B, size(20, **on_both))).verdict is Verdict.NOW
    with pytest.raises(LedgerError):
        _plan(driver, (A, size(20, device="cuda:9")))


class _Watched(Simulation):
    """Asks for plans again and again while it lives."""

    compared = 0

    def _feed(self, event: Event) -> None:
        super()._feed(event)
        if self.num_events % 5 == 0:
            for key, estimate in self.estimates.items():
                self._compare(LoadRequest(key, estimate))
            requests = [LoadRequest(key, estimate) for key, estimate in self.estimates.items()]
            together = plan_together(requests, self.state, self.now_s)
            assert not together.victims.anyone_goes or not together.victims.by(Way.DRAIN)
            going = {k for k, way in together.victims.ways.items() if way is not Way.SHRINK}
            assert going.isdisjoint(self.estimates), "a load of a plan makes room for another of it"

    def _compare(self, request: LoadRequest) -> None:
        one, several = (
            plan(request, self.state, self.now_s),
            plan_together([request], self.state, self.now_s),
        )
        assert (one.verdict, one.needed, one.bytes) == (
            several.verdict, several.needed, several.loads[0].bytes,
        )  # fmt: skip
        assert (one.evict, one.sleep) == (several.victims.by(Way.EVICT), several.victims.by(Way.SLEEP))
        assert one.shrink == several.victims.kv_bytes and one.blocked_by == several.blocked_by
        assert one.eta_s == pytest.approx(several.eta_s)
        record = self.state.records.get(request.key)
        if record is None or record.state is not State.READY:
            _Watched.compared += 1


def test_of_one_load_both_planners_say_the_same_whatever_happens() -> None:
    for seed in range(40):
        _Watched(seed).run()
    assert _Watched.compared > 1000

"""What is told of a step."""

from __future__ import annotations

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from memory_efficient_gpt_server.registry.events import (
    AdminSleep,
    BudgetPatched,
    Event,
    KvMoved,
    KvWanted,
    LeaseReleased,
    Left,
    Loaded,
    LoadFailed,
    Patched,
    Removed,
    Tick,
    WorkerDied,
)
from memory_efficient_gpt_server.registry.happenings import MOST_CHARACTERS, happenings
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.records import Policy
from memory_efficient_gpt_server.registry.variants import HOST, VariantKey
from tests.server.registry.registry_driver import GPU, A, B, Driver, elastic, size

Told = list[tuple[str, dict[str, Any]]]


class Watched(Driver):
    """A driver that keeps what is told of the last event. Waiters below 900 are requests."""

    told: Told
    asked: Mapping[int, VariantKey] = MappingProxyType({})
    """Those that did not ask for A."""

    def feed(self, event: Event, after_s: float = 0.0) -> Any:
        before = self.state
        effects = super().feed(event, after_s)
        asked = dict.fromkeys(range(1, 900), A) | dict(self.asked)
        found = happenings(before, event, effects, self.state, self.now_s, asked.get)
        self.told = [(str(h.kind), dict(h.facts)) for h in found]
        json.dumps(self.told)
        return effects


def state(key: VariantKey, was: str, now: str, reason: str | None = None) -> tuple[str, dict[str, Any]]:
    facts = {"model": key.model_id, "variant": str(key), "from": was, "to": now, "reason": reason}
    return "state", facts


def test_a_load_is_told_with_its_seconds_and_states_from_first_to_last() -> None:
    driver = Watched()
    lease = driver.ask(A)
    assert driver.told == [state(A, "unloaded", "loading")]
    driver.feed(Loaded(A, size()), 1.25)
    load = {"model": "A", "variant": "A", "result": "success", "seconds": 1.25, "reason": None}
    assert driver.told == [("load", load), state(A, "loading", "ready")]
    for event in (LeaseReleased(lease, A), Tick()):
        driver.feed(event)
        assert driver.told == []


def test_a_failed_load_is_told_with_its_cause_and_who_was_refused() -> None:
    driver = Watched()
    driver.ask(A)
    driver.ask(A)
    driver.feed(LoadFailed(A, "x" * 10_000), 2.0)
    (load, failure), changed, (refusal, refused) = driver.told
    assert load == "load" and failure["result"] == "failure" and failure["seconds"] == 2.0
    assert failure["reason"].startswith("xxx") and len(failure["reason"]) < MOST_CHARACTERS + 10
    assert changed[1]["to"] == "unloading"
    assert (refusal, refused["code"], refused["requests"]) == ("refusal", "load_failed", 2)


def test_a_worker_that_dies_while_it_serves_is_no_failed_load() -> None:
    driver = Watched()
    driver.load(A)
    driver.feed(WorkerDied(A, "killed"))
    assert driver.told == [state(A, "ready", "unloading", "killed")]


def test_an_eviction_is_told_with_its_reason_and_bytes() -> None:
    driver = Watched()
    driver.load_idle(A)
    driver.ask(B)
    eviction = {
        "model": "A", "variant": "A", "reason": "budget", "way": "unload", "held_bytes": {GPU: 60},
    }  # fmt: skip
    assert ("eviction", eviction) in driver.told
    driver.gone(A)
    assert state(A, "unloading", "unloaded") in driver.told and state(B, "queued", "loading") in driver.told


def test_a_model_that_is_put_to_sleep_is_told_as_that() -> None:
    driver = Watched(budgets={GPU: Budget(100), HOST: Budget(100)})
    driver.load_idle(A, size(can_sleep=True))
    driver.feed(AdminSleep(900, A))
    ((_, slept),) = [told for told in driver.told if told[0] == "eviction"]
    assert (slept["way"], slept["reason"]) == ("sleep", "admin")


def test_refusals_of_operations_are_no_refused_requests() -> None:
    driver = Watched()
    driver.feed(AdminSleep(900, A))
    assert driver.effects and driver.told == []


def test_requests_that_gave_up_are_told_once_for_all() -> None:
    driver = Watched(Policy(max_wait_s=10.0))
    driver.load(A)
    driver.asked = dict.fromkeys((2, 3, 4), B)
    for _ in range(3):
        driver.ask(B)
    driver.tick(11.0)
    refusal = {"model": "B", "variant": "B", "code": "models_busy", "requests": 3, "reason": None}
    assert ("refusal", refusal) in driver.told


def kv(key: VariantKey, change: int, now: int, partner: VariantKey | None = None) -> tuple[str, Any]:
    figures = {"device": GPU, "change_bytes": change, "kv_bytes": now}
    told = {"partner": None if partner is None else str(partner)}
    return "kv", {"model": key.model_id, "variant": str(key), **figures, **told}


def test_kv_memory_that_moves_is_told_of_both_with_whose_it_was() -> None:
    driver = Watched(kv_soft_limit_bytes=4)
    driver.load_idle(A, elastic(30, kv_bytes=20))
    driver.load(B, elastic(30, kv_bytes=10))
    driver.feed(KvWanted(B, 18))
    assert driver.told == [kv(B, 10, 20)], "free bytes; what A gives is still its own"
    driver.feed(KvMoved(A, 8))
    assert driver.told == [kv(A, -8, 12, B), kv(B, 8, 28, A)]
    driver.feed(KvMoved(A, 8))
    assert driver.told == [], "late news of nothing"


def test_kv_memory_for_a_load_goes_to_nobody_in_particular() -> None:
    driver = Watched(kv_soft_limit_bytes=4)
    driver.load_idle(A, elastic(30, kv_bytes=20))
    driver.ask(B, size(60))
    driver.feed(KvMoved(A, 16))
    assert driver.told[0] == kv(A, -16, 4)
    assert [name for name, _ in driver.told] == ["kv", "state"]


def test_budgets_and_settings_are_told_when_they_change() -> None:
    driver = Watched()
    driver.feed(BudgetPatched(GPU, Budget(150)))
    assert driver.told == [("budget", {"device": GPU, "from_bytes": 100, "budget_bytes": 150})]
    driver.patch(A, pinned=True)
    assert driver.told == [("model", {"model": "A", "change": "changed", "settings": {"pinned": True}})]
    driver.patch(A, pinned=True)
    assert driver.told == []
    driver.feed(Removed(900, "A"))
    assert driver.told == [("model", {"model": "A", "change": "removed", "settings": {}})]
    driver.feed(Removed(901, "A"))
    assert driver.told == []


def test_a_model_that_comes_is_told_with_its_settings() -> None:
    driver = Watched(ttl_s=5.0)
    entry = driver.state.entries["A"]
    driver.feed(Removed(900, "A"))
    before = driver.state
    driver.feed(Patched(entry))
    ((kind, facts),) = driver.told
    assert before.entries.keys() == {"B", "C"} and (kind, facts["change"]) == ("model", "registered")
    assert facts["settings"] == {
        "pinned": False, "ttl_s": 5.0, "min_residency_s": 0.0, "priority": 0, "kv_soft_limit_bytes": None,
        "kv_hard_limit_bytes": None,
    }  # fmt: skip


def test_who_leaves_is_no_news_unless_the_model_is_wanted_no_more() -> None:
    driver = Watched()
    driver.load(A)
    waiter = driver.ask(B)
    driver.feed(Left(waiter, B))
    assert driver.told == [state(B, "queued", "unloaded")]

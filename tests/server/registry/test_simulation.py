"""The simulation as a test, and tests of its own eyes."""

from __future__ import annotations

from collections import Counter

import pytest

from memory_efficient_gpt_server.registry import kv_sharing, scheduling
from memory_efficient_gpt_server.registry.draft import Draft
from memory_efficient_gpt_server.registry.load_queue import LoadQueue
from memory_efficient_gpt_server.registry.records import VariantRecord
from tests.server.registry.simulation import Simulation

RUNS = 300


def test_random_lives_break_no_rule_and_reach_what_they_should() -> None:
    counts: Counter[str] = Counter()
    for seed in range(RUNS):
        try:
            counts += Simulation(seed).run()
        except Exception as error:
            error.add_note(f"python -m tests.server.registry.simulation --replay {seed}")
            raise
    for rare in (
        "refused: cancelled",
        "StartWake",
        "GrowKv",
        "MoveKv",
        "aborted: drain_deadline",
        "refused: churn_limited",
        "refused: eviction_needed",
    ):
        assert counts[rare] > 0, f"the simulation never comes to {rare}"
    assert counts["drained for another model"] > 50
    assert counts["overcommitted"] > 20
    assert counts["removals"] > counts["removed"] > 20
    assert counts["limits changed below what is held"] > 10
    assert counts["gave up what is beyond its limit"] > 10


def test_a_seed_decides_everything() -> None:
    first, second = Simulation(7), Simulation(7)
    assert first.run() == second.run()
    assert first.state == second.state


def test_leaks_that_are_not_booked_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Draft, "gone", _gone_without_leaks)
    assert _noticed("bytes are in use")


def test_waiters_that_nobody_answers_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_refuse_expired", lambda draft: None)
    assert _noticed("too long")


def test_a_registry_that_does_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "_makes_room", lambda *_: True)
    assert _noticed("nothing moves")


def test_evictions_that_nobody_wanted_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LoadQueue, "spares_others", lambda *_: False)
    assert _noticed("goes though nobody may")


def test_a_model_that_keeps_more_than_its_new_limit_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scheduling, "keep_limits", lambda *_: None)
    assert _noticed("was not asked for them")


def test_a_model_that_is_never_asked_again_for_what_is_beyond_its_limit_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kv_sharing, "forget_floors", lambda draft: None)
    assert _noticed("is not asked again")


_real_gone = Draft.gone


def _gone_without_leaks(self: Draft, record: VariantRecord, *, lost: bool) -> None:
    _real_gone(self, record, lost=False)


def _noticed(words: str) -> bool:
    for seed in range(RUNS):
        try:
            Simulation(seed).run()
        except AssertionError as error:
            if words in str(error):
                return True
    return False

"""Turns, ratios and verdicts."""

from __future__ import annotations

import math

from benchmarks.cpu import WORKLOADS, markdown
from benchmarks.measuring import Figure, Target, interleaved, random_prompts, ratio_of_best


def test_arms_take_turns_in_alternating_order_and_the_first_repetition_is_dropped() -> None:
    calls: list[str] = []
    results = interleaved({"a": lambda r: ("a", r), "b": lambda r: ("b", r)}, 2, calls.append)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert results == {"a": [("a", 0), ("a", 1)], "b": [("b", 0), ("b", 1)]}


def test_a_disturbed_run_does_not_change_the_ratio() -> None:
    assert ratio_of_best([100.0, 10.0, 99.0], [48.0, 50.0, 49.0], best=max) == 2.0
    assert ratio_of_best([2.0, 9.0], [1.0, 1.1], best=min) == 2.0


def test_prompts_repeat_within_a_repetition_and_differ_between_them() -> None:
    assert random_prompts(1, 2, 50, 4096) == random_prompts(1, 2, 50, 4096)
    assert random_prompts(1, 2, 50, 4096)[0][:16] != random_prompts(2, 2, 50, 4096)[0][:16]


def test_the_report_says_pass_miss_and_not_measured() -> None:
    figures = [
        Figure("fast", 1.2, target=Target(1.0)),
        Figure("slow", 1.2, target=Target(1.0, "at most")),
        Figure("absent", math.nan, target=Target(1.0)),
    ]
    rows = markdown([(WORKLOADS[0], figures)]).splitlines()[2:]
    assert [row.split(" | ")[4] for row in rows] == ["pass", "miss", ""]
    assert "not measured" in rows[2]

"""When workers are restarted, given up and called stuck."""

from __future__ import annotations

from memory_efficient_gpt_server.hosting import worker_limits
from memory_efficient_gpt_server.settings import load_settings
from memory_efficient_gpt_server.supervision import USUAL_LIMITS, RestartRule, StallRule, WorkerLimits


def test_restarts_wait_twice_as_long_each_time() -> None:
    rule = RestartRule()
    assert [rule.died(t * 200.0, ready_for_s=0) for t in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]


def test_the_fifth_death_in_ten_minutes_is_the_last() -> None:
    rule = RestartRule()
    assert [rule.died(t * 149.0, ready_for_s=1) is None for t in range(5)] == [False] * 4 + [True]


def test_a_steady_worker_is_restarted_quickly_again() -> None:
    rule = RestartRule()
    for t in range(4):
        rule.died(t * 300.0, ready_for_s=0)
    assert rule.died(2000.0, ready_for_s=60) == 1


def test_a_worker_is_stuck_ten_seconds_after_its_last_step() -> None:
    rule = StallRule(100.0)
    rule.counted(7, 0.02, 103.0)
    assert not rule.stalled(113.0)
    assert rule.stalled(113.1)
    rule.counted(7, 0.02, 114.0)
    assert rule.stalled(114.0)
    rule.counted(8, 0.02, 114.0)
    assert not rule.stalled(120.0)


def test_slow_steps_are_given_more_time() -> None:
    rule = StallRule(0.0)
    rule.counted(1, 3.0, 0.0)
    assert not rule.stalled(59.0)
    assert rule.stalled(61.0)


def test_work_after_a_long_rest_starts_the_clock() -> None:
    rule = StallRule(0.0)
    rule.moved(1000.0)
    assert not rule.stalled(1009.0)


def test_a_stuck_worker_is_killed_within_thirty_seconds() -> None:
    rule = StallRule(0.0)
    assert not rule.beyond_hope(11.0)
    assert rule.beyond_hope(30.0)


def test_a_worker_that_computes_is_slow_and_not_killed_for_ten_minutes() -> None:
    rule = StallRule(0.0)
    for second in range(1, 600):
        rule.observed(cpu_s=0.9 * second, now_s=second)
        assert not rule.beyond_hope(second)
    assert rule.stalled(599.0)  # but it is not ready meanwhile
    rule.observed(cpu_s=541.0, now_s=601.0)
    assert rule.beyond_hope(601.0)


def test_a_worker_that_stops_to_compute_is_killed() -> None:
    rule = StallRule(0.0)
    rule.observed(cpu_s=20.0, now_s=20.0)
    rule.observed(cpu_s=20.0, now_s=40.0)
    assert not rule.beyond_hope(44.0)
    assert rule.beyond_hope(46.0)


def test_the_settings_limits_are_the_workers() -> None:
    given = {"resume_wait_s": 7, "stall_s": 1, "stall_steps": 2, "stall_kill_factor": 3, "max_step_s": 100}
    limits = worker_limits(load_settings(given, {}).settings)
    assert limits == WorkerLimits(resume_wait_s=7, stall_s=1, stall_steps=2, kill_factor=3, max_step_s=100)
    assert worker_limits(load_settings({}, {}).settings) == USUAL_LIMITS == WorkerLimits()
    rule = limits.stall_rule(0.0)
    assert rule.stalled(1.1) and not rule.beyond_hope(2.9) and rule.beyond_hope(3.1)
    rule.observed(cpu_s=100.0, now_s=100.0)
    assert not rule.beyond_hope(99.9) and rule.beyond_hope(100.1)


def test_limits_can_be_set() -> None:
    rule = StallRule(0.0, least_s=1.0, steps=2.0, kill_after=3.0, longest_step_s=100.0)
    rule.counted(1, 0.1, 0.0)
    assert rule.stalled(1.1) and not rule.beyond_hope(2.9) and rule.beyond_hope(3.1)
    rule.counted(2, 4.0, 0.0)
    assert not rule.stalled(7.9) and rule.stalled(8.1)
    rule.observed(cpu_s=100.0, now_s=100.0)
    assert not rule.beyond_hope(99.9) and rule.beyond_hope(100.1)

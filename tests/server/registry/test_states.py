"""The life of a variant."""

from __future__ import annotations

import itertools

import pytest

from memory_efficient_gpt_server.registry.states import (
    HAS_PROCESS,
    TRANSITIONS,
    IllegalTransitionError,
    Life,
    State,
    fail,
    move,
)


def test_a_whole_life_is_legal() -> None:
    life = Life()
    before_sleep = (State.QUEUED, State.LOADING, State.READY, State.SLEEPING, State.ASLEEP)
    for state in (*before_sleep, State.WAKING, State.READY, State.DRAINING, State.UNLOADING, State.UNLOADED):
        life = move(life, state, 1.0, "because")
    assert life == Life(State.UNLOADED, 1.0, "because")


@pytest.mark.parametrize(("before", "after"), list(itertools.product(State, State)))
def test_every_transition_that_is_not_drawn_raises(before: State, after: State) -> None:
    if after in TRANSITIONS[before] and after is not State.FAILED:
        assert move(Life(before), after, 2.0).state is after
    else:
        with pytest.raises(IllegalTransitionError):
            move(Life(before), after, 2.0)


def test_a_process_is_told_to_end_before_anything_else_can_begin() -> None:
    for state in HAS_PROCESS - {State.UNLOADING}:
        assert TRANSITIONS[state] <= HAS_PROCESS, f"{state} could lose its process unseen"


def test_ready_is_reached_only_by_a_load_a_wake_up_or_a_drain_called_off() -> None:
    assert {s for s in State if State.READY in TRANSITIONS[s]} == {
        State.LOADING,
        State.WAKING,
        State.DRAINING,
    }


def test_a_failure_has_a_reason_and_a_time_to_retry() -> None:
    life = fail(Life(State.UNLOADING), 5.0, "no memory", retry_at_s=7.0)
    assert life == Life(State.FAILED, 5.0, "no memory", 7.0)
    with pytest.raises(IllegalTransitionError, match="process"):
        fail(Life(State.READY), 5.0, "x", 7.0)

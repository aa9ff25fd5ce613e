"""What a load tells of its progress, summed up for a log."""

from __future__ import annotations

from memory_efficient_gpt.progress import PhaseClock


def test_a_clock_tells_where_a_loads_time_went() -> None:
    now = [0.0]
    clock = PhaseClock(lambda: now[0])
    for seconds, phase in [
        (0.5, "checking files"), (0.001, "probing"), (0.002, "loading weights"), (2.0, "quantizing model.a"),
        (0.25, "quantizing model.b"), (0.25, "ready"),
    ]:  # fmt: skip
        now[0] += seconds
        clock.tell(phase)
    now[0] += 0.004
    assert clock.summary() == "loading weights 2.00 s, quantizing 0.50 s"


def test_a_load_that_told_nothing_has_no_phases() -> None:
    assert PhaseClock().summary() == ""

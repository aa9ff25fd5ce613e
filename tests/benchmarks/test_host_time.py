"""The host's benchmark runs whole requests, and counts its steps."""

from __future__ import annotations

from benchmarks.host_time import Stopwatch, make_engine, run


def test_every_step_is_measured_and_every_request_gets_its_tokens() -> None:
    engine, graphs = make_engine(4, 64)
    watch = Stopwatch()
    watch.watch(engine._scheduler, "plan", "plan")
    run(engine, [(40, 5), (30, 9), (3, 1)], 0.6, watch)
    assert sum(step["rows"] for step in watch.steps) == 5 + 9 + 1
    assert all(0 < step["plan"] < step["engine"] for step in watch.steps)
    assert sum(graphs.kinds.values()) == engine.stats().steps
    assert not engine.has_work

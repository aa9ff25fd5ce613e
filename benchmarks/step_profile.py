"""Where the time of an engine's steps goes on a GPU, by kind of step.

Purpose: count, tokens, host and device milliseconds of the steps of one run.
Does not know: workloads, kernels.
Invariant: nothing waits for the device that would not have waited; the figures are read when the run is over.

A kind is how a step was computed and the size that it was padded to. Device time is from when the device
reaches a step to when it has ended, so it has the gaps of calls that the host makes one by one. The
device was idle for what the steps' device times lack of the whole run's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.sequence import Step
from memory_efficient_gpt.step_shape import MIXED_ROWS, ROWS, TOKENS


@dataclass(slots=True)
class _Record:
    kind: str
    tokens: int
    plan_ms: float
    launch_ms: float
    began: torch.cuda.Event
    ended: torch.cuda.Event
    wait_ms: float = 0.0
    commit_ms: float = 0.0


class StepProfile:
    """Watches one engine from now on; a request that finds it idle begins a new run."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._records: list[_Record] = []
        self._plan_ms = 0.0
        self._began_s = self._ended_s = 0.0
        self._committed = 0
        scheduler, runner = engine._scheduler, engine._runner
        self._replace(engine, "submit", self._submit)
        self._replace(scheduler, "plan", self._plan)
        self._replace(runner, "launch", self._launch)
        self._replace(scheduler, "commit", self._commit)

    def summary(self) -> dict[str, dict[str, float]]:
        """By kind: count, tokens a step, and mean milliseconds of each part; `run` has the whole."""
        torch.cuda.synchronize()
        kinds: dict[str, list[tuple[_Record, float]]] = defaultdict(list)
        for record in self._records:
            kinds[record.kind].append((record, record.began.elapsed_time(record.ended)))
        result = {kind: _means(records) for kind, records in sorted(kinds.items())}
        device_ms = sum(row["count"] * row["device_ms"] for row in result.values())
        whole_ms = (self._ended_s - self._began_s) * 1000
        result["run"] = {
            "count": len(self._records), "seconds": whole_ms / 1000, "device_busy": device_ms / whole_ms,
        }  # fmt: skip
        return result

    def print(self, console: Console) -> None:
        """The summary as a table, the kinds that take most of the device's time first."""
        summary = self.summary()
        whole = summary.pop("run")
        parts = ("count", "tokens", "plan_ms", "launch_ms", "commit_ms", "wait_ms", "device_ms")
        table = Table("kind", *parts, "device_s")
        for kind, row in sorted(summary.items(), key=lambda item: -item[1]["count"] * item[1]["device_ms"]):
            seconds = row["count"] * row["device_ms"] / 1000
            table.add_row(kind, *(f"{row[part]:.3g}" for part in parts), f"{seconds:.3f}")
        console.print(table)
        console.print(
            f"{whole['count']:.0f} steps, {whole['seconds']:.3f} s, device in steps for "
            f"{whole['device_busy']:.0%} of it"
        )

    def _replace(self, owner: Any, name: str, watched: Callable[..., Any]) -> None:
        own = getattr(owner, name)
        setattr(owner, name, lambda *args: watched(own, *args))

    def _submit(self, own: Callable[..., Any], *args: Any) -> None:
        if not self._engine.has_work:
            self._records.clear()
            self._committed = 0
            self._began_s = time.perf_counter()
        own(*args)

    def _plan(self, own: Callable[[], Step | None]) -> Step | None:
        began = time.perf_counter()
        step = own()
        self._plan_ms = (time.perf_counter() - began) * 1000
        return step

    def _launch(self, own: Callable[[Step], Any], step: Step) -> Any:
        began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before = self._graph_counts()
        start = time.perf_counter()
        began.record()
        pending = own(step)
        ended.record()
        spent_ms = (time.perf_counter() - start) * 1000
        kind = _kind(step, before, self._graph_counts())
        record = _Record(kind, step.num_tokens, self._plan_ms, spent_ms, began, ended)
        self._records.append(record)
        wait = pending.wait

        def waited() -> Any:
            start = time.perf_counter()
            outcome = wait()
            record.wait_ms = (time.perf_counter() - start) * 1000
            return outcome

        return _Waited(waited)

    def _commit(self, own: Callable[..., Any], *args: Any) -> Any:
        began = time.perf_counter()
        events = own(*args)
        self._ended_s = time.perf_counter()
        self._records[self._committed].commit_ms = (self._ended_s - began) * 1000
        self._committed += 1
        return events

    def _graph_counts(self) -> tuple[int, int]:
        graphs = getattr(self._engine._runner, "_replays", None)
        return (0, 0) if graphs is None else (graphs.captured, graphs.replayed)


@dataclass(slots=True)
class _Waited:
    """Stands in for a PendingStep."""

    wait: Callable[[], Any]


def _kind(step: Step, before: tuple[int, int], after: tuple[int, int]) -> str:
    """How it was computed, and the size."""
    how = "captured" if after[0] > before[0] else "graph" if after[1] > before[1] else "calls"
    rows = len((step.first or step).chunks)
    if step.num_tokens == rows:
        return f"{how}: {_padded(ROWS, rows)} rows"
    return f"{how}: {_padded(TOKENS, step.num_tokens)} tokens, {_padded(MIXED_ROWS, rows)} rows"


def _padded(sizes: tuple[int, ...], size: int) -> int:
    return next((padded for padded in sizes if padded >= size), size)


def _means(records: list[tuple[_Record, float]]) -> dict[str, float]:
    count = len(records)
    means = {
        name: sum(getattr(record, name) for record, _ in records) / count
        for name in ("tokens", "plan_ms", "launch_ms", "commit_ms", "wait_ms")
    }
    return {"count": count, **means, "device_ms": sum(device_ms for _, device_ms in records) / count}

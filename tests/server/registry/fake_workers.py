"""Worker processes that exist only as bytes and scheduled news.

Purpose: run the registry's effects with random times, failures, crashes, leaks and measurements.
Does not know: who asked for what; what the registry believes.
Invariant: `held_bytes` is what the machine's memory really holds at this time, whatever the ledger says.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeAlias

from memory_efficient_gpt_server.registry.effects import (
    Effect,
    GrowKv,
    MoveKv,
    StartLoad,
    StartSleep,
    StartUnload,
    StartWake,
)
from memory_efficient_gpt_server.registry.events import (
    Event,
    KvMoved,
    LeaksCleared,
    Loaded,
    LoadFailed,
    ProcessGone,
    Slept,
    Woke,
    WorkerBack,
    WorkerDied,
    WorkerLost,
)
from memory_efficient_gpt_server.registry.variants import HOST, Estimate, VariantKey, per_device

LONGEST_LOAD_S = 12.0
LONGEST_UNLOAD_S = 3.0
LONGEST_REPLACEMENT_S = 15.0
LONGEST_COPY_S = 2.0
"""To or from host memory."""

News: TypeAlias = Callable[[], Event | None]
"""What is told when its time has come; None: it has become pointless."""


@dataclass(slots=True)
class FakeWorker:
    """One process. phase: loading, ready, replacing, sleeping, asleep, waking or ending; held: bytes by
    device.

    size: what it takes once it is ready, decided when it begins. replacing: it has died, and its successor,
    which has the same bytes, is not ready. num_sleeps: how often it was put to sleep.
    """

    phase: str
    held: dict[str, int]
    size: Estimate
    kv_bytes: int = 0
    num_sleeps: int = 0


@dataclass(slots=True)
class Nature:
    """What a variant is really like, whatever was estimated: size, and how likely things go wrong.

    frail: how likely it dies in a sleep, or on the way there or back.
    """

    size: Estimate
    load_s: float
    fails: float
    crashes: float
    leaks: float
    swells: float
    frail: float


@dataclass(slots=True)
class FakeWorkers:
    """All processes of one machine. `later(delay_s, news)` schedules what they tell."""

    rng: random.Random
    natures: dict[VariantKey, Nature]
    later: Callable[[float, News], None]
    workers: dict[VariantKey, FakeWorker] = field(default_factory=dict)
    leaked: dict[VariantKey, dict[str, int]] = field(default_factory=dict)

    def held_bytes(self, device: str) -> int:
        """What is really in use."""
        total = 0
        for worker in self.workers.values():
            total += worker.held.get(device, 0)
        for leaks in self.leaked.values():
            total += leaks.get(device, 0)
        return total

    def run(self, effect: Effect) -> None:
        """Do what the registry wants. Raises AssertionError if no worker could."""
        match effect:
            case StartLoad(key, reserved):
                self._load(key, reserved)
            case StartUnload(key, _):
                self._unload(key)
            case StartSleep(key, _):
                self._sleep(key)
            case StartWake(key, kv_bytes):
                self._wake(key, kv_bytes)
            case GrowKv(key, size):
                worker = self._in_phase(key, "ready", "replacing")
                worker.kv_bytes += size
                worker.held[self.natures[key].size.device] += size
            case MoveKv(source, _, size):
                worker = self._in_phase(source, "ready", "replacing")
                slept = worker.num_sleeps
                self.later(self.rng.uniform(0.05, 2.0), lambda: self._moved(source, worker, size, slept))
            case _:
                raise AssertionError(f"{effect} is nothing for a worker")

    def clear_leaks(self, key: VariantKey) -> LeaksCleared | None:
        """All processes of it that could not be ended are gone after all."""
        return LeaksCleared(key) if self.leaked.pop(key, None) else None

    def _in_phase(self, key: VariantKey, *phases: str) -> FakeWorker:
        worker = self.workers.get(key)
        assert worker is not None and worker.phase in phases, f"{key} is {worker}, not {phases}"
        return worker

    def _load(self, key: VariantKey, reserved: Estimate) -> None:
        assert key not in self.workers, f"{key} is loaded twice"
        nature, rng = self.natures[key], self.rng
        worker = self.workers[key] = FakeWorker("loading", per_device(reserved.awake()), nature.size)
        delay_s = nature.load_s * rng.uniform(0.8, 1.3)
        if rng.random() < nature.fails:
            self.later(
                delay_s * rng.random(), self._while(key, worker, lambda: LoadFailed(key, "bad checkpoint"))
            )
        elif rng.random() < nature.crashes:
            self.later(delay_s * rng.random(), self._while(key, worker, lambda: WorkerDied(key, "killed")))
        else:
            self.later(delay_s, self._while(key, worker, lambda: self._loaded(key, worker)))

    def _loaded(self, key: VariantKey, worker: FakeWorker) -> Event:
        measured = self._become_ready(key, worker)
        if self.rng.random() < self.natures[key].crashes:
            self.later(self.rng.uniform(0, 30), self._while(key, worker, lambda: self._crashed(key, worker)))
        return Loaded(key, measured)

    def _crashed(self, key: VariantKey, worker: FakeWorker) -> Event:
        """Its supervisor gives up, or has a successor that gets ready or is the last."""
        if worker.phase != "ready" or self.rng.random() < 0.4:
            return WorkerDied(key, "segfault")
        worker.phase = "replacing"
        after_s = self.rng.uniform(0.5, LONGEST_REPLACEMENT_S)
        self.later(after_s, self._while(key, worker, lambda: self._replaced(key, worker)))
        return WorkerLost(key)

    def _replaced(self, key: VariantKey, worker: FakeWorker) -> Event:
        if self.rng.random() < 0.2:
            return WorkerDied(key, "it keeps dying")
        worker.phase = "ready" if worker.phase == "replacing" else worker.phase
        return WorkerBack(key)

    def _become_ready(self, key: VariantKey, worker: FakeWorker, kv_bytes: int | None = None) -> Estimate:
        """kv_bytes: of its KV cache; None: as it is loaded."""
        nature, measured = self.natures[key], worker.size
        if kv_bytes is not None:
            measured = replace(measured, kv_bytes=kv_bytes)
        if self.rng.random() < nature.swells:
            measured = replace(measured, workspace_bytes=measured.workspace_bytes + self.rng.randint(1, 40))
        if worker.phase != "ending":
            worker.phase = "ready"
        worker.held, worker.kv_bytes = per_device(measured.awake()), measured.kv_bytes
        return measured

    def _unload(self, key: VariantKey) -> None:
        worker = self.workers.get(key)
        assert worker is not None and worker.phase != "ending", f"{key} is ended twice, or never began"
        worker.phase = "ending"
        self.later(self.rng.uniform(0.01, LONGEST_UNLOAD_S), lambda: self._gone(key))

    def _gone(self, key: VariantKey) -> Event:
        worker = self.workers.pop(key)
        if self.rng.random() >= self.natures[key].leaks:
            return ProcessGone(key)
        mine = self.leaked.setdefault(key, {})  # it can't be ended
        for device, size in worker.held.items():
            mine[device] = mine.get(device, 0) + size
        if self.rng.random() < 0.6:
            self.later(self.rng.uniform(1, 20), lambda: self.clear_leaks(key))
        return ProcessGone(key, lost=True)

    def _sleep(self, key: VariantKey) -> None:
        worker, size = self._in_phase(key, "ready"), self.natures[key].size
        worker.phase, worker.num_sleeps = "sleeping", worker.num_sleeps + 1
        on_host = size.device == HOST
        parked = 0 if on_host else size.weights_bytes
        worker.held[HOST] = worker.held.get(HOST, 0) + parked
        context = 0 if on_host else size.context_bytes + self.rng.randint(0, 1)
        told = None if on_host or self.rng.random() < 0.5 else max(0, parked + self.rng.randint(-2, 2))

        def slept() -> Event:
            worker.phase = "asleep" if worker.phase == "sleeping" else worker.phase
            if on_host:
                worker.held[HOST] -= worker.kv_bytes
            else:
                really = parked if told is None else told
                worker.held = {size.device: context, HOST: size.host_bytes + really}
            if self.rng.random() < self.natures[key].frail:
                self.later(
                    self.rng.uniform(0, 9), self._while(key, worker, lambda: _died_asleep(key, worker))
                )
            return Slept(key, context, told)

        self._finish_copy(key, worker, slept)

    def _wake(self, key: VariantKey, kv_bytes: int) -> None:
        worker = self._in_phase(key, "asleep")
        worker.phase = "waking"
        self._finish_copy(key, worker, lambda: Woke(key, self._become_ready(key, worker, kv_bytes)))

    def _finish_copy(self, key: VariantKey, worker: FakeWorker, done: News) -> None:
        if self.rng.random() < self.natures[key].frail:
            done = partial(WorkerDied, key, "died while copying")
        self.later(self.rng.uniform(0.01, LONGEST_COPY_S), self._while(key, worker, done))

    def _moved(self, source: VariantKey, giver: FakeWorker, size: int, num_sleeps: int) -> Event | None:
        """It unmaps, sometimes less than it was told to. One that is being ended or put to sleep may or may
        not tell; nobody listens to one that was asleep since."""
        falls_asleep = giver.phase == "sleeping" and giver.num_sleeps == num_sleeps + 1
        awake = giver.phase in ("ready", "replacing", "ending") and giver.num_sleeps == num_sleeps
        if self.workers.get(source) is not giver or not (awake or falls_asleep):
            return None
        if self.rng.random() < 0.3:
            size = self.rng.randint(0, size)
        moved = min(size, giver.kv_bytes)
        giver.kv_bytes -= moved
        giver.held[self.natures[source].size.device] -= moved
        return (
            None
            if giver.phase in ("ending", "sleeping") and self.rng.random() < 0.5
            else KvMoved(source, moved)
        )

    def _while(self, key: VariantKey, worker: FakeWorker, news: News) -> News:
        """News that a process that is being ended sends only now and then, and one that is gone never."""

        def told() -> Event | None:
            if self.workers.get(key) is not worker:
                return None
            return None if worker.phase == "ending" and self.rng.random() < 0.5 else news()

        return told


def _died_asleep(key: VariantKey, worker: FakeWorker) -> Event | None:
    """None: it was woken before."""
    return WorkerDied(key, "died asleep") if worker.phase == "asleep" else None

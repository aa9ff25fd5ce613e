"""Random lives of a registry: clients, administrators and workers on a simulated clock.

Purpose: run the registry's core through states that nobody would think of, and check it after every event.
Does not know: asyncio, real time.
Invariant: a seed decides everything; the same seed gives the same run, event by event.

    PYTHONPATH=engine:server:. nice python -m tests.server.registry.simulation --runs 100000 --seed 0 \\
        --output benchmarks/results/registry_simulation.json
    PYTHONPATH=engine:server:. python -m tests.server.registry.simulation --replay 4711
"""

from __future__ import annotations

import argparse
import heapq
import json
import platform
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.machine import commit
from memory_efficient_gpt_server.registry.effects import Abort, Effect, Finish, GrantLease, Refuse
from memory_efficient_gpt_server.registry.events import (
    AdminCancel,
    AdminLoad,
    AdminSleep,
    AdminUnload,
    AdminWake,
    Asked,
    BudgetPatched,
    Event,
    KvWanted,
    LeaseReleased,
    Left,
    Patched,
    Removed,
    Tick,
    UnloadMode,
)
from memory_efficient_gpt_server.registry.ledger import Budget
from memory_efficient_gpt_server.registry.records import RegistryState
from memory_efficient_gpt_server.registry.reducer import step
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.registry.variants import HOST, Estimate, VariantKey
from tests.server.registry.auditor import Auditor, deadline_of
from tests.server.registry.fake_workers import FakeWorkers, Nature, News
from tests.server.registry.random_worlds import (
    random_entry,
    random_estimate,
    random_nature,
    random_policy,
    relimited,
)

LONGEST_USE_S = 20.0
HORIZON_S = 5_000.0
"""A run that is not over by then never will be."""


@dataclass(slots=True)
class Simulation:
    """One run. `log`: where each event and its effects are told, if anywhere."""

    seed: int
    log: bool = False
    now_s: float = 0.0
    num_events: int = 0
    _heap: list[tuple[float, int, News]] = field(default_factory=list)
    _pushed: int = 0
    _last_id: int = 0

    rng: random.Random = field(init=False)
    state: RegistryState = field(init=False)
    workers: FakeWorkers = field(init=False)
    auditor: Auditor = field(init=False)
    estimates: dict[VariantKey, Estimate] = field(init=False)
    unlimited: dict[VariantKey, Estimate] = field(init=False)
    tick_s: float = field(init=False)

    def __post_init__(self) -> None:
        rng = self.rng = random.Random(self.seed)
        self.tick_s = rng.choice((2.0, 4.0, 8.0))
        budgets = {HOST: Budget(rng.randint(60, 400), rng.randint(0, 15))}
        for index in range(rng.choice((1, 1, 1, 2))):
            budgets[f"cuda:{index}"] = Budget(rng.randint(100, 220), rng.randint(0, 25))
        devices = [*budgets, "cuda:0", "cuda:0"]
        entries = [random_entry(rng, f"m{i}") for i in range(rng.randint(2, 5))]
        natures: dict[VariantKey, Nature] = {}
        self.estimates = {}
        for entry in entries:
            for quantization in (None, "int4")[: rng.choice((1, 1, 2))]:
                key = VariantKey(entry.id, quantization)
                self.estimates[key] = random_estimate(rng, rng.choice(devices))
                natures[key] = random_nature(rng, self.estimates[key])
        self.unlimited = dict(self.estimates)
        self.state = RegistryState.initial(budgets, {e.id: e for e in entries}, random_policy(rng))
        self.workers = FakeWorkers(rng, natures, self._later)
        self.auditor = Auditor(self.workers, LONGEST_USE_S, self.tick_s)

    def run(self) -> Counter[str]:
        """Live through it. Raises AssertionError, or what the registry raised, at the first broken rule."""
        self._schedule_clients()
        self._later(self.tick_s, self._tick)
        self._until_quiet()
        self._unload_everything()
        self._until_quiet()
        for key in list(self.workers.leaked):
            if (cleared := self.workers.clear_leaks(key)) is not None:
                self._feed(cleared)
        self.auditor.check_empty(self.state)
        return self.auditor.counts

    # ---- the clock

    def _later(self, delay_s: float, news: News) -> None:
        self._pushed += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._pushed, news))

    def _until_quiet(self) -> None:
        """Until nothing but ticks would happen and nobody waits."""
        while len(self._heap) > 1 or self.auditor.waiting or self.auditor.leases:
            self.now_s, _, news = heapq.heappop(self._heap)
            assert self.now_s < HORIZON_S, "the run does not come to an end"
            event = news()
            if event is not None:
                self._feed(event)

    def _tick(self) -> Event:
        self._later(self.tick_s, self._tick)
        return Tick()

    def _feed(self, event: Event) -> None:
        self.num_events += 1
        old, now_s = self.state, self.now_s
        self.auditor.before(event, now_s)
        self.state, effects = step(old, event, now_s)
        if self.log:
            _tell(now_s, event, effects, self.state)
        if self.num_events % 16 == 0:
            assert step(old, event, now_s) == (self.state, effects), "the same step gave something else"
        for effect in effects:
            self.auditor.effect(effect, event, old, self.state, now_s)
            self._obey(effect)
        self.auditor.after(event, old, self.state, now_s)
        if isinstance(event, Tick):
            self.auditor.check_not_stuck(self.state, now_s)
            self.auditor.check_first_in_line(self.state, now_s)

    def _obey(self, effect: Effect) -> None:
        match effect:
            case GrantLease(waiter, key):
                released = LeaseReleased(waiter, key) if self.rng.random() < 0.9 else Left(waiter, key)
                self._later(self.rng.uniform(0.0, LONGEST_USE_S), lambda: released)
            case Abort(_, key, _):
                if self.rng.random() < 0.5:  # it resumes with a new request
                    self._later(0.0, lambda: self._ask(key))
            case Refuse() | Finish():
                pass
            case _:
                self.workers.run(effect)

    # ---- who asks

    def _schedule_clients(self) -> None:
        rng, keys = self.rng, list(self.estimates)
        length_s = rng.choice((10.0, 60.0, 150.0))
        for _ in range(rng.randint(10, 32)):
            key = keys[min(int(rng.expovariate(0.8)), len(keys) - 1)]
            self._later(rng.uniform(0, length_s), partial(self._ask, key))
        if rng.random() < 0.25:  # one model is never idle
            for second in range(0, 100, 5):
                self._later(second, partial(self._ask, keys[0]))
        if rng.random() < 0.2:  # one is used and put to sleep again and again
            for second in range(0, 160, 16):
                self._later(second, partial(self._ask, keys[-1]))
                self._later(second + 15, partial(self._operation, keys[-1], 3))
        for _ in range(rng.randint(0, 9)):
            key = rng.choice(keys)
            self._later(rng.uniform(0, length_s), partial(self._wish, key))
        for _ in range(rng.choice((0, 0, 5, 20))):
            self._later(rng.uniform(0, length_s), partial(KvWanted, rng.choice(keys), rng.choice((5, 60))))

        for _ in range(rng.choice((0, 0, 4))):  # when all is calm
            self._later(length_s + rng.uniform(0, 60), partial(self._relimit, rng.choice(keys)))

    def _new_id(self, key: VariantKey, deadline_s: float) -> int:
        self._last_id += 1
        self.auditor.expect(self._last_id, key, deadline_s)
        return self._last_id

    def _ask(self, key: VariantKey) -> Event:
        rng = self.rng
        wait_s = None if rng.random() < 0.8 else rng.choice((0.0, 3.0, 30.0))
        event = Asked(self._last_id + 1, key, self.estimates[key], wait_s)
        max_wait_s = self.state.policy.max_wait_s
        waiter = self._new_id(key, deadline_of(event, self.now_s, max_wait_s, self.tick_s))
        if rng.random() < 0.2:
            self._later(rng.uniform(0.0, 15.0), lambda: Left(waiter, key))
        return event

    def _wish(self, key: VariantKey) -> Event | None:
        """Something that an administrator or a worker wants."""
        rng = self.rng
        wish = rng.choice((0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 8, 8, 8, 9))
        if wish == 9:
            return self._remove(key)
        if wish == 8:
            return self._relimit(key)
        if wish < 5:
            return self._operation(key, wish)
        if wish == 5:
            entry = self.state.entries.get(key.model_id)
            if entry is None:
                return None  # it was removed
            return Patched(replace(entry, pinned=not entry.pinned, ttl_s=rng.choice((None, 5.0))))
        if wish == 6:
            device = rng.choice(list(self.state.ledger.budgets))
            return BudgetPatched(device, Budget(rng.randint(60, 220), rng.randint(0, 20)))
        return KvWanted(key, rng.choice((10, 200)))

    def _relimit(self, key: VariantKey) -> Event | None:
        """Change how much KV memory a model keeps and may have; its later loads begin with other sizes."""
        entry = self.state.entries.get(key.model_id)
        if entry is None:
            return None
        mine = [k for k in self.estimates if k.model_id == key.model_id]
        least = max(self.estimates[k].kv_least_bytes or 0 for k in mine)  # less is refused (changes.py)
        hard = self.rng.choice((None, max(least, 1), max(least, 1), max(least, 8), 40))
        soft = self.rng.choice([n for n in (None, 1, 6, 20) if n is None or hard is None or n <= hard])
        for k in mine:
            self.estimates[k] = relimited(self.unlimited[k], soft, hard)
            nature, now = self.workers.natures[k], self.estimates[k]
            nature.size = replace(
                nature.size, kv_bytes=now.kv_bytes, kv_least_bytes=now.kv_least_bytes,
                kv_most_bytes=now.kv_most_bytes,
            )  # fmt: skip
        changed = replace(entry, kv_soft_limit_bytes=soft, kv_hard_limit_bytes=hard)
        return Patched(changed, {k: self.estimates[k] for k in mine})

    def _remove(self, key: VariantKey) -> Event:
        """Forget a model; if it goes, it is registered again after a while, as it was."""
        entry = self.state.entries.get(key.model_id)
        operation = self._new_id(key, self.now_s)

        def back() -> Event | None:
            return Patched(entry) if entry is not None and entry.id not in self.state.entries else None

        self._later(self.rng.uniform(0.0, 20.0), back)
        return Removed(operation, key.model_id)

    def _operation(self, key: VariantKey, wish: int) -> Event:
        rng, max_wait_s = self.rng, self.state.policy.max_wait_s
        operation = self._new_id(key, self.now_s + max_wait_s + LONGEST_USE_S + 10.0 + self.tick_s)
        if rng.random() < 0.3:
            self._later(rng.uniform(0.0, 8.0), partial(self._cancel, key, operation))
        match wish:
            case 0:
                return AdminLoad(operation, key, self.estimates[key], may_evict=rng.random() < 0.4)
            case 1 | 2:
                mode = rng.choice(list(UnloadMode))
                return AdminUnload(operation, key, mode, rng.choice((None, 0.0, 5.0)))
            case 3:
                return AdminSleep(operation, key)
            case _:
                return AdminWake(operation, key)

    def _cancel(self, key: VariantKey, target: int) -> Event:
        return AdminCancel(self._new_id(key, self.now_s), key, target)

    def _unload_everything(self) -> None:
        for entry in self.state.entries.values():
            self._feed(Patched(replace(entry, pinned=False)))
        for key in self.estimates:
            operation = self._new_id(key, self.now_s + HORIZON_S)
            self._feed(AdminUnload(operation, key, UnloadMode.DRAIN))


def _tell(now_s: float, event: Event, effects: tuple[Effect, ...], state: RegistryState) -> None:
    lines = [f"{now_s:8.2f} {_short(event)}", *(f"           -> {_short(effect)}" for effect in effects)]
    alive = [f"{key} {r.state}" for key, r in state.records.items() if r.state is not State.UNLOADED]
    lines.append(f"           {', '.join(alive)}; used {state.ledger.used}, waiting {len(state.queue)}")
    tqdm.write("\n".join(lines), file=sys.stdout)


def _short(news: Event | Effect) -> str:
    shown = [f"{f.name}={getattr(news, f.name)!s:.90}" for f in fields(news) if f.name != "plan"]
    return f"{type(news).__name__}({', '.join(shown)})"


def _run_many(first_seed: int, runs: int) -> dict[str, Any]:
    """Run the seeds; tells failing ones at once and the counts at the end. Returns a record of it all."""
    failed: list[int] = []
    counts: Counter[str] = Counter()
    num_events, began_s = 0, time.perf_counter()
    for seed in tqdm(range(first_seed, first_seed + runs), mininterval=2, unit="run"):
        simulation = Simulation(seed)
        try:
            counts += simulation.run()
        except Exception as error:  # noqa: BLE001 - whatever goes wrong is the finding
            failed.append(seed)
            tqdm.write(f"seed {seed}: {type(error).__name__}: {error}; replay it with --replay {seed}")
        num_events += simulation.num_events
    for name, count in sorted(counts.items()):
        tqdm.write(f"{count:12,} {name}")
    tqdm.write(f"{runs:,} runs from seed {first_seed}, {num_events:,} events, {len(failed)} failed")
    return {
        "first_seed": first_seed,
        "runs": runs,
        "events": num_events,
        "seconds": round(time.perf_counter() - began_s, 1),
        "failed_seeds": failed,
        "counts": dict(sorted(counts.items())),
    }


def _write(record: dict[str, Any], output: Path, commit_of_sources: str) -> None:
    facts = {"commit": commit_of_sources, "python": platform.python_version(), "machine": platform.machine()}
    output.write_text(json.dumps({**facts, **record}, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    """The command line; returns 1 if a run failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000, help="number of runs")
    parser.add_argument("--seed", type=int, default=0, help="the first run's; the next one counts on")
    parser.add_argument("--replay", type=int, metavar="SEED", help="run one seed and tell every event")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write a record of the runs, as JSON")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        Simulation(arguments.replay, log=True).run()
        return 0
    sources = commit()  # of those that are imported now, whatever is committed while it runs
    record = _run_many(arguments.seed, arguments.runs)
    if arguments.output is not None:
        _write(record, arguments.output, sources)
    return 1 if record["failed_seeds"] else 0


if __name__ == "__main__":
    sys.exit(main())

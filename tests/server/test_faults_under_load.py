"""Cancellations, evictions, sleeps and crashes at random under many streams on real workers.

A seed decides who asks what, who leaves, and which fault comes next; threads and processes decide when.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import httpx
import pytest

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt_server import supervision
from memory_efficient_gpt_server.hosting import build_catalog
from memory_efficient_gpt_server.models import ModelCatalog
from memory_efficient_gpt_server.registry.owner import Registry
from memory_efficient_gpt_server.registry.sizing import sized
from memory_efficient_gpt_server.registry.states import State
from memory_efficient_gpt_server.settings import Settings
from memory_efficient_gpt_server.worker_process import start_fork_server
from memory_efficient_gpt_server.workers import WorkerModel
from tests.server.conftest import LiveServer, Serve

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

ADMIN: Final = "admin-" + "c" * 32
MODELS: Final = {"first": {}, "second": {"quantization": "int8"}, "third": {"quantization": "int4"}}
BLOCKS: Final = 2_000
CLIENTS: Final = 12
PROMPTS: Final = ("Once upon a time", "The old house stood at the end of the lane", "My dear friend, I have")
KINDS: Final[tuple[dict[str, Any], ...]] = (
    {"temperature": 0, "max_tokens": 100},
    {"temperature": 0.9, "seed": 7, "max_tokens": 120, "ignore_eos": True},
    {"temperature": 1.0, "top_p": 0.9, "seed": 11, "n": 2, "max_tokens": 60, "ignore_eos": True},
    {"temperature": 0, "repetition_penalty": 1.2, "max_tokens": 40},
)
Told = dict[int, tuple[str, str | None]]
"""A request's texts and why each ended, by choice."""


def catalog(settings: Settings) -> ModelCatalog:
    return build_catalog(settings, worker_log_level="ERROR", worker_log_json=False)


@dataclass(slots=True)
class Storm:
    """What happened. problems: what must not have."""

    rng: random.Random
    client: httpx.AsyncClient
    registry: Registry
    expected: dict[tuple[str, str, int], Told] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    over: bool = False

    # ---- clients

    async def be_a_client(self, seed: int) -> None:
        """Ask one thing after another until the storm is over."""
        rng = random.Random(seed)
        while not self.over:
            model, prompt, kind = rng.choice([*MODELS]), rng.choice(PROMPTS), rng.randrange(len(KINDS))
            leave_after = rng.randrange(60) if rng.random() < 0.3 else None
            try:
                await self._ask(model, prompt, kind, leave_after)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the finding
                self.problems.append(f"{model} {prompt!r} {kind}: {type(error).__name__}: {error}")

    async def _ask(self, model: str, prompt: str, kind: int, leave_after: int | None) -> None:
        """One request, sent again while it is refused. leave_after: events after which the client goes."""
        while (told := await self.stream(model, prompt, kind, leave_after)) is None:
            self.counts["refused and sent again"] += 1
            await asyncio.sleep(0.05)
        if leave_after is not None:
            self.counts["left"] += 1
            return
        self.counts["whole"] += 1
        if told != self.expected[model, prompt, kind]:
            self.problems.append(f"{model} {prompt!r} {kind} differs: {told}")

    async def stream(self, model: str, prompt: str, kind: int, leave_after: int | None = None) -> Told | None:
        """What a stream gave, or None if it was refused for now. Raises AssertionError if it ended badly."""
        body = {"model": model, "prompt": prompt, "stream": True, **KINDS[kind]}
        told: dict[int, tuple[str, str | None]] = dict.fromkeys(range(body.get("n", 1)), ("", None))
        events, last = 0, ""
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code == 503:
                return None
            assert answer.status_code == 200, (await answer.aread()).decode()
            async for line in answer.aiter_lines():
                if not line.startswith("data: "):
                    continue
                last = line.removeprefix("data: ")
                if last == "[DONE]":
                    break
                chunk = json.loads(last)
                assert "error" not in chunk, f"after {events} events: {chunk['error']}"
                for choice in chunk["choices"]:
                    text, reason = told[choice["index"]]
                    told[choice["index"]] = text + choice["text"], choice["finish_reason"] or reason
                events += 1
                if leave_after is not None and events > leave_after:
                    return told
        assert last == "[DONE]", f"cut after {events} events"
        return told

    # ---- faults

    async def rage(self, seconds: float) -> None:
        """One fault after another."""
        ends = time.monotonic() + seconds
        faults = (self._kill, self._kill, self._freeze, self._unload, self._unload, self._sleep, self._wake)
        while time.monotonic() < ends:
            await asyncio.sleep(self.rng.uniform(0.05, 0.4))
            fault, model = self.rng.choice(faults), self.rng.choice([*MODELS])
            if await fault(model):
                self.counts[fault.__name__.removeprefix("_")] += 1
        self.over = True

    def worker(self, model: str) -> WorkerModel | None:
        """The model's present worker."""
        engine = self.registry._processes.engine(self.registry.models[model].key)
        assert engine is None or isinstance(engine, WorkerModel)
        return engine

    async def _kill(self, model: str) -> bool:
        return self._signal(model, signal.SIGKILL, busy=False)

    async def _freeze(self, model: str) -> bool:
        """Only with work aboard: an idle one that hangs is noticed when it gets some."""
        return self._signal(model, signal.SIGSTOP, busy=True)

    def _signal(self, model: str, number: int, *, busy: bool) -> bool:
        """Nobody may see two crashes: such a request is ended with an error, as it may be the cause."""
        worker = self.worker(model)
        if worker is None or worker.pid is None or any(r.crashed for r in worker._open):
            return False
        if busy and not (worker.ready and worker.num_open_requests):
            return False
        os.kill(worker.pid, number)
        return True

    async def _unload(self, model: str) -> bool:
        mode = self.rng.choice(("drain", "if_idle"))
        answer = await self.client.post(f"/admin/models/{model}/unload", json={"mode": mode})
        assert answer.status_code in (200, 202, 409), answer.text
        return answer.status_code == 202

    async def _sleep(self, model: str) -> bool:
        return await self._operate(model, "sleep")

    async def _wake(self, model: str) -> bool:
        return await self._operate(model, "wake")

    async def _operate(self, model: str, what: str) -> bool:
        answer = await self.client.post(f"/admin/models/{model}/{what}")
        assert answer.status_code in (200, 202, 409), answer.text
        return answer.status_code == 202


@pytest.fixture
def live(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveServer]:
    """A budget for about two of three models, workers that are restarted at once and never given up."""
    monkeypatch.setattr(supervision, "FIRST_DELAY_S", 0.05)
    monkeypatch.setattr(supervision, "LONGEST_DELAY_S", 0.2)
    monkeypatch.setattr(supervision, "MAX_DEATHS", 10**6)
    start_fork_server()
    _, size = sized(EngineConfig(model="demo", num_kv_blocks=BLOCKS), 1 << 40)
    one = sum(amount.bytes for amount in size.awake())
    models = [
        {"id": name, "model": "demo", "load": "on_demand", "num_threads": 1, "num_kv_blocks": BLOCKS,
         "debug_checks": True, **options}
        for name, options in MODELS.items()
    ]  # fmt: skip
    with serve(
        catalog=catalog, models=models, memory_budget_bytes=one * 5 // 2, admin_key=ADMIN, max_swaps=10**6,
        stall_s=1.0, stall_kill_factor=1.0, resume_wait_s=60.0, keepalive_s=60.0,
    ) as running:  # fmt: skip
        yield running


@pytest.mark.parametrize(
    ("seed", "seconds"),
    [(1, 12.0), pytest.param(2, 45.0, marks=pytest.mark.slow), pytest.param(3, 45.0, marks=pytest.mark.slow)],
)
def test_every_stream_is_whole_and_right_or_left_by_its_client_and_nothing_is_lost(
    live: LiveServer, caplog: pytest.LogCaptureFixture, seed: int, seconds: float
) -> None:
    registry = live.server.catalog.registry
    assert registry is not None
    caplog.set_level(logging.ERROR)
    storm = asyncio.run(_storm(live, registry, seed, seconds))
    assert not storm.problems, "\n".join([f"{len(storm.problems)} problems", *storm.problems[:5]])
    counts = storm.counts
    assert counts["whole"] > 20 and counts["left"] > 5 and counts["kill"] and counts["unload"], counts
    _check_deaths([record.getMessage() for record in caplog.records], counts)
    live.call(lambda: _check_clean(live, registry))


def _check_deaths(logged: list[str], counts: Counter[str]) -> None:
    """Workers died of nothing but the test's own signals: no engine found its books wrong."""
    died = [line for line in logged if "The worker of" in line and "restarting" in line]
    assert all("SIGKILL" in line for line in died), died
    assert len(died) <= counts["kill"] + counts["freeze"], (died, counts)
    assert not [line for line in logged if "failed on" in line or "could not do" in line], logged


def _check_clean(live: LiveServer, registry: Registry) -> None:
    """All was unloaded: nobody holds a byte or a place."""
    state = registry.state
    state.check_integrity()
    assert not state.ledger.entries and set(state.ledger.used.values()) == {0}
    assert not state.queue.groups and not any(record.leases for record in state.records.values())
    assert {record.state for record in state.records.values()} == {State.UNLOADED}
    assert not registry._processes._running and not registry._leases
    assert live.server.admission.sequences == 0 and live.server.admission.tokens == 0


async def _storm(live: LiveServer, registry: Registry, seed: int, seconds: float) -> Storm:
    headers = {"authorization": f"Bearer {ADMIN}"}
    limits = httpx.Limits(max_connections=100)
    async with httpx.AsyncClient(base_url=live.url, timeout=60, headers=headers, limits=limits) as client:
        storm = Storm(random.Random(seed), client, registry)
        for model in MODELS:
            asked = [(model, prompt, kind) for prompt in PROMPTS for kind in range(len(KINDS))]
            answers = await asyncio.gather(*(storm.stream(*what) for what in asked))
            storm.expected |= {what: told for what, told in zip(asked, answers, strict=True) if told}
        assert len(storm.expected) == len(MODELS) * len(PROMPTS) * len(KINDS)
        clients = [storm.be_a_client(seed * 1000 + number) for number in range(CLIENTS)]
        await asyncio.gather(storm.rage(seconds), *clients)
        await _check_engines(storm)
        for model in MODELS:
            answer = await client.post(f"/admin/models/{model}/unload", json={"wait": True})
            assert answer.status_code == 200, answer.text
    return storm


async def _check_engines(storm: Storm) -> None:
    """Every engine's blocks are free again, once news of it has come."""
    for model in MODELS:
        deadline = time.monotonic() + 20
        while (worker := storm.worker(model)) is not None:
            stats = worker.stats
            free = stats.num_free_blocks == stats.num_kv_blocks > 0 and stats.num_running == 0
            if not worker.num_open_requests and (free or not worker.ready):
                break
            assert time.monotonic() < deadline, (
                f"{model}: {worker.num_open_requests} requests aboard, {stats}"
            )
            await asyncio.sleep(0.05)

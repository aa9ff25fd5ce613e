"""Requests whose worker dies: their streams go on in the next one, once."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import signal
import sys
import time
from pathlib import Path

import httpx
import pytest

from benchmarks.crashes import AtOnce, play_round
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.engine_info import EngineStats
from memory_efficient_gpt.errors import EngineFailedError, ModelLoadError, OverloadedError
from memory_efficient_gpt.request import FinishReason
from memory_efficient_gpt_server import worker_lives as lives_module
from memory_efficient_gpt_server.supervision import WorkerLimits
from memory_efficient_gpt_server.worker_process import start_fork_server
from memory_efficient_gpt_server.workers import ModelState, WorkerModel
from tests.engine.scripted_engine import COUNT, FAIL, HANG, KILLED, request
from tests.server import command_line
from tests.server.worker_models import answer, kill, rest, serving, tokens, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> None:
    start_fork_server()


@pytest.mark.parametrize("cause", ["outside", "step"])
def test_a_dead_worker_is_replaced_and_its_requests_go_on(cause: str) -> None:
    async def run() -> None:
        async with serving() as model:
            aboard = model.submit(request(COUNT, request_id="aboard", delay_ms=1, max_tokens=400, n=2))
            first_pid = model.pid
            seen = [await anext(aboard)]
            if cause == "outside":
                kill(model)
            else:
                model.submit(request(FAIL, request_id="culprit"))
            await until(lambda: model.state is not ModelState.READY)
            assert model.stats == EngineStats()  # nothing runs any more
            assert model.ended_stats.generated_tokens > 0 and model.ended_stats.num_running == 0
            assert model.num_open_requests == (1 if cause == "outside" else 2)
            assert not model.stalled
            if cause == "step":
                model.abort("culprit")
            seen += [event async for event in aboard]
            assert model.pid != first_pid and model.num_restarts == model.num_resumed == 1
            for index in range(2):
                assert tokens([e for e in seen if e.index == index]) == list(range(400))
            assert all(event.error is None for event in seen)
            await until(lambda: model.stats.num_running == 0)
            total = model.ended_stats.generated_tokens + model.stats.generated_tokens
            assert total == 800  # nothing twice

    asyncio.run(run())


@pytest.mark.parametrize(("action", "how"), [(KILLED, "SIGKILL"), (FAIL, "exited with code 70")])
def test_a_request_that_kills_its_worker_kills_two_and_fails(action: int, how: str) -> None:
    async def run() -> None:
        async with serving() as model:
            poison = [event async for event in model.submit(request(action, n=2))]
            assert [event.index for event in poison] == [0, 1]
            for event in poison:
                assert isinstance(event.error, EngineFailedError)
                assert re.search(f"{how}.*so did the one before", str(event.error))
            await until(lambda: model.state is not ModelState.READY)
            await model.wait_ready(30)
            assert tokens(await answer(model, request(COUNT))) == [0, 1, 2, 3, 4]
            assert model.num_restarts == 2 and model.num_resumed == 1

    asyncio.run(run())


def test_a_request_that_only_saw_the_second_crash_goes_on() -> None:
    async def run() -> None:
        async with serving() as model:
            old = model.submit(request(COUNT, request_id="old", delay_ms=1, max_tokens=10**6))
            await anext(old)
            kill(model)
            await until(lambda: model.num_resumed == 1)
            new = model.submit(request(COUNT, request_id="new", delay_ms=1, max_tokens=300))
            seen = [await anext(new)]
            kill(model)
            assert tokens(seen + [event async for event in new]) == list(range(300))
            *_, last = [event async for event in old]
            assert isinstance(last.error, EngineFailedError)

    asyncio.run(run())


def test_what_waits_for_the_next_worker_can_be_aborted() -> None:
    async def run() -> None:
        async with serving() as model:
            streams = {
                name: model.submit(request(COUNT, request_id=name, delay_ms=1, max_tokens=300, n=2))
                for name in ("all", "one", "reader", "none")
            }
            for stream in streams.values():
                await anext(stream)
            kill(model)
            await until(lambda: model.state is not ModelState.READY)
            model.abort("all")
            model.abort("one", 0)
            await streams["reader"].aclose()
            assert model.num_open_requests == 2
            assert [event async for event in streams["all"]] == []
            assert {event.index for event in await rest(streams["one"])} == {1}
            assert {event.index for event in await rest(streams["none"])} == {0, 1}
            assert model.num_resumed == 2
            await until(lambda: model.stats.num_free_blocks == 100)

    asyncio.run(run())


def test_an_ended_sequence_is_not_begun_again() -> None:
    async def run() -> None:
        async with serving() as model:
            stream = model.submit(request(COUNT, delay_ms=2, max_tokens=100, n=3))
            await anext(stream)
            model.abort("r", 1)
            kill(model)
            events = await rest(stream)
            assert {event.index for event in events} == {0, 2}
            assert {event.finish_reason for event in events} >= {FinishReason.LENGTH}

    asyncio.run(run())


def test_the_wait_for_the_next_worker_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lives_module, "WATCH_INTERVAL_S", 0.05)
    # a worker that loads has no work yet
    hasty = WorkerLimits(resume_wait_s=1.5, stall_s=0.4, kill_factor=1)

    async def run() -> None:
        async with serving(f"endless-again {tmp_path}", limits=hasty) as model:
            stream = model.submit(request(COUNT, delay_ms=1, max_tokens=10**6))
            await anext(stream)
            kill(model)
            killed = time.monotonic()
            *_, last = await rest(stream)
            assert 1 < time.monotonic() - killed < 3
            assert isinstance(last.error, EngineFailedError)
            assert "not ready within 1.5 s" in str(last.error)
            assert model.num_restarts == 1 and not model.stalled
            assert model.state is ModelState.LOADING and model.num_open_requests == 0

    asyncio.run(run())


def test_a_model_that_fails_for_good_ends_what_waits_with_its_error(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(f"damaged-again {tmp_path}") as model:
            stream = model.submit(request(COUNT, delay_ms=1, max_tokens=10**6))
            await anext(stream)
            kill(model)
            *_, last = await rest(stream)
            assert isinstance(last.error, ModelLoadError) and "no other could be started" in str(last.error)
            assert "safetensors" in str(model.reason) and "safetensors" not in str(last.error)
            assert model.state is ModelState.FAILED

    asyncio.run(run())


def test_a_crash_while_draining_loses_nothing_either() -> None:
    async def run() -> None:
        async with serving() as model:
            stream = model.submit(request(COUNT, delay_ms=2, max_tokens=200))
            await anext(stream)
            closing = asyncio.create_task(model.close(drain_s=20))
            await asyncio.sleep(0.02)
            kill(model)
            seen = await rest(stream)
            assert tokens(seen)[-1] == 199 and seen[-1].error is None
            await asyncio.wait_for(closing, 5)
            assert model.state is ModelState.CLOSED and model.pid is None

    asyncio.run(run())


def test_draining_while_the_next_worker_loads_loses_nothing_either(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(f"slow-second {tmp_path}") as model:
            stream = model.submit(request(COUNT, delay_ms=1, max_tokens=100))
            seen = [await anext(stream)]
            kill(model)
            await until(lambda: model.state is ModelState.LOADING and model.progress.fraction == 0.5)
            closing = asyncio.create_task(model.close(drain_s=20))
            assert tokens(seen + await rest(stream)) == list(range(100))
            await asyncio.wait_for(closing, 5)

    asyncio.run(run())


def test_the_death_of_a_worker_that_loads_is_none_of_its_requests(tmp_path: Path) -> None:
    """They were not aboard yet."""

    async def run() -> None:
        async with serving(f"dies-second {tmp_path}") as model:
            stream = model.submit(request(COUNT, delay_ms=1, max_tokens=100))
            seen = [await anext(stream)]
            kill(model)
            assert tokens(seen + await rest(stream)) == list(range(100))
            assert model.num_restarts == 2 and model.num_resumed == 1

    asyncio.run(run())


def test_close_ends_what_waits_for_the_next_worker(tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(f"endless-again {tmp_path}") as model:
            stream = model.submit(request(COUNT, delay_ms=1, max_tokens=10**6))
            await anext(stream)
            kill(model)
            await until(lambda: model.state is not ModelState.READY)
            started = time.monotonic()
            await model.close(drain_s=0.2)
            assert time.monotonic() - started < 2
            assert isinstance((await rest(stream))[-1].error, OverloadedError)

    asyncio.run(run())


def test_a_hung_worker_is_not_ready_and_is_killed_like_a_crashed_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lives_module, "WATCH_INTERVAL_S", 0.05)
    hasty = WorkerLimits(stall_s=0.5, kill_factor=2)

    async def run() -> None:
        async with serving(limits=hasty) as model:
            await asyncio.sleep(0.7)
            assert not model.stalled  # idle is not stuck
            bystander = model.submit(request(COUNT, request_id="bystander", delay_ms=1, max_tokens=500))
            await anext(bystander)
            assert model.pid is not None
            os.kill(model.pid, signal.SIGSTOP)
            await until(lambda: model.stalled)
            assert not model.ready and model.state is ModelState.READY
            seen = await rest(bystander)
            assert tokens(seen)[-1] == 499 and model.num_resumed == 1
            hung = model.submit(request(HANG))
            (event,) = await rest(hung)
            assert isinstance(event.error, EngineFailedError)
            await until(lambda: model.ready)
            assert model.num_restarts == 3

    asyncio.run(run())


def test_eight_streams_of_a_real_model_survive_kills_at_random_moments_unchanged() -> None:
    async def run() -> None:
        model = WorkerModel(EngineConfig(model="demo", num_threads=1), restart_rule=AtOnce)
        model.start()
        chance = random.Random(time.time_ns())
        try:
            await model.wait_ready(60)
            for number in range(4):
                state = chance.getstate()
                played = await play_round(model, number, chance)
                assert not played.problems, (played, state)
        finally:
            await model.close()

    asyncio.run(run())


def test_a_client_sees_one_uninterrupted_stream() -> None:
    """Over HTTP, with everything that is kept outside of the worker: text, stop string, offsets, usage."""
    body = {
        "model": "demo", "prompt": "Once upon a time", "max_tokens": 300, "n": 2, "seed": 5,
        "ignore_eos": True,
        "logprobs": 2, "stop": ["\x00never"], "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip

    def stream(url: str, *, killing: int | None) -> tuple[dict[int, str], list[list[int]], object]:
        texts, usage = {0: "", 1: ""}, None
        offsets: list[list[int]] = [[], []]
        with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=60) as response:
            assert response.status_code == 200, response.read()
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    assert not line.startswith("event: error"), line
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    texts[choice["index"]] += choice["text"]
                    offsets[choice["index"]] += (choice["logprobs"] or {}).get("text_offset", [])
                if killing is not None and len(texts[0]) > 200:
                    os.kill(killing, signal.SIGKILL)
                    killing = None
        assert killing is None
        return texts, offsets, usage

    with command_line.serving("--model", "demo") as server:
        url = server.url()
        (worker,) = [pid for pid in server.workers() if parent_of(pid) != server.process.pid]
        undisturbed = stream(url, killing=None)
        assert stream(url, killing=worker) == undisturbed
        assert all(len(offsets) == 300 for offsets in undisturbed[1])
        assert not Path(f"/proc/{worker}").exists()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])

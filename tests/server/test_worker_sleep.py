"""Real worker processes that sleep and wake, most with a scripted engine."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.engine_info import SleepReport
from memory_efficient_gpt.errors import EngineFailedError, OverloadedError
from memory_efficient_gpt.request import Request, SamplingParams
from memory_efficient_gpt_server.worker_process import start_fork_server
from memory_efficient_gpt_server.worker_sleep import SleepSwitch
from memory_efficient_gpt_server.workers import ModelState, WorkerModel
from tests.engine.scripted_engine import COUNT, request
from tests.server.worker_models import answer, kill, serving, tokens, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> None:
    start_fork_server()


def test_a_model_sleeps_refuses_requests_and_wakes() -> None:
    async def run() -> None:
        async with serving() as model:
            pid = model.pid
            assert await model.sleep() == SleepReport(kv_bytes=1, parked_bytes=1, device_bytes=3)
            assert model.state is ModelState.ASLEEP and not model.ready
            with pytest.raises(OverloadedError, match="sleeps"):
                model.submit(request(COUNT))
            await model.wake()
            assert tokens(await answer(model, request(COUNT))) == [0, 1, 2, 3, 4]
            assert model.pid == pid and model.num_restarts == 0

    asyncio.run(run())


def test_only_an_idle_ready_model_sleeps() -> None:
    async def run() -> None:
        async with serving() as model:
            stream = model.submit(request(COUNT, delay_ms=1, max_tokens=10**6))
            with pytest.raises(EngineFailedError, match="1 requests aboard"):
                await model.sleep()
            await stream.aclose()
            with pytest.raises(EngineFailedError, match="does not sleep"):
                await model.wake()
            await model.sleep()
            with pytest.raises(EngineFailedError, match="is asleep"):
                await model.sleep()

    asyncio.run(run())


def test_work_that_was_just_aborted_is_no_hindrance() -> None:
    async def run() -> None:
        async with serving() as model:
            stream = model.submit(request(COUNT, delay_ms=1, max_tokens=10**6))
            await anext(stream)
            model.abort("r")
            await model.sleep()
            await model.wake()
            assert tokens(await answer(model, request(COUNT))) == [0, 1, 2, 3, 4]

    asyncio.run(run())


def test_a_worker_that_dies_in_its_sleep_is_not_replaced() -> None:
    """Its memory was promised to others."""

    async def run() -> None:
        async with serving() as model:
            await model.sleep()
            kill(model)
            await until(lambda: model.state is ModelState.FAILED)
            assert "SIGKILL in its sleep" in str(model.reason) and model.num_restarts == 0
            assert model.pid is None

    asyncio.run(run())


@pytest.mark.parametrize("wish", ["sleep", "wake"])
@pytest.mark.parametrize(
    ("how", "told"),
    [("fails", "exited with code 70"), ("dies", "SIGKILL"), ("hangs", "killed.*longer than 0.5 s")],
)
def test_a_worker_that_can_not_do_it_is_gone(how: str, told: str, wish: str) -> None:
    async def run() -> None:
        async with serving(f"{how} {wish}") as model:
            model._sleep_switch = SleepSwitch(least_s=0.5)
            if wish == "wake":
                await model.sleep()
            with pytest.raises(EngineFailedError, match=told):
                await (model.sleep() if wish == "sleep" else model.wake())
            await until(lambda: model.state is ModelState.FAILED)
            assert model.num_restarts == 0 and "secret" not in str(model.reason)

    asyncio.run(run())


def alive(pid: int | None) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_close_ends_a_sleeping_worker_and_one_on_its_way() -> None:
    async def run() -> None:
        async with serving() as model:
            await model.sleep()
            pid = model.pid
            await model.close()
            assert model.state is ModelState.CLOSED and not alive(pid)
        async with serving("hangs sleep") as model:
            falling = asyncio.create_task(model.sleep())
            await until(lambda: model.state is ModelState.ASLEEP)
            pid = model.pid
            assert pid is not None
            os.kill(pid, signal.SIGSTOP)
            await asyncio.wait_for(model.close(), 10)
            assert not alive(pid)
            with pytest.raises(EngineFailedError):
                await falling

    asyncio.run(run())


def resident(pid: int, kind: str) -> int:
    (line,) = [x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith(f"{kind}:")]
    return int(line.split()[1]) * 1024


def test_a_real_worker_gives_memory_back_and_wakes_within_a_third_of_a_second() -> None:
    async def run() -> None:
        model = WorkerModel(EngineConfig(model="demo", num_threads=1, num_kv_blocks=6000))
        model.start()
        try:
            await model.wait_ready(60)
            ids = tuple(range(5, 1000))
            params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
            for number in range(8):
                asked = Request(id=str(number), prompt_token_ids=(number + 3, *ids), params=params)
                before = tokens(await answer(model, asked))
            pid = model.pid
            assert pid is not None
            anonymous, mapped = resident(pid, "RssAnon"), resident(pid, "RssFile")
            report = await model.sleep()
            assert report.kv_bytes > 0 and report.dropped_bytes > 0.9 * 9_968_128
            assert anonymous - resident(pid, "RssAnon") > 20e6, "the KV cache is still there"
            assert mapped - resident(pid, "RssFile") > 0.9 * report.dropped_bytes
            seconds = []
            for number in range(3):  # other programs share the machine
                began = time.monotonic()
                await model.wake()
                short = model.submit(Request(id=f"s{number}", prompt_token_ids=(5, 6, 7), params=params))
                await anext(short)
                seconds.append(time.monotonic() - began)
                _ = [event async for event in short]
                await model.sleep()
            assert min(seconds) < 0.3, seconds
            await model.wake()
            again = await answer(model, asked)
            assert again[0].num_cached_tokens == 0, "the prefix cache is gone"
            assert tokens(again) == before
        finally:
            await model.close()

    asyncio.run(run())

"""KV limits of workers that come and go, with a scripted engine (which holds 1000 bytes at least)."""

from __future__ import annotations

import asyncio
import sys

import pytest

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import ModelLoadError
from memory_efficient_gpt_server.kv_limit import KvLimitCalls
from memory_efficient_gpt_server.worker_process import start_fork_server
from memory_efficient_gpt_server.workers import ModelState, WorkerModel
from tests.engine.scripted_engine import COUNT, load_scripted, request
from tests.server.worker_models import answer, kill, serving, tokens, until

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="starts workers")


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> None:
    start_fork_server()


@on_linux
def test_a_worker_says_what_it_holds_under_each_limit() -> None:
    async def run() -> None:
        async with serving() as model:
            held = await asyncio.gather(model.set_kv_limit(7000), model.set_kv_limit(3))
            assert list(held) == [7000, 1000]
            await until(lambda: model.stats.num_kv_blocks == 3)
            assert tokens(await answer(model, request(COUNT, max_tokens=3))) == [0, 1, 2]

    asyncio.run(run())


@on_linux
def test_a_worker_that_is_started_again_has_the_present_limit_before_it_gets_requests() -> None:
    async def run() -> None:
        async with serving() as model:
            await model.set_kv_limit(7000)
            kill(model)
            await until(lambda: model.num_restarts == 1 and model.state is ModelState.READY)
            await until(lambda: model.stats.num_kv_blocks == 7000)
            assert await model.set_kv_limit(8000) == 8000

    asyncio.run(run())


@on_linux
def test_a_limit_set_while_there_is_no_worker_is_the_next_ones() -> None:
    async def run() -> None:
        async with serving() as model:
            kill(model)
            await until(lambda: model.state is ModelState.LOADING)
            assert await model.set_kv_limit(7000) == 7000
            assert model.num_restarts == 1

    asyncio.run(run())


@on_linux
def test_a_limit_set_in_its_sleep_is_kept_by_the_worker_and_the_next() -> None:
    async def run() -> None:
        async with serving() as model:
            await model.set_kv_limit(7000)
            await model.sleep()
            assert await model.set_kv_limit(5000) == 5000 and model.state is ModelState.ASLEEP
            await model.wake()
            assert tokens(await answer(model, request(COUNT, max_tokens=3))) == [0, 1, 2]
            await until(lambda: model.stats.num_kv_blocks == 5000)
            kill(model)
            await until(lambda: model.num_restarts == 1 and model.state is ModelState.READY)
            await until(lambda: model.stats.num_kv_blocks == 5000)

    asyncio.run(run())


@on_linux
def test_a_limit_for_a_worker_that_died_in_its_sleep_is_an_error() -> None:
    async def run() -> None:
        async with serving() as model:
            await model.sleep()
            kill(model)
            with pytest.raises(ModelLoadError, match="in its sleep"):
                await model.set_kv_limit(5000)

    asyncio.run(run())


@on_linux
def test_who_waits_when_it_is_closed_gets_an_error() -> None:
    async def run() -> None:
        model = WorkerModel(EngineConfig(model="endless"), load=load_scripted)
        model.start()
        waiting = asyncio.create_task(model.set_kv_limit(7000))
        await until(lambda: model.pid is not None)
        await model.close()
        with pytest.raises(ModelLoadError, match="endless is closed"):
            await waiting
        with pytest.raises(ModelLoadError, match="is closed"):
            await model.set_kv_limit(1)

    asyncio.run(run())


def test_answers_belong_to_their_limits_also_after_a_death() -> None:
    async def run() -> None:
        sent: list[int] = []
        calls = KvLimitCalls(sent.append)
        calls.worker_ready()
        first, second = calls.set(10), calls.set(20)
        calls.answered(10)
        assert first.result() == 10 and not second.done()
        calls.worker_died()
        third = calls.set(30)
        assert sent == [10, 20]
        calls.worker_ready()
        fourth = calls.set(40)
        assert sent == [10, 20, 30, 40]
        calls.answered(30)
        assert second.result() == third.result() == 30 and not fourth.done()
        calls.answered(40)
        assert fourth.result() == 40
        calls.answered(50)  # of nobody's

    asyncio.run(run())


def test_the_next_worker_gets_no_more_than_the_last_one_kept() -> None:
    async def run() -> None:
        sent: list[int] = []
        calls = KvLimitCalls(sent.append)
        calls.worker_ready()
        for limit, held in ((20, 18), (15, 16), (30, 30)):
            calls.set(limit)
            calls.answered(held)
            calls.worker_died()
            calls.worker_ready()
            calls.answered(min(limit, held))
        assert sent == [20, 18, 15, 15, 30, 30]
        calls.set(12)
        calls.set(25)
        calls.answered(11)  # of the first, which is the limit no more
        calls.worker_died()
        calls.worker_ready()
        assert sent[-1] == 25

    asyncio.run(run())


def test_an_answer_to_what_only_a_new_worker_was_told_is_nobodys() -> None:
    async def run() -> None:
        calls = KvLimitCalls(lambda _: None)
        calls.worker_ready()
        early = calls.set(10)
        calls.answered(10)
        calls.worker_died()
        calls.worker_ready()
        late = calls.set(5)
        calls.answered(10)
        assert early.result() == 10 and not late.done()
        calls.answered(5)
        assert late.result() == 5

    asyncio.run(run())

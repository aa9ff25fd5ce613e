"""Models in real worker processes, most with a scripted engine: life, death and everything between."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import (
    ConfigError,
    InvalidRequestError,
    ModelLoadError,
    OverloadedError,
)
from memory_efficient_gpt.request import FinishReason, Request, SamplingParams
from memory_efficient_gpt_server.thread_shares import divide_threads
from memory_efficient_gpt_server.worker_process import start_fork_server
from memory_efficient_gpt_server.workers import ModelState, WorkerModel
from tests.engine.scripted_engine import COUNT, REFUSE, request
from tests.server.worker_models import answer, serving, tokens, until

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> None:
    start_fork_server()


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def fork_server_of(model: WorkerModel) -> int:
    return int(Path(f"/proc/{model.pid}/stat").read_text().split()[3])


def about(pid: int) -> tuple[str, str]:
    """A process's status and memory map."""
    return Path(f"/proc/{pid}/status").read_text(), Path(f"/proc/{pid}/maps").read_text()


def descriptors(model: WorkerModel) -> list[str]:
    """What the worker has open besides the standard three."""
    folder = Path(f"/proc/{model.pid}/fd")
    return [os.readlink(entry) for entry in folder.iterdir() if int(entry.name) > 2]


# ---- serving


def test_requests_are_answered_side_by_side() -> None:
    async def run() -> None:
        async with serving() as model:
            assert model.info is not None and model.info.notes == ("fake",)
            answers = await asyncio.gather(
                *(answer(model, request(COUNT, request_id=str(i), max_tokens=50)) for i in range(20))
            )
            assert all(tokens(events) == list(range(50)) for events in answers)
            assert all(events[-1].finish_reason is FinishReason.LENGTH for events in answers)
            await until(lambda: model.stats.generated_tokens == 1000)
            assert model.num_open_requests == 0

    asyncio.run(run())


def test_a_refused_request_ends_with_its_error() -> None:
    async def run() -> None:
        async with serving() as model:
            (event,) = await answer(model, request(REFUSE))
            assert isinstance(event.error, InvalidRequestError)
            assert event.error.param == "temperature"

    asyncio.run(run())


def test_what_can_not_be_sent_is_refused_here() -> None:
    async def run() -> None:
        async with serving() as model:
            with pytest.raises(InvalidRequestError, match="can't be handed"):
                model.submit(Request(id="r", prompt_token_ids=(COUNT,), client="\ud800"))
            model.submit(request(COUNT, max_tokens=10**6))
            with pytest.raises(InvalidRequestError, match="in use"):
                model.submit(request(COUNT))

    asyncio.run(run())


@pytest.mark.parametrize("how", ["abort", "aclose"])
def test_abort_frees_blocks_within_100_ms(how: str) -> None:
    async def run() -> float:
        async with serving() as model:
            stream = model.submit(request(COUNT, delay_ms=1, max_tokens=10**6))
            await until(lambda: model.stats.num_free_blocks == 90)
            if how == "abort":
                model.abort("r")
            else:
                await stream.aclose()
            took_s = await until(lambda: model.stats.num_free_blocks == 100)
            assert [event async for event in stream] == []
            return took_s

    assert asyncio.run(run()) < 0.1


def test_one_slow_reader_holds_up_nobody() -> None:
    async def run() -> None:
        async with serving() as model:
            slow = model.submit(request(COUNT, request_id="slow", max_tokens=2000))
            assert tokens(await answer(model, request(COUNT, max_tokens=2000))) == list(range(2000))
            await until(lambda: slow.ended)
            assert tokens([event async for event in slow]) == list(range(2000))

    asyncio.run(run())


# ---- loading


def test_start_returns_at_once_and_requests_wait_for_no_load() -> None:
    async def run() -> None:
        async with serving("endless", ready=False) as model:
            assert model.state is ModelState.LOADING
            with pytest.raises(OverloadedError, match="loading"):
                model.submit(request(COUNT))
            await until(lambda: model.progress.phase == "reading the script")
            assert model.progress.fraction == 0.5
            with pytest.raises(TimeoutError):
                await model.wait_ready(0.01)

    asyncio.run(run())


@pytest.mark.parametrize(("name", "told"), [("damaged", "must have 20"), ("buggy", "unexpected ValueError")])
def test_a_model_that_can_not_be_loaded_says_why_and_is_not_retried(name: str, told: str) -> None:
    async def run() -> None:
        async with serving(name, ready=False) as model:
            with pytest.raises(ModelLoadError, match=told):
                await model.wait_ready(30)
            assert model.state is ModelState.FAILED
            assert "secret" not in str(model.reason)
            assert model.num_restarts == 0
            with pytest.raises(ModelLoadError, match=told):
                model.submit(request(COUNT))

    asyncio.run(run())


@pytest.mark.parametrize(("name", "how"), [("dies", "exited with code 9"), ("babbles", "SIGKILL")])
def test_a_worker_that_keeps_dying_is_given_up(name: str, how: str) -> None:
    async def run() -> None:
        async with serving(name, ready=False) as model:
            with pytest.raises(ModelLoadError, match=f"keeps dying.*{how}"):
                await model.wait_ready(30)
            assert model.num_restarts == 4

    asyncio.run(run())


# ---- death


def test_the_fork_server_can_die_too() -> None:
    async def run() -> None:
        async with serving() as model:
            os.kill(fork_server_of(model), signal.SIGKILL)
            await until(lambda: model.state is not ModelState.READY)
            await model.wait_ready(30)
            assert tokens(await answer(model, request(COUNT))) == [0, 1, 2, 3, 4]

    asyncio.run(run())


# ---- the end


def test_close_drains_then_refuses_and_leaves_no_process() -> None:
    async def run() -> None:
        async with serving() as model:
            pid = model.pid
            assert pid is not None
            stream = model.submit(request(COUNT, delay_ms=5, max_tokens=40))
            closing = asyncio.create_task(model.close(drain_s=10))
            await asyncio.sleep(0)
            with pytest.raises(OverloadedError, match="shutting down"):
                model.submit(request(COUNT, request_id="late"))
            assert tokens([event async for event in stream]) == list(range(40))
            await closing
            assert model.state is ModelState.CLOSED
            assert not alive(pid)

    asyncio.run(run())


def test_close_ends_what_outlasts_the_drain() -> None:
    async def run() -> None:
        async with serving() as model:
            stream = model.submit(request(COUNT, delay_ms=5, max_tokens=10**6))
            started = time.monotonic()
            await model.close(drain_s=0.2)
            assert time.monotonic() - started < 2
            assert isinstance([event async for event in stream][-1].error, OverloadedError)

    asyncio.run(run())


def test_close_during_a_load_leaves_no_process() -> None:
    async def run() -> None:
        async with serving("endless", ready=False) as model:
            await until(lambda: model.progress.fraction > 0)
            pid = model.pid
            assert pid is not None
            await model.close()
            assert not alive(pid)

    asyncio.run(run())


# ---- processes


def test_a_worker_has_no_descriptor_of_the_server(tmp_path: Path) -> None:
    async def run() -> None:
        listener = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
        secret = (tmp_path / "secret").open("w")
        async with serving() as model:
            held = descriptors(model)
            assert len(held) == 1 and held[0].startswith("socket:")
        listener.close()
        secret.close()

    asyncio.run(run())


def test_the_fork_server_has_one_thread_and_everything_imported() -> None:
    async def run() -> None:
        async with serving() as model:
            status, mapped = about(fork_server_of(model))
            assert "\nThreads:\t1\n" in status
            assert "libtorch" in mapped and "tokenizers" in mapped

    asyncio.run(run())


SERVER_SCRIPT = """
import asyncio
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt_server.workers import WorkerModel
from tests.engine.scripted_engine import COUNT, load_scripted, request

async def main():
    busy = WorkerModel(EngineConfig(model="busy"), load=load_scripted)
    loading = WorkerModel(EngineConfig(model="endless"), load=load_scripted)
    busy.start()
    loading.start()
    await busy.wait_ready()
    busy.submit(request(COUNT, delay_ms=1, max_tokens=10**6))
    while loading.progress.fraction < 0.5:
        await asyncio.sleep(0.01)
    print(busy.pid, loading.pid, flush=True)
    await asyncio.sleep(1000)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_workers_never_outlive_a_killed_server_be_they_busy_or_loading(tmp_path: Path) -> None:
    script = tmp_path / "server.py"
    script.write_text(SERVER_SCRIPT)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, str(script)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) as server:
        assert server.stdout is not None
        pids = [int(word) for word in server.stdout.readline().split()]
        assert len(pids) == 2 and all(map(alive, pids))
        server.kill()
        server.wait()
        killed = time.monotonic()
        while any(map(alive, pids)):
            assert time.monotonic() - killed < 2
            time.sleep(0.01)


def test_the_terminal_interrupts_the_server_and_not_the_worker() -> None:
    async def run() -> None:
        async with serving() as model:
            assert model.pid is not None
            assert os.getsid(model.pid) == model.pid
            os.kill(model.pid, signal.SIGINT)
            assert tokens(await answer(model, request(COUNT))) == [0, 1, 2, 3, 4]

    asyncio.run(run())


# ---- threads


@pytest.mark.parametrize(
    ("asked", "total", "given"),
    [([None], 8, [8]), ([None, None, None], 8, [3, 3, 2]), ([None, 6], 8, [2, 6]), ([None, None], 1, [1, 1])],
)
def test_cpu_threads_are_divided_among_models(asked: list[int | None], total: int, given: list[int]) -> None:
    configs = [EngineConfig(model="m", num_threads=number) for number in asked]
    assert [config.num_threads for config in divide_threads(configs, total)] == given


# ---- the real thing


def test_a_bundled_model_is_served_from_a_worker() -> None:
    async def run() -> None:
        model = WorkerModel(EngineConfig(model="demo", num_threads=1))
        model.start()
        try:
            await model.wait_ready(60)
            params = SamplingParams(max_tokens=8, temperature=0.0, ignore_eos=True)
            what = Request(id="r", prompt_token_ids=(5, 6, 7), params=params)
            first = tokens(await answer(model, what))
            assert len(first) == 8
            assert tokens(await answer(model, what)) == first
            await until(lambda: model.stats.num_running == 0)
        finally:
            await model.close()

    asyncio.run(run())


def test_settings_a_worker_would_refuse_are_refused_here() -> None:
    with pytest.raises(ConfigError, match="max_num_seqs"):
        WorkerModel(EngineConfig(model="demo", max_num_seqs=0))

"""Work in a thread that may be left alone."""

from __future__ import annotations

import asyncio
import threading

import pytest

from memory_efficient_gpt_server.daemon_thread import in_daemon_thread


async def test_results_and_errors_come_back() -> None:
    assert await in_daemon_thread(threading.get_ident) != threading.get_ident()

    def broken() -> None:
        raise ValueError("why")

    with pytest.raises(ValueError, match="why"):
        await in_daemon_thread(broken)


def test_the_loop_ends_without_it() -> None:
    goes_on, threads = threading.Event(), []

    def work() -> None:
        threads.append(threading.current_thread())
        goes_on.wait(10)

    async def main() -> None:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await in_daemon_thread(work)

    asyncio.run(main())  # would wait for a thread of its own
    (thread,) = threads
    assert thread.is_alive() and thread.daemon
    goes_on.set()
    thread.join(5)
    assert not thread.is_alive()


async def test_one_who_left_is_given_nothing() -> None:
    goes_on = threading.Event()
    waiting = asyncio.create_task(in_daemon_thread(lambda: goes_on.wait(10)))
    await asyncio.sleep(0.01)
    waiting.cancel()
    goes_on.set()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await asyncio.sleep(0.05)  # its end arrives; pytest would tell of an error

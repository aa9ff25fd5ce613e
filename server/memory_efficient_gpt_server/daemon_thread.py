"""Work in a thread that may be left alone.

Purpose: await a call that can take minutes (a download), without the server's end waiting for it.
Does not know: what is called.
Invariant: whoever stops waiting gets nothing, and the call's end then changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")


async def in_daemon_thread(function: Callable[[], _T]) -> _T:
    """What `function` returns or raises. Cancelled, it leaves the thread to itself.

    `asyncio.to_thread` is for what is short: the interpreter does not end before such threads do.
    """
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[_T] = loop.create_future()

    def give(result: _T) -> None:
        if not answer.done():
            answer.set_result(result)

    def fail(error: BaseException) -> None:
        if not answer.done():
            answer.set_exception(error)

    def run() -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is left to be told
            try:
                result = function()
            except BaseException as error:  # noqa: BLE001 - the thread's boundary: it is raised where it is awaited
                loop.call_soon_threadsafe(fail, error)
            else:
                loop.call_soon_threadsafe(give, result)

    threading.Thread(target=run, name=getattr(function, "__name__", "work"), daemon=True).start()
    return await answer

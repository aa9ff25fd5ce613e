"""Events on their way to the owner.

Purpose: a queue from whoever has news or wishes to the one task that takes steps.
Does not know: what events mean, the state.
Invariant: events are taken in the order in which they were posted; after `close` none is.
"""

from __future__ import annotations

import asyncio
from typing import Any, NamedTuple

from memory_efficient_gpt_server.registry.events import (
    AdminCancel,
    AdminLoad,
    AdminSleep,
    AdminUnload,
    AdminWake,
    Asked,
    Event,
    Removed,
)


class Posted(NamedTuple):
    """An event, and who waits until the owner has taken its step: the result is whether that went well."""

    event: Event
    stepped: asyncio.Future[bool] | None


class Inbox:
    """Used from one event loop."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[Posted] = asyncio.Queue()
        self._closed = False

    def post(self, event: Event) -> None:
        """Have the owner take a step with it."""
        self._put(Posted(event, None))

    async def considered(self, event: Event, answer: asyncio.Future[None]) -> bool:
        """Post it and wait until the owner has taken its step, or the answer is there, as when it closes.

        Returns whether the step was taken and did not fail.
        """
        stepped: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._put(Posted(event, stepped))
        either: list[asyncio.Future[Any]] = [stepped, answer]
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        return stepped.done() and stepped.result()

    async def take(self, timeout_s: float) -> Posted | None:
        """The next one; None if there was none for so long."""
        try:
            async with asyncio.timeout(max(0.0, timeout_s)):
                return await self._queue.get()
        except TimeoutError:
            return None

    def close(self) -> None:
        """Take no more."""
        self._closed = True

    def _put(self, posted: Posted) -> None:
        if not self._closed:
            self._queue.put_nowait(posted)


def asker(event: Event) -> int | None:
    """The waiter or operation that an event is to be answered to."""
    match event:
        case Asked(waiter):
            return waiter
        case (
            AdminLoad(operation)
            | AdminUnload(operation)
            | AdminSleep(operation)
            | AdminWake(operation)
            | AdminCancel(operation)
            | Removed(operation)
        ):
            return operation
        case _:
            return None

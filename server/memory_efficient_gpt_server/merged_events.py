"""Events of several streams in one place.

Purpose: let one reader take all that has arrived from any number of requests at once.
Does not know: what the events say.
Invariant: closing leaves every stream, so that nothing is computed for a reader that is gone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from memory_efficient_gpt.request import SequenceEvent
from memory_efficient_gpt_server.models import SequenceEvents


class MergedEvents:
    """Add streams, then call `next` until it gives nothing."""

    def __init__(self) -> None:
        self._streams: list[SequenceEvents] = []
        self._pumps: list[asyncio.Task[None]] = []
        self._inbox: list[SequenceEvent] = []
        self._arrived = asyncio.Event()

    def add(self, stream: SequenceEvents) -> None:
        """Read `stream` too. All streams are added before the first `next`."""
        self._streams.append(stream)

    async def next(self) -> Sequence[SequenceEvent]:
        """What has arrived, at least one event; empty when all streams have ended. Raises what they raise."""
        if len(self._streams) == 1:  # the common case needs no task between the engine and the reader
            try:
                return (await self._streams[0].__anext__(),)
            except StopAsyncIteration:
                return ()
        if not self._pumps:
            self._pumps = [asyncio.create_task(self._pump(stream)) for stream in self._streams]
        while not self._inbox:
            if all(pump.done() for pump in self._pumps):
                for pump in self._pumps:
                    pump.result()
                return ()
            self._arrived.clear()
            await self._arrived.wait()
        events, self._inbox = self._inbox, []
        return events

    async def close(self) -> None:
        """Leave all streams. Requests that have not ended are aborted."""
        for pump in self._pumps:
            pump.cancel()
        await asyncio.gather(*self._pumps, return_exceptions=True)
        for stream in self._streams:
            await stream.aclose()

    async def _pump(self, stream: SequenceEvents) -> None:
        try:
            async for news in stream:
                self._inbox.append(news)
                self._arrived.set()
        finally:
            asyncio.get_running_loop().call_soon(self._arrived.set)  # after this task counts as done

"""Server-sent events: one connection's way out, and the pieces of an event.

Purpose: write what is there at once, say something when nothing happens, notice who doesn't read.
Does not know: what the events say.
Invariant: an event is never cut or interleaved; a stream that ends without `[DONE]` has failed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from json.encoder import encode_basestring_ascii
from types import TracebackType
from typing import Final, Self

from starlette.types import Send

DONE: Final = b"data: [DONE]\n\n"
_PING: Final = b": ping\n\n"
_HEADERS: Final = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def event(payload: bytes) -> bytes:
    """An event that carries one line of JSON."""
    return b"data: " + payload + b"\n\n"


def named_event(name: str, payload: bytes, event_id: str | None = None) -> bytes:
    """An event with a name, and an id if a reader may go on after it. Both must be of one line."""
    identity = b"" if event_id is None else b"id: " + event_id.encode() + b"\n"
    return identity + b"event: " + name.encode() + b"\ndata: " + payload + b"\n\n"


def json_text(text: str) -> bytes:
    """`text` as a JSON string, in ASCII."""
    return encode_basestring_ascii(text).encode()


class SseChannel:
    """A stream of events to one client. `async with` it: that stops its timer, not the stream.

    The response's headers go out with the first `write`, `more_headers` (asked for then) among them.
    on_stall: called once if a write takes longer than `stall_s`, because the client has stopped to read.
    """

    def __init__(
        self,
        send: Send,
        *,
        keepalive_s: float,
        stall_s: float,
        on_stall: Callable[[], None],
        more_headers: Callable[[], Mapping[str, str]] = dict,
    ) -> None:
        self._send = send
        self._keepalive_s = keepalive_s
        self._stall_s = stall_s
        self._on_stall = on_stall
        self._more_headers = more_headers
        self._loop = asyncio.get_running_loop()
        self._last_s = self._loop.time()
        self._writing = False
        self._ping: asyncio.Task[None] | None = None
        self.started = False

    async def write(self, events: bytes) -> None:
        """Send whole events; returns when the connection has taken them."""
        if self._ping is not None:
            await self._ping
        await self._write(events)

    async def end(self, events: bytes) -> None:
        """Send the last events."""
        if self._ping is not None:
            await self._ping
        await self._write(events, more_body=False)

    async def __aenter__(self) -> Self:
        self._schedule()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._ping is not None:
            self._ping.cancel()

    async def _write(self, events: bytes, more_body: bool = True) -> None:
        self._writing, self._last_s = True, self._loop.time()
        if not self.started:
            self.started = True
            more = [(name.encode(), value.encode()) for name, value in self._more_headers().items()]
            await self._send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *more]})
        await self._send({"type": "http.response.body", "body": events, "more_body": more_body})
        self._writing = False

    def _schedule(self) -> None:
        self._timer = self._loop.call_later(min(self._keepalive_s, self._stall_s) / 4, self._look)

    def _look(self) -> None:
        """One timer for the whole stream: cheaper than one for each token."""
        quiet_s = self._loop.time() - self._last_s
        if self._writing:
            if quiet_s >= self._stall_s:
                self._on_stall()
                return
        elif quiet_s >= self._keepalive_s:
            self._ping = self._loop.create_task(self._send_ping())
        self._schedule()

    async def _send_ping(self) -> None:
        await self._write(_PING)
        self._ping = None

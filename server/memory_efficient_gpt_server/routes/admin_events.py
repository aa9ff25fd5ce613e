"""GET /admin/events: what happens to models, as it happens.

Purpose: the registry's journal as server-sent events, for the holder of the admin key.
Does not know: what happenings mean.
Invariant: a reader that does not keep up costs a connection and no more: it is told how many events it has
missed, and cut off once it reads nothing for `stream_stall_s`. The server's end does not wait for readers.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Annotated, Any, Final

from fastapi import APIRouter, Header, Request
from pydantic_core import to_json
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt_server.deps import ADMIN_ONLY, CurrentServer, Server, record_of
from memory_efficient_gpt_server.errors import StreamStalledError
from memory_efficient_gpt_server.logs import RequestRecord
from memory_efficient_gpt_server.registry.journal import Entry, Journal, News
from memory_efficient_gpt_server.routes.admin import CurrentRegistry
from memory_efficient_gpt_server.sse import SseChannel, named_event

router = APIRouter(dependencies=ADMIN_ONLY)

_HEAD: Final = b"retry: 2000\n: events follow\n\n"
_END: Final = named_event("end", b'{"reason":"the server is shutting down"}')


@router.get("/admin/events", responses={200: {"content": {"text/event-stream": {}}}})
async def events(
    request: Request,
    server: CurrentServer,
    registry: CurrentRegistry,
    last_event_id: Annotated[str | None, Header()] = None,
) -> Response:
    """A stream of events: state (model, from, to, reason), load (result, seconds), eviction (reason, way,
    bytes), refusal (code, requests), operation (id, state), kv (change_bytes, kv_bytes, partner), budget,
    model (registered, changed, removed).
    Each has an id; the header Last-Event-ID goes on after it. An event `missed` says how many events are
    lost to this reader, `end` that the server shuts down."""
    record = record_of(request)
    record.stream = True
    if record.method == "HEAD":
        return Response(media_type="text/event-stream")
    server.lifecycle.require_open()
    journal = registry.journal
    if last_event_id is None:
        return EventsResponse(server, journal, record, journal.last)
    try:
        number = journal.number_of(last_event_id)
    except ValueError as error:
        raise InvalidRequestError(
            f"The header Last-Event-ID is wrong: {error}. Send the id of the last event that was read, or "
            "leave it out."
        ) from None
    if number is None:
        return EventsResponse(server, journal, record, journal.last, _missed(None))
    return EventsResponse(server, journal, record, number)


class EventsResponse(Response):
    """Everything in the journal after the entry `seen`, until the reader leaves or the server ends.

    first: whole events to send before.
    """

    def __init__(
        self, server: Server, journal: Journal, record: RequestRecord, seen: int, first: bytes = b""
    ) -> None:
        super().__init__()
        self._server = server
        self._journal = journal
        self._record = record
        self._seen = seen
        self._first = first

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve it. A reader that has stalled is cut off: the unfinished answer closes the connection."""
        stalled: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        channel = SseChannel(
            send,
            keepalive_s=self._server.settings.keepalive_s,
            stall_s=self._server.settings.stream_stall_s,
            on_stall=lambda: stalled.set_result(None),
        )
        async with channel:
            writing = asyncio.create_task(self._write(channel), name="events")
            leaving = asyncio.create_task(_left(receive), name="events' reader")
            try:
                await asyncio.wait({writing, leaving, stalled}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                leaving.cancel()
                writing.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await writing
        if stalled.done():
            self._record.error = StreamStalledError.code

    async def _write(self, channel: SseChannel) -> None:
        drain = asyncio.create_task(self._server.lifecycle.drain_begun.wait())
        try:
            await channel.write(_HEAD + self._first)
            while not drain.done():
                news = asyncio.create_task(self._journal.after(self._seen))
                try:
                    await asyncio.wait({news, drain}, return_when=asyncio.FIRST_COMPLETED)
                    if news.done():
                        await channel.write(b"".join(self._events(news.result())))
                finally:
                    news.cancel()
            await channel.end(_END)
        finally:
            drain.cancel()

    def _events(self, news: News) -> Iterator[bytes]:
        if news.missed:
            yield _missed(news.missed)
        for entry in news.entries:
            yield named_event(entry.happening.kind, to_json(_told(entry)), self._journal.id_of(entry.number))
        self._seen = news.entries[-1].number


def _told(entry: Entry) -> dict[str, Any]:
    return {"time": entry.time_s, "kind": str(entry.happening.kind), **entry.happening.facts}


def _missed(count: int | None) -> bytes:
    """count: None if nobody can tell, as the server was started anew."""
    why = "they came faster than they were read, or long ago" if count else "the server was started anew"
    return named_event("missed", to_json({"kind": "missed", "count": count, "reason": why}))


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass

"""Requests under way: how each can be stopped, and how the server drains.

Purpose: one way to end a request from outside (client left, too slow, server stops) whatever it is doing.
Does not know: routes, models, signals.
Invariant: a request that was entered leaves; one that was stopped leaves with the error it was stopped with.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Self

from starlette.types import Receive

from memory_efficient_gpt.errors import MegptError
from memory_efficient_gpt_server.errors import ClientDisconnectedError, RequestTimeoutError, shutting_down


class RunningRequest:
    """A request and the task that serves it. `async with` it around all work that a stop should end."""

    def __init__(self, lifecycle: Lifecycle, receive: Receive, timeout_s: float) -> None:
        self._lifecycle = lifecycle
        self._receive = receive
        self._timeout_s = timeout_s
        self._error: MegptError | None = None

    def stop(self, error: MegptError) -> None:
        """End it with `error`; the first call counts. Not to be called by the request's own task."""
        if self._error is None:
            self._error = error
            self._task.cancel()

    async def __aenter__(self) -> Self:
        self._lifecycle._enter(self)
        task = asyncio.current_task()
        assert task is not None, "requests are served by tasks"
        self._task = task
        self._watcher = asyncio.create_task(self._watch())
        self._timer = asyncio.get_running_loop().call_later(self._timeout_s, self._time_out)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watcher.cancel()
        self._timer.cancel()
        self._lifecycle._leave(self)
        if self._error is not None and kind is asyncio.CancelledError and self._task.uncancel() == 0:
            raise self._error from None

    async def _watch(self) -> None:
        """The body has been read, so the only thing still to come is the client's leaving."""
        while (await self._receive())["type"] != "http.disconnect":
            pass
        self.stop(ClientDisconnectedError("The client closed the connection."))

    def _time_out(self) -> None:
        self.stop(
            RequestTimeoutError(
                f"The request took longer than {self._timeout_s:g} s, the limit of this server. "
                "Ask for fewer tokens."
            )
        )


class Lifecycle:
    """All requests under way, and whether new ones are welcome. Used from one event loop."""

    def __init__(self) -> None:
        self._running: set[RunningRequest] = set()
        self._none_running = asyncio.Event()
        self._none_running.set()
        self.draining = False
        self.drain_begun = asyncio.Event()

    @property
    def num_running(self) -> int:
        """Requests under way."""
        return len(self._running)

    def running(self, receive: Receive, timeout_s: float) -> RunningRequest:
        """A context for one request; entering it raises DrainingError while draining."""
        return RunningRequest(self, receive, timeout_s)

    def begin_drain(self) -> None:
        """From now on refuse new requests. Those under way go on."""
        self.draining = True
        self.drain_begun.set()

    async def drained(self, timeout_s: float) -> bool:
        """Wait for the requests under way; those left after `timeout_s` are stopped with an error.

        Returns whether all of them finished by themselves. The last bytes may still be on their way: close
        connections only after the ASGI calls have returned.
        """
        self.begin_drain()
        try:
            async with asyncio.timeout(timeout_s):
                await self._none_running.wait()
        except TimeoutError:
            for request in list(self._running):
                request.stop(shutting_down())
            await self._none_running.wait()
            return False
        return True

    def require_open(self) -> None:
        """Raises DrainingError while draining."""
        if self.draining:
            raise shutting_down()

    def _enter(self, request: RunningRequest) -> None:
        self.require_open()
        self._running.add(request)
        self._none_running.clear()

    def _leave(self, request: RunningRequest) -> None:
        self._running.discard(request)
        if not self._running:
            self._none_running.set()

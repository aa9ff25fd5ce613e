"""The requests aboard a model, and what another worker needs to go on with each.

Purpose: keep each open request with the tokens its stream was given, and say what survives a crash.
Does not know: processes, frames, who notices that a worker died or is ready.
Invariant: a resumed request says exactly the tokens that its stream has, so none is lost or given twice; no
request survives a second crash, so one that kills its worker kills two at most.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Final

from memory_efficient_gpt.errors import EngineFailedError, MegptError
from memory_efficient_gpt.request import Cost, Request, SequenceEvent
from memory_efficient_gpt_server.event_stream import EventStream

SEED_BITS: Final = 63


class OpenRequest:
    """One request, its stream, and its sequences' tokens so far.

    A seed is drawn here for a request that has none: a second engine would draw another.
    """

    def __init__(self, request: Request, stream: EventStream) -> None:
        params = request.params
        if params.seed is None:
            request = replace(request, params=replace(params, seed=secrets.randbits(SEED_BITS)))
        self.request = request
        self.stream = stream
        self._token_ids: list[list[int]] = [[] for _ in range(params.n)]
        self._cost_before: Cost | None = None
        self.crashed = False

    def put(self, event: SequenceEvent) -> None:
        """Give news to the stream, and keep its tokens; news of a sequence that has ended is dropped."""
        if self.stream.is_open(event.index):
            self._token_ids[event.index] += event.token_ids
            if event.cost is not None and self.crashed:
                event.cost = event.cost.after(self._cost_before)
            elif event.cost is not None:
                self._cost_before = event.cost
            self.stream.put(event)

    def resumed(self) -> Request:
        """The request as it stands; as it was when no sequence has a token or has ended."""
        is_open = self.stream.is_open
        if not any(self._token_ids) and all(map(is_open, range(len(self._token_ids)))):
            return self.request
        tokens = (tuple(ids) if is_open(index) else None for index, ids in enumerate(self._token_ids))
        return replace(self.request, resumed_token_ids=tuple(tokens))


class OpenRequests:
    """All requests of a model that have not ended, by id, the oldest first. Owned by one event loop.

    resume_wait_s: how long those of a dead worker wait for `resumed` to be called.
    """

    def __init__(self, resume_wait_s: float) -> None:
        self._requests: dict[str, OpenRequest] = {}
        self._resume_wait_s = resume_wait_s
        self._deadline: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._requests)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._requests

    def __iter__(self) -> Iterator[OpenRequest]:
        return iter(tuple(self._requests.values()))

    @property
    def wait_for_next(self) -> bool:
        """Whether a worker has died and those aboard (if any) wait for the next one."""
        return self._deadline is not None

    def add(self, request: OpenRequest) -> None:
        """Take a request aboard; its id is new."""
        self._requests[request.request.id] = request

    def deliver(self, event: SequenceEvent) -> None:
        """Give news to its stream. News of a request that was aborted here is dropped."""
        request = self._requests.get(event.request_id)
        if request is not None:
            request.put(event)
            self._forget_if_ended(request)

    def close(self, request_id: str, index: int | None) -> bool:
        """Drop a request, or one sequence of it. Whether there is such a request."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        request.stream.close(index)
        self._forget_if_ended(request)
        return True

    def crashed(self, name: str, how: str) -> None:
        """The worker `name`, with all of them aboard, died as `how` says: each waits for the next, once."""
        twice = EngineFailedError(
            f"The worker of {name} {how} while this request was aboard, and so did the one before. "
            "It is not tried again: it may be the cause."
        )
        for request in self:
            if request.crashed:
                self._fail(request, twice)
            request.crashed = True
        late = EngineFailedError(
            f"The worker of {name} {how} while this request was aboard, and the next one was not ready "
            f"within {self._resume_wait_s:g} s. Retry later."
        )
        self._end_wait()
        self._deadline = asyncio.get_running_loop().call_later(self._resume_wait_s, self.fail_all, late)

    def resumed(self) -> list[Request]:
        """The wait is over: all requests as they stand."""
        self._end_wait()
        return [request.resumed() for request in self]

    def fail_all(self, error: MegptError) -> None:
        """End all with `error`."""
        self._end_wait()
        for request in self:
            self._fail(request, error)

    def _end_wait(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _fail(self, request: OpenRequest, error: MegptError) -> None:
        del self._requests[request.request.id]
        request.stream.fail(error)

    def _forget_if_ended(self, request: OpenRequest) -> None:
        if request.stream.ended:
            del self._requests[request.request.id]

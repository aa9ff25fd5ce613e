"""The KV limit of a model whose workers come and go.

Purpose: send a limit to the present worker, hand its answer to whoever set it, tell the next worker.
Does not know: processes, frames, who wants the memory.
Invariant: a worker that is ready has been told the latest limit before any request; every answer belongs to
the limit it was given for; who waits is answered by the next worker if the present one dies, or by an error.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from memory_efficient_gpt.errors import MegptError

Answer = asyncio.Future[int]


class KvLimitCalls:
    """Limits that were set and not answered yet. `send` takes a limit in bytes. Used from one event loop."""

    def __init__(self, send: Callable[[int], None]) -> None:
        self._send = send
        self._wanted_bytes: int | None = None
        self._ready = False
        self._sent: deque[list[Answer]] = deque()
        self._unsent: list[Answer] = []

    def set(self, num_bytes: int) -> Answer:
        """Set the limit; the future has what the worker can hold under it, or a MegptError."""
        answer: Answer = asyncio.get_running_loop().create_future()
        self._wanted_bytes = num_bytes
        self._unsent.append(answer)
        if self._ready:
            self._send_wanted()
        return answer

    def worker_ready(self) -> None:
        """A new worker has its size of the beginning: tell it the limit, if one was ever set."""
        self._ready = True
        if self._wanted_bytes is not None:
            self._send_wanted()

    def answered(self, num_bytes: int) -> None:
        """The worker did what it was sent first of all that is unanswered.

        One that went further down than it was told has made known that the rest is free: the next worker may
        not have it either.
        """
        for answer in self._sent.popleft() if self._sent else ():
            if not answer.done():
                answer.set_result(num_bytes)
        if self._wanted_bytes is not None and not self._sent and not self._unsent:
            self._wanted_bytes = min(self._wanted_bytes, num_bytes)

    def worker_died(self) -> None:
        """What was unanswered will be answered by the next one."""
        self._ready = False
        self._unsent = [answer for answers in self._sent for answer in answers] + self._unsent
        self._sent.clear()

    def fail(self, error: MegptError) -> None:
        """There will be no other worker."""
        self.worker_died()
        for answer in self._unsent:
            if not answer.done():
                answer.set_exception(error)
        self._unsent.clear()

    def _send_wanted(self) -> None:
        assert self._wanted_bytes is not None
        self._sent.append(self._unsent)
        self._unsent = []
        self._send(self._wanted_bytes)

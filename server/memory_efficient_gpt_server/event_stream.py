"""The events of one request, on their way from a worker to whoever asked.

Purpose: a queue with one reader that never makes the writer wait.
Does not know: workers, HTTP, text.
Invariant: unread events of a sequence are merged into one, so a slow reader costs its tokens and no more;
iteration ends after the last event of every sequence that was not closed by the owner.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable

from memory_efficient_gpt.errors import MegptError
from memory_efficient_gpt.request import FinishReason, SequenceEvent


class EventStream(AsyncIterator[SequenceEvent]):
    """Events of a request with `num_sequences` sequences. Owned by one event loop.

    abandon: called once when the reader leaves before the end.
    """

    def __init__(self, request_id: str, num_sequences: int, abandon: Callable[[str], None]) -> None:
        self.request_id = request_id
        self._open = set(range(num_sequences))
        self._unread: dict[int, SequenceEvent] = {}
        self._wakeup = asyncio.Event()
        self._abandon = abandon

    @property
    def ended(self) -> bool:
        """Whether no more events will be put."""
        return not self._open

    def is_open(self, index: int) -> bool:
        """Whether events of that sequence may still be put."""
        return index in self._open

    def put(self, event: SequenceEvent) -> None:
        """Add news from the worker; news of a closed sequence is dropped. Takes over `event`."""
        if event.index not in self._open:
            return
        if event.finish_reason is not None:
            self._open.discard(event.index)
        earlier = self._unread.get(event.index)
        if earlier is None:
            self._unread[event.index] = event
        else:
            _merge(earlier, event)
        self._wakeup.set()

    def fail(self, error: MegptError) -> None:
        """End every open sequence with `error`."""
        for index in sorted(self._open):
            self.put(
                SequenceEvent(
                    request_id=self.request_id, index=index, finish_reason=FinishReason.ERROR, error=error
                )
            )

    def close(self, index: int | None = None) -> None:
        """Drop sequence `index`, or all: what is unread of it and what may still come."""
        for closed in [index] if index is not None else list(self._open | self._unread.keys()):
            self._open.discard(closed)
            self._unread.pop(closed, None)
        self._wakeup.set()

    async def __anext__(self) -> SequenceEvent:
        """The next event. Raises StopAsyncIteration after the last."""
        while not self._unread:
            if self.ended:
                raise StopAsyncIteration
            self._wakeup.clear()
            await self._wakeup.wait()
        return self._unread.pop(next(iter(self._unread)))

    async def aclose(self) -> None:
        """Leave. The request is aborted unless it has ended."""
        if not self.ended:
            self._abandon(self.request_id)


def _merge(earlier: SequenceEvent, later: SequenceEvent) -> None:
    earlier.token_ids += later.token_ids
    if later.logprobs is not None:
        earlier.logprobs = (earlier.logprobs or []) + later.logprobs
    earlier.prompt_logprobs = earlier.prompt_logprobs or later.prompt_logprobs
    earlier.num_cached_tokens = max(earlier.num_cached_tokens, later.num_cached_tokens)
    earlier.finish_reason = later.finish_reason
    earlier.stop_token_id = later.stop_token_id
    earlier.error = later.error
    earlier.cost = later.cost or earlier.cost

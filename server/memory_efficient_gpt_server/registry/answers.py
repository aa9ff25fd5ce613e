"""Who waits for an answer of the registry, by id.

Purpose: one future for each waiter and each administrator's operation, answered once.
Does not know: what was asked.
Invariant: ids are never used twice; after `close` nobody waits any more.
"""

from __future__ import annotations

import asyncio
import itertools
import logging

from memory_efficient_gpt.errors import MegptError
from memory_efficient_gpt_server.errors import shutting_down

logger = logging.getLogger(__name__)


class Answers:
    """All that were not given yet. Used from one event loop."""

    def __init__(self) -> None:
        self.closed = False
        self._ids = itertools.count(1)
        self._open: dict[int, tuple[str, asyncio.Future[None]]] = {}

    def new_id(self) -> int:
        """An id for a waiter or an operation."""
        return next(self._ids)

    def expect(self, waiter: int, model_id: str, *, log_failure: bool = False) -> asyncio.Future[None]:
        """A future for the answer. Raises DrainingError once closed.

        log_failure: whether a refusal is logged, as perhaps nobody reads the answer.
        """
        if self.closed:
            raise shutting_down()
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        if log_failure:
            answer.add_done_callback(_log_failure)
        self._open[waiter] = model_id, answer
        return answer

    def model_id(self, waiter: int) -> str:
        """Which model the waiter asked for; empty for one that has left."""
        return self._open[waiter][0] if waiter in self._open else ""

    def forget(self, waiter: int) -> None:
        """It has left."""
        self._open.pop(waiter, None)

    def give(self, waiter: int | None, error: Exception | None = None) -> None:
        """Answer it, unless it has left: that news is on the way."""
        _, answer = self._open.pop(waiter, ("", None)) if waiter is not None else ("", None)
        if answer is None or answer.done():
            return
        if error is None:
            answer.set_result(None)
        else:
            answer.set_exception(error)

    def close(self) -> None:
        """Refuse all that wait, and all that come."""
        self.closed = True
        for waiter in list(self._open):
            self.give(waiter, shutting_down())


def _log_failure(answer: asyncio.Future[None]) -> None:
    if not answer.cancelled() and (error := answer.exception()) is not None:
        told = error.message if isinstance(error, MegptError) else repr(error)
        logger.warning("An operation was refused: %s", told)

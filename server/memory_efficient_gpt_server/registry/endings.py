"""Engines on their end.

Purpose: close an engine, and say whether its memory can be counted on.
Does not know: what was booked for it; other engines.
Invariant: a process that is not gone after `timeout_s` is given up, not forgotten: when the last lost one of
a variant is gone after all, LeaksCleared says so. One whose end failed is lost for good.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from typing import Final

from memory_efficient_gpt_server.registry.events import Event, LeaksCleared
from memory_efficient_gpt_server.registry.hosted import LoadableEngine
from memory_efficient_gpt_server.registry.variants import VariantKey

logger = logging.getLogger(__name__)

LOST_AFTER_S: Final = 60.0
"""From the order to end (seconds later it is killed) until a process that is still there counts as lost."""


class Endings:
    """Those under way, and those that were given up. post: takes LeaksCleared."""

    def __init__(self, post: Callable[[Event], None], timeout_s: float = LOST_AFTER_S) -> None:
        self._post = post
        self._timeout_s = timeout_s
        self._closings: set[asyncio.Task[None]] = set()
        self._lost: Counter[VariantKey] = Counter()

    async def end(self, key: VariantKey, engine: LoadableEngine) -> bool:
        """Close it. Returns whether it is gone; if not, what it holds is lost for now."""
        closing = asyncio.create_task(engine.close(), name=f"close {key}")
        self._closings.add(closing)
        closing.add_done_callback(self._closings.discard)
        await asyncio.wait({closing}, timeout=self._timeout_s)
        if closing.done() and self._gone(key, closing):
            return True
        self._lost[key] += 1
        if not closing.done():
            logger.error(
                "The worker of %s is not gone after %.0f s; its memory counts as leaked until it is.",
                key, self._timeout_s,
            )  # fmt: skip
            closing.add_done_callback(lambda _: self._found(key, closing))
        return False

    def give_up(self) -> None:
        """Wait for none any more: the server ends."""
        for closing in list(self._closings):
            closing.cancel()

    def _found(self, key: VariantKey, closing: asyncio.Task[None]) -> None:
        if not self._gone(key, closing):
            return
        logger.warning("The worker of %s is gone after all.", key)
        self._lost[key] -= 1
        if not self._lost[key]:
            self._post(LeaksCleared(key))

    def _gone(self, key: VariantKey, closing: asyncio.Task[None]) -> bool:
        if closing.cancelled():
            return False
        error = closing.exception()
        if error is not None:
            logger.error("The worker of %s could not be ended; its memory is lost.", key, exc_info=error)
        return error is None

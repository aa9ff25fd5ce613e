"""KV limits on their way to engines.

Purpose: turn GrowKv and MoveKv into limits of engines, and their answers into KvMoved.
Does not know: who gives to whom, what is booked in the end.
Invariant: every MoveKv is answered by one KvMoved, unless its engine is ended first; what was not told to be
unmapped counts as kept. Limits are absolute, and an engine is told them in their order: one that comes late,
or twice, does no harm.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

from memory_efficient_gpt.errors import MegptError
from memory_efficient_gpt_server.registry.events import Event, KvMoved
from memory_efficient_gpt_server.registry.hosted import LoadableEngine
from memory_efficient_gpt_server.registry.variants import VariantKey

logger = logging.getLogger(__name__)

ANSWER_TIMEOUT_S: Final = 10.0
"""Longest wait for a worker's answer; it comes between two steps, or after a restart."""


class KvMoves:
    """Limits that were not answered yet, by key. post: takes events."""

    def __init__(self, post: Callable[[Event], None], timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        self._post = post
        self._timeout_s = timeout_s
        self._tasks: dict[VariantKey, set[asyncio.Task[None]]] = {}

    def grow(self, key: VariantKey, engine: LoadableEngine, limit_bytes: int) -> None:
        """Let it have so many KV bytes from now on."""
        self._start(key, self._grow(key, engine, limit_bytes))

    def shrink(self, key: VariantKey, engine: LoadableEngine, limit_bytes: int, had_bytes: int) -> None:
        """Let it have only so many, and tell how many of the `had_bytes` it gave back."""
        self._start(key, self._shrink(key, engine, limit_bytes, had_bytes))

    async def stop(self, key: VariantKey) -> None:
        """Wait for no answer of this engine any more: it is being ended, and nothing more is told of it."""
        tasks = self._tasks.pop(key, set())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def close(self) -> None:
        """The same for all."""
        for key in list(self._tasks):
            await self.stop(key)

    def _start(self, key: VariantKey, work: Coroutine[Any, Any, None]) -> None:
        tasks = self._tasks.setdefault(key, set())
        task = asyncio.create_task(work, name=f"KV limit of {key}")
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    async def _grow(self, key: VariantKey, engine: LoadableEngine, limit_bytes: int) -> None:
        await self._set(key, engine, limit_bytes)

    async def _shrink(
        self, key: VariantKey, engine: LoadableEngine, limit_bytes: int, had_bytes: int
    ) -> None:
        held = await self._set(key, engine, limit_bytes)
        self._post(KvMoved(key, 0 if held is None else max(0, had_bytes - held)))

    async def _set(self, key: VariantKey, engine: LoadableEngine, limit_bytes: int) -> int | None:
        """What it holds then; None if it doesn't say."""
        try:
            async with asyncio.timeout(self._timeout_s):
                held = await engine.set_kv_limit(limit_bytes)
        except (MegptError, TimeoutError) as error:
            logger.warning("The KV cache of %s could not be set to %d bytes: %r", key, limit_bytes, error)
            return None
        except Exception:  # the task's boundary: nobody awaits it, and a gift must be answered
            logger.exception("Setting the KV cache of %s failed.", key)
            return None
        logger.debug("The KV cache of %s has %d bytes, %d were meant.", key, held, limit_bytes)
        return held

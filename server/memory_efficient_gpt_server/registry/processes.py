"""The engines that run: started, watched and closed as the registry says.

Purpose: turn the registry's effects into deeds of engines, limits of KV memory among them, and what happens
to these into events.
Does not know: who waits, what fits.
Invariant: every load is answered by one of Loaded, LoadFailed and WorkerDied unless it is unloaded first;
likewise every sleep by Slept or WorkerDied, every wake-up by Woke or WorkerDied; every unload by one
ProcessGone, after the engine is closed or given up (endings.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from memory_efficient_gpt.errors import MegptError
from memory_efficient_gpt_server.registry.endings import Endings
from memory_efficient_gpt_server.registry.events import (
    Event,
    KvWanted,
    Loaded,
    LoadFailed,
    ProcessGone,
    Slept,
    Woke,
    WorkerBack,
    WorkerDied,
    WorkerLost,
)
from memory_efficient_gpt_server.registry.hosted import LoadableEngine
from memory_efficient_gpt_server.registry.kv_demand import wanted_kv_bytes
from memory_efficient_gpt_server.registry.kv_moves import ANSWER_TIMEOUT_S, KvMoves
from memory_efficient_gpt_server.registry.tally import Tally
from memory_efficient_gpt_server.registry.variants import HOST, Estimate, VariantKey

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Running:
    """An engine that was started.

    reserved: what it may take. task: its load, sleep or wake-up under way. ready: whether it was once, and
    its end would be news. lost: whether its worker was seen to be replaced. num_preemptions: its count
    when it was last looked at.
    """

    engine: LoadableEngine
    reserved: Estimate
    task: asyncio.Task[None] | None = None
    ready: bool = False
    lost: bool = False
    num_preemptions: int = 0


class Processes:
    """All running engines by key.

    make_engine: a new one for a variant. post: takes events. ended: told of each engine that was closed.
    """

    def __init__(
        self,
        make_engine: Callable[[VariantKey], LoadableEngine],
        post: Callable[[Event], None],
        ended: Callable[[VariantKey, LoadableEngine], None],
        tally: Tally,
    ) -> None:
        self._make_engine = make_engine
        self._post = post
        self._ended = ended
        self._tally = tally
        self._running: dict[VariantKey, Running] = {}
        self._kv_moves = KvMoves(post)
        self._endings = Endings(post)
        self._unloads: set[asyncio.Task[None]] = set()

    def engine(self, key: VariantKey) -> LoadableEngine | None:
        """The variant's engine while there is one."""
        running = self._running.get(key)
        return None if running is None else running.engine

    def load(self, key: VariantKey, reserved: Estimate) -> None:
        """Make an engine and load it in the background."""
        try:
            engine = self._make_engine(key)
        except Exception as error:  # whatever it is, those who wait need an answer
            logger.exception("No engine could be made for %s.", key)
            self._fail(key, f"no engine could be made ({error})")
            return
        running = self._running[key] = Running(engine, reserved)
        running.task = asyncio.create_task(self._load(key, running), name=f"load {key}")

    def sleep(self, key: VariantKey, reason: str) -> None:
        """Put an idle engine to sleep in the background."""
        self._tally.slept(key.model_id, reason)
        running = self._running[key]
        running.task = asyncio.create_task(self._sleep(key, running), name=f"sleep {key}")

    def wake(self, key: VariantKey, kv_bytes: int) -> None:
        """Wake a sleeping engine in the background; its KV cache may have so many bytes then."""
        running = self._running[key]
        running.task = asyncio.create_task(self._wake(key, running, kv_bytes), name=f"wake {key}")

    def unload(self, key: VariantKey, reason: str) -> None:
        """End the engine in the background, whatever it is doing."""
        self._tally.unloaded(key.model_id, reason)
        if key not in self._running:  # no engine could be made
            self._post(ProcessGone(key))
            return
        task = asyncio.create_task(self._unload(key, self._running[key]), name=f"unload {key}")
        self._unloads.add(task)
        task.add_done_callback(self._unloads.discard)

    def grow_kv(self, key: VariantKey, limit_bytes: int) -> None:
        """Let the engine's KV cache have so many bytes; one that is gone needs none."""
        if (engine := self.engine(key)) is not None:
            self._kv_moves.grow(key, engine, limit_bytes)

    def shrink_kv(self, key: VariantKey, limit_bytes: int, had_bytes: int) -> None:
        """Let it have only so many of the `had_bytes`. Answered by KvMoved unless it is unloaded first."""
        if (engine := self.engine(key)) is not None:
            self._kv_moves.shrink(key, engine, limit_bytes, had_bytes)

    def watch(self) -> None:
        """Look for engines that were ready and have given up or replace their worker, and for those that want
        KV memory."""
        for key, running in self._running.items():
            self.look_at(key)
            if running.ready and (wanted := _wanted_kv_bytes(running)) > 0:
                self._post(KvWanted(key, wanted))

    def look_at(self, key: VariantKey) -> None:
        """Tell at once what has become of an engine that was ready, if it is news."""
        running = self._running.get(key)
        if running is None or not running.ready:
            return
        match str(running.engine.state), running.lost:
            case "failed", _:
                self._died(key, running, running.engine.reason or "it ended without a word")
            case "loading", False:
                running.lost = True
                self._post(WorkerLost(key))
            case "ready", True:
                running.lost = False
                self._post(WorkerBack(key))
            case _:
                pass

    async def close(self, drain_s: float) -> None:
        """End all engines; all get the same `drain_s` seconds."""
        await asyncio.gather(*self._unloads, return_exceptions=True)
        await self._kv_moves.close()
        self._endings.give_up()
        running, self._running = self._running, {}
        for one in running.values():
            await _cancelled(one.task)
        async with asyncio.TaskGroup() as group:
            for one in running.values():
                group.create_task(one.engine.close(drain_s))

    async def _load(self, key: VariantKey, running: Running) -> None:
        began_s = time.monotonic()
        engine = running.engine
        try:
            engine.start()
            await engine.wait_ready()
        except MegptError as error:
            self._fail(key, engine.reason or error.message)
            return
        except Exception as error:  # the task's boundary: nobody awaits it, and waiters need an answer
            logger.exception("Loading %s failed.", key)
            self._fail(key, f"{type(error).__name__}; the server's log has the details")
            return
        running.ready = True
        self._tally.loaded(key.model_id, time.monotonic() - began_s)
        self._post(Loaded(key, measured(engine, running.reserved)))

    async def _sleep(self, key: VariantKey, running: Running) -> None:
        await self._kv_moves.stop(key)  # all its KV memory goes, and it is told anew what it gets on waking
        try:
            report = await running.engine.sleep()
        except Exception as error:  # noqa: BLE001 - the task's boundary: it is logged and told
            self._move_failed(key, running, error, "sleep")
            return
        size = running.reserved
        on_host = size.device == HOST
        kept = 0 if on_host else size.context_bytes + report.device_bytes
        self._post(Slept(key, kept, None if on_host else report.parked_bytes))

    async def _wake(self, key: VariantKey, running: Running, kv_bytes: int) -> None:
        began_s = time.monotonic()
        try:
            held = await _limited_kv_bytes(running.engine, kv_bytes)  # before it can map any again
            await running.engine.wake()
        except Exception as error:  # noqa: BLE001 - as above
            self._move_failed(key, running, error, "wake")
            return
        self._tally.woke(key.model_id, time.monotonic() - began_s)
        self._post(Woke(key, replace(measured(running.engine, running.reserved), kv_bytes=held)))

    def _move_failed(self, key: VariantKey, running: Running, error: Exception, what: str) -> None:
        expected = isinstance(error, MegptError)
        why = error.message if isinstance(error, MegptError) else type(error).__name__
        logger.error("%s could not %s: %s.", key, what, why, exc_info=None if expected else error)
        self._died(key, running, f"it could not {what}: {why}")

    def _died(self, key: VariantKey, running: Running, reason: str) -> None:
        """Tell it once."""
        if running.ready:
            running.ready = False
            self._post(WorkerDied(key, reason))

    def _fail(self, key: VariantKey, reason: str) -> None:
        self._tally.failed(key.model_id)
        self._post(LoadFailed(key, reason))

    async def _unload(self, key: VariantKey, running: Running) -> None:
        running.ready = False
        await _cancelled(running.task)
        await self._kv_moves.stop(key)
        gone = await self._endings.end(key, running.engine)
        self._running.pop(key, None)
        self._ended(key, running.engine)
        self._post(ProcessGone(key, lost=not gone))


def measured(engine: LoadableEngine, reserved: Estimate) -> Estimate:
    """What a ready engine says it takes; what it doesn't tell is as it was estimated."""
    if engine.info is None:
        return reserved
    info = engine.info
    can_sleep = reserved.can_sleep and (reserved.device != HOST or info.kv_cache_bytes > 0)
    return replace(
        reserved,
        weights_bytes=info.weights_bytes,
        kv_bytes=info.kv_cache_bytes,
        can_sleep=can_sleep,
        kv_least_bytes=info.kv_least_bytes,
        kv_most_bytes=info.kv_most_bytes,
    )


async def _limited_kv_bytes(engine: LoadableEngine, kv_bytes: int) -> int:
    """Set what a sleeping engine's KV cache may have; returns what it can have then.

    Raises MegptError, TimeoutError.
    """
    if engine.info is None or engine.info.kv_most_bytes is None:
        return kv_bytes  # it keeps its size
    async with asyncio.timeout(ANSWER_TIMEOUT_S):
        return await engine.set_kv_limit(kv_bytes)


def _wanted_kv_bytes(running: Running) -> int:
    stats, before = running.engine.stats, running.num_preemptions
    running.num_preemptions = stats.num_preemptions
    info = running.engine.info
    return 0 if info is None else wanted_kv_bytes(info, stats, stats.num_preemptions > before)


async def _cancelled(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

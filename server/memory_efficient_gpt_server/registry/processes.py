"""The engines that run: started, watched and closed as the registry says.

Purpose: turn StartLoad and StartUnload into engines, and what happens to these into events.
Does not know: who waits, what fits.
Invariant: every load is answered by one of Loaded, LoadFailed and WorkerDied unless it is unloaded first;
every unload by one ProcessGone, after the engine is closed. An engine that can't be closed keeps its bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from memory_efficient_gpt.errors import MegptError
from memory_efficient_gpt_server.registry.events import Event, Loaded, LoadFailed, ProcessGone, WorkerDied
from memory_efficient_gpt_server.registry.hosted import LoadableEngine
from memory_efficient_gpt_server.registry.tally import Tally
from memory_efficient_gpt_server.registry.variants import Estimate, VariantKey

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Running:
    """An engine that was started. `ready`: whether it was once, and its end would be news."""

    engine: LoadableEngine
    loading: asyncio.Task[None] | None = None
    ready: bool = False


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
        running = self._running[key] = Running(engine)
        running.loading = asyncio.create_task(self._load(key, running, reserved), name=f"load {key}")

    def unload(self, key: VariantKey, reason: str) -> None:
        """End the engine in the background, whatever it is doing."""
        self._tally.unloaded(key.model_id, reason)
        if key not in self._running:  # no engine could be made
            self._post(ProcessGone(key))
            return
        task = asyncio.create_task(self._unload(key, self._running[key]), name=f"unload {key}")
        self._unloads.add(task)
        task.add_done_callback(self._unloads.discard)

    def watch(self) -> None:
        """Look for engines that were ready and have given up."""
        for key, running in self._running.items():
            if running.ready and running.engine.state == "failed":
                running.ready = False
                self._post(WorkerDied(key, running.engine.reason or "it ended without a word"))

    async def close(self, drain_s: float) -> None:
        """End all engines; all get the same `drain_s` seconds."""
        await asyncio.gather(*self._unloads, return_exceptions=True)
        running, self._running = self._running, {}
        for one in running.values():
            await _cancelled(one.loading)
        async with asyncio.TaskGroup() as group:
            for one in running.values():
                group.create_task(one.engine.close(drain_s))

    async def _load(self, key: VariantKey, running: Running, reserved: Estimate) -> None:
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
        self._post(Loaded(key, measured(engine, reserved)))

    def _fail(self, key: VariantKey, reason: str) -> None:
        self._tally.failed(key.model_id)
        self._post(LoadFailed(key, reason))

    async def _unload(self, key: VariantKey, running: Running) -> None:
        running.ready = False
        await _cancelled(running.loading)
        try:
            await running.engine.close()
        except Exception:  # the task's boundary: bytes whose release is unsure stay booked
            logger.exception("The worker of %s could not be ended; its memory stays booked.", key)
            return
        self._running.pop(key, None)
        self._ended(key, running.engine)
        self._post(ProcessGone(key))


def measured(engine: LoadableEngine, reserved: Estimate) -> Estimate:
    """What a ready engine says it takes; what it doesn't tell is as it was estimated."""
    if engine.info is None:
        return reserved
    return Estimate(
        device=reserved.device,
        weights_bytes=engine.info.weights_bytes,
        kv_bytes=engine.info.kv_cache_bytes,
        workspace_bytes=reserved.workspace_bytes,
        host_bytes=reserved.host_bytes,
        context_bytes=reserved.context_bytes,
    )


async def _cancelled(task: asyncio.Task[None] | None) -> None:
    if task is not None:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task

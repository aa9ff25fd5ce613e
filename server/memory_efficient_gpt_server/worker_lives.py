"""One worker process after another for one model.

Purpose: start a worker, watch it, kill it when it is beyond hope, start the next one after its death.
Does not know: requests, models' states, what messages mean (whoever it is done for does: `Supervised`).
Invariant: there is one process at a time; each death is told once, after the last message of the dead.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

from memory_efficient_gpt.errors import MegptError
from memory_efficient_gpt.frames import Message
from memory_efficient_gpt_server.model_states import LoadTimes
from memory_efficient_gpt_server.supervision import RestartRule, StallRule, WorkerLimits
from memory_efficient_gpt_server.worker_process import WorkerProcess, how_it_ended

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S: Final = 1.0


class Supervised(Protocol):
    """Whose workers these are."""

    def receive(self, message: Message) -> None:
        """A worker says this. Raises FrameError for what makes no sense."""

    def has_work(self) -> bool:
        """Whether the present worker has something to compute."""

    def worker_died(self, how: str, *, was_ready: bool) -> bool:
        """It is gone, as `how` says. Returns whether another one is wanted."""

    def restarting(self, reason: str) -> None:
        """The next one follows."""

    def gave_up(self, reason: str) -> None:
        """No other one follows."""


class WorkerLives:
    """The workers of one model. Owned by the event loop in which `start` was called.

    start_worker: starts one whose messages go to the given function. ready_s: since when requests reach the
    present worker; None: they don't yet. last_words: the error with which it said
    that it ends. times: of its load.
    """

    def __init__(
        self,
        name: str,
        start_worker: Callable[[Callable[[Message], None]], Awaitable[WorkerProcess]],
        supervised: Supervised,
        rule: RestartRule,
        limits: WorkerLimits,
    ) -> None:
        self._name, self._start_worker, self._supervised = name, start_worker, supervised
        self._rule, self._limits = rule, limits
        self.process: WorkerProcess | None = None
        self.ready_s: float | None = None
        self.last_words: MegptError | None = None
        self.stall_rule: StallRule = limits.stall_rule(0.0)
        self.times = LoadTimes()
        self.num_restarts = 0
        self._asked_s = 0.0
        self._task: asyncio.Task[None] | None = None

    @property
    def begun(self) -> bool:
        """Whether `start` was ever called."""
        return self._task is not None

    @property
    def going_on(self) -> bool:
        """Whether there is a worker, or another one will follow."""
        return self._task is not None and not self._task.done()

    def start(self) -> None:
        """Begin, in the background."""
        self._task = asyncio.create_task(self._supervise(), name=f"supervise {self._name}")

    async def wait_end(self, timeout_s: float) -> None:
        """Return when no other worker follows, or when the time is over."""
        if self._task is not None:
            await asyncio.wait([self._task], timeout=timeout_s)

    async def end(self) -> None:
        """End the present worker and let none follow; return when it is gone."""
        if self.process is not None:  # a loading one reads nothing, and has nothing to lose
            await self.process.end(patiently=self.ready_s is not None)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def became_ready(self) -> None:
        """The present worker takes requests from now on."""
        self.ready_s = time.monotonic()
        self.times.ready_s = self.ready_s - self._asked_s
        self.stall_rule = self._limits.stall_rule(self.ready_s)
        logger.info("%s is ready after %.2f s.", self._name, self.times.ready_s)

    def send_frame(self, frame: bytes) -> None:
        """To the present worker, if there is one."""
        if self.process is not None:
            self.process.send_frame(frame)

    async def _supervise(self) -> None:
        try:
            while (delay_s := await self._one_life()) is not None:
                await asyncio.sleep(delay_s)
                self.num_restarts += 1
                self._supervised.restarting("restarting")
        except asyncio.CancelledError:
            raise
        except Exception:  # the task's boundary: nobody awaits it, and a silent end would look like loading
            logger.exception("The supervisor of %s failed.", self._name)
            self._supervised.gave_up("the supervisor failed; the server's log has the details")

    async def _one_life(self) -> float | None:
        """Run one worker to its end. Returns the seconds until the next, or None if there is none."""
        self._asked_s, self.ready_s, self.last_words = time.monotonic(), None, None
        self.times = LoadTimes()
        try:
            process = self.process = await self._start_worker(self._supervised.receive)
        except (OSError, EOFError) as error:
            logger.exception("No worker process could be started for %s.", self._name)
            return self._after_death(f"no process could be started ({error})")
        self.times.forked_s = time.monotonic() - self._asked_s
        try:
            while not process.ended.done():
                await asyncio.wait([process.ended], timeout=WATCH_INTERVAL_S)
                self._kill_if_beyond_hope(process)
        finally:
            self.process = None
        return self._after_death(how_it_ended(process.ended.result()))

    def _after_death(self, how: str) -> float | None:
        now_s = time.monotonic()
        was_ready_s, self.ready_s = self.ready_s, None
        if not self._supervised.worker_died(how, was_ready=was_ready_s is not None):
            return None
        if was_ready_s is None and self.last_words is not None:
            self._supervised.gave_up(str(self.last_words))
            return None
        delay_s = self._rule.died(now_s, ready_for_s=0.0 if was_ready_s is None else now_s - was_ready_s)
        if delay_s is None:
            self._supervised.gave_up(f"its worker keeps dying and is not restarted any more; the last {how}")
            return None
        logger.error("The worker of %s %s; restarting it in %.0f s.", self._name, how, delay_s)
        self._supervised.restarting(f"its worker {how}; restarting in {delay_s:.0f} s")
        return delay_s

    def _kill_if_beyond_hope(self, process: WorkerProcess) -> None:
        now_s = time.monotonic()
        self.stall_rule.observed(process.cpu_seconds(), now_s)
        if self._supervised.has_work() and self.stall_rule.beyond_hope(now_s):
            logger.error(
                "The worker of %s has made no step for too long with work aboard; killing it.", self._name
            )
            process.kill()

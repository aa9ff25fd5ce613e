"""A model served by a worker process that is kept alive.

Purpose: requests to the worker, its events to whoever asked; states, restarts, stalls, shutdown.
Does not know: HTTP, text.
Invariant: a request's stream always ends: by its last event, or by an event that carries an error. One slow
reader holds up nobody: its unread events are merged, so they take no more than its tokens do.

    start() -> LOADING --Ready--> READY --close()--> DRAINING --> CLOSED
                  ^  |               |
       delay 1..60 s |  Failed       | the worker died: its requests wait for the next worker to be ready
                  |  +--> FAILED <---+ five deaths in ten minutes: they end with that error
                  +------------------+

A request waits once, and only so long; a second death ends it. While DRAINING a dead worker is replaced
too as long as a request waits.

READY --sleep()--> ASLEEP --wake()--> READY. A worker that dies in its sleep is not replaced, as its successor
would take memory that was promised to others: the model is FAILED then.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Final

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.engine_info import EngineInfo, EngineStats, SleepReport
from memory_efficient_gpt.errors import (
    EngineFailedError,
    InvalidRequestError,
    MegptError,
    ModelLoadError,
    OverloadedError,
)
from memory_efficient_gpt.frames import (
    Abort,
    Close,
    Drain,
    Events,
    Failed,
    KvLimit,
    Message,
    Pong,
    Progress,
    Ready,
    SetKvLimit,
    Sleep,
    Slept,
    Stats,
    Submit,
    Wake,
    Woke,
    encode,
)
from memory_efficient_gpt.request import Request
from memory_efficient_gpt.wire import FrameError
from memory_efficient_gpt.worker import LoadEngine, load_engine
from memory_efficient_gpt_server.counters import add_counters
from memory_efficient_gpt_server.event_stream import EventStream
from memory_efficient_gpt_server.kv_limit import KvLimitCalls
from memory_efficient_gpt_server.model_states import LoadProgress, LoadTimes
from memory_efficient_gpt_server.model_states import ModelState as ModelState
from memory_efficient_gpt_server.open_requests import OpenRequest, OpenRequests
from memory_efficient_gpt_server.supervision import USUAL_LIMITS, RestartRule, WorkerLimits
from memory_efficient_gpt_server.worker_process import WorkerProcess, how_it_ended
from memory_efficient_gpt_server.worker_sleep import SleepSwitch

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S: Final = 1.0
CLOSE_GRACE_S: Final = 5.0


class WorkerModel:
    """One model in one worker process. Owned by the event loop in which `start` was called.

    `state` and `reason` say what it is doing and why; `info` is None until it was ready once; `stats` is
    the last that the living worker told, `ended_stats` adds up the counters of those before it; `stalled` is
    true while it has work but makes no step. `num_resumed` counts requests handed to a second worker.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        name: str | None = None,
        log_level: str = "INFO",
        log_json: bool = False,
        load: LoadEngine = load_engine,
        restart_rule: Callable[[], RestartRule] = RestartRule,
        limits: WorkerLimits = USUAL_LIMITS,
    ) -> None:
        self.config = config
        self.name = name or config.model
        self.state = ModelState.LOADING
        self.reason: str | None = "not started"
        self.info: EngineInfo | None = None
        self.stats = EngineStats()
        self.ended_stats = EngineStats()
        self._uncounted_tokens = 0
        self.progress = LoadProgress("waiting", 0.0)
        self.times = LoadTimes()
        self.num_restarts = 0
        self.num_resumed = 0
        self._log_level, self._log_json = log_level, log_json
        self._load = load
        self._restart_rule = restart_rule()
        self._limits, self._stall_rule = limits, limits.stall_rule(0.0)
        self._open = OpenRequests(limits.resume_wait_s)
        self._sleep_switch = SleepSwitch()
        self._kv_limit = KvLimitCalls(lambda num_bytes: self._send_frame(encode(SetKvLimit(num_bytes))))
        self._process: WorkerProcess | None = None
        self._supervisor: asyncio.Task[None] | None = None
        self._settled = asyncio.Event()
        self._asked_s = 0.0
        self._ready_s: float | None = None  # since when requests reach the present worker
        self._last_words: MegptError | None = None

    # ---- for those who serve requests

    @property
    def pid(self) -> int | None:
        """The worker's process id while it lives."""
        return self._process.pid if self._process is not None else None

    @property
    def num_open_requests(self) -> int:
        """Requests that have not ended; those that wait for the next worker too."""
        return len(self._open)

    @property
    def stalled(self) -> bool:
        """Whether the worker has work but its step counter has stood still for too long."""
        return self._has_work and self._stall_rule.stalled(time.monotonic())

    @property
    def _has_work(self) -> bool:
        return self._ready_s is not None and len(self._open) > 0

    @property
    def ready(self) -> bool:
        """Whether a request submitted now would be computed."""
        return self.state is ModelState.READY and not self.stalled

    def submit(self, request: Request) -> EventStream:
        """Hand a request to the worker. What is wrong with it comes as events with an error.

        Raises OverloadedError while it can't take any, ModelLoadError if it won't, InvalidRequestError.
        """
        self._require_ready()
        if request.id in self._open:
            raise InvalidRequestError(f"Request id {request.id!r} is in use. Ids must be unique.", param="id")
        stream = EventStream(request.id, request.params.n, abandon=self.abort)
        opened = OpenRequest(request, stream)
        try:
            frame = encode(Submit(opened.request))
        except FrameError as error:
            raise InvalidRequestError(f"The request can't be handed to the model: {error}") from error
        if not self._open:
            self._stall_rule.moved(time.monotonic())
        self._open.add(opened)
        self._send_frame(frame)
        return stream

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sequence of it, without further events. Unknown ids are fine."""
        if self._open.close(request_id, index) and self._ready_s is not None:
            self._send_frame(encode(Abort(request_id, index)))

    async def set_kv_limit(self, num_bytes: int) -> int:
        """Let the KV cache have so many bytes, now and in workers to come; returns what it can hold then.

        See `Engine.set_kv_limit`. While there is no worker it waits for the next one.
        Raises ModelLoadError if there will be none.
        """
        if self.state in (ModelState.FAILED, ModelState.CLOSED):
            raise ModelLoadError(f"{self.name} is {self.state}: {self.reason}")
        return await self._kv_limit.set(num_bytes)

    # ---- for the server's life cycle

    def start(self) -> None:
        """Begin to load, in the background. Also starts a failed model again."""
        if self._supervisor is not None and not self._supervisor.done():
            return
        self._set_state(ModelState.LOADING, "starting")
        self._supervisor = asyncio.create_task(self._supervise(), name=f"supervise {self.name}")

    async def wait_ready(self, timeout_s: float | None = None) -> None:
        """Return once it is ready. Raises ModelLoadError if it failed or was closed, TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while self.state is not ModelState.READY:
                if self.state is not ModelState.LOADING:
                    raise ModelLoadError(f"{self.name} is {self.state}: {self.reason}")
                self._settled.clear()
                await self._settled.wait()

    async def sleep(self) -> SleepReport:
        """Let the idle worker give its memory back. Raises EngineFailedError: it must be closed then."""
        process = self._process
        if not self.ready or self._open or process is None:
            raise EngineFailedError(f"{self.name} is {self.state} with {len(self._open)} requests aboard")
        self._set_state(ModelState.ASLEEP, None)
        return await self._sleep_switch.ask(process, Sleep(), self.info)

    async def wake(self) -> None:
        """Take requests again. Raises EngineFailedError as `sleep`."""
        process = self._process
        if self.state is not ModelState.ASLEEP or process is None:
            raise EngineFailedError(f"{self.name} is {self.state} and does not sleep")
        await self._sleep_switch.ask(process, Wake(), self.info)
        if self.state is ModelState.ASLEEP:
            self._set_state(ModelState.READY, None)

    async def close(self, drain_s: float = 0.0) -> None:
        """Refuse new requests, give those aboard `drain_s` seconds, end the worker, wait until it is gone."""
        if self.state is ModelState.CLOSED:
            return
        self._set_state(ModelState.DRAINING, "shutting down")
        if self._supervisor is not None and self._open and drain_s > 0:
            self._drain_if_ready()
            await asyncio.wait([self._supervisor], timeout=drain_s)
        self._open.fail_all(
            OverloadedError("The server is shutting down. Try again later.", retry_after_s=5.0)
        )
        process = self._process
        if process is not None and not process.ended.done():
            hears_us = self._ready_s is not None  # a loading worker reads nothing, and has nothing to lose
            process.send(Close())
            await asyncio.wait([process.ended], timeout=CLOSE_GRACE_S if hears_us else 0)
            process.kill()
            await process.ended
        if self._supervisor is not None:
            self._supervisor.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._supervisor
        self._set_state(ModelState.CLOSED, "closed")
        self._kv_limit.fail(ModelLoadError(f"{self.name} is closed."))

    # ---- supervision

    async def _supervise(self) -> None:
        try:
            while (delay_s := await self._one_life()) is not None:
                await asyncio.sleep(delay_s)
                self.num_restarts += 1
                self._set_loading("restarting")
        except asyncio.CancelledError:
            raise
        except Exception:  # the task's boundary: nobody awaits it, and a silent end would look like loading
            logger.exception("The supervisor of %s failed.", self.name)
            self._give_up("the supervisor failed; the server's log has the details")

    async def _one_life(self) -> float | None:
        """Run one worker to its end. Returns the seconds until the next, or None if there is none."""
        self._asked_s, self._ready_s, self._last_words = time.monotonic(), None, None
        self.times = LoadTimes()
        try:
            self._process = await WorkerProcess.start(
                self.config,
                self._receive,
                log_level=self._log_level,
                log_json=self._log_json,
                load=self._load,
            )
        except (OSError, EOFError) as error:
            logger.exception("No worker process could be started for %s.", self.name)
            return self._after_death(f"no process could be started ({error})")
        self.times.forked_s = time.monotonic() - self._asked_s
        process = self._process
        try:
            while not process.ended.done():
                await asyncio.wait([process.ended], timeout=WATCH_INTERVAL_S)
                self._kill_if_beyond_hope(process)
        finally:
            self._process = None
            self._count_ended()
        return self._after_death(how_it_ended(process.ended.result()))

    def _count_ended(self) -> None:
        """Keep what the worker counted, to the last token that it gave; nothing runs any more."""
        last = replace(self.stats, generated_tokens=self.stats.generated_tokens + self._uncounted_tokens)
        self.ended_stats = add_counters(self.ended_stats, last)
        self.stats, self._uncounted_tokens = EngineStats(), 0

    def _after_death(self, how: str) -> float | None:
        now_s = time.monotonic()
        was_ready_s, self._ready_s = self._ready_s, None
        self._kv_limit.worker_died()
        if was_ready_s is not None:
            self._open.crashed(self.name, how)
        if self.state is ModelState.ASLEEP:
            self._give_up(str(self._last_words or f"its worker {how} in its sleep"))
        if self.state not in (ModelState.LOADING, ModelState.READY) and not self._open:
            return None
        if was_ready_s is None and self._last_words is not None:
            self._give_up(str(self._last_words))
            return None
        ready_for_s = 0.0 if was_ready_s is None else now_s - was_ready_s
        delay_s = self._restart_rule.died(now_s, ready_for_s=ready_for_s)
        if delay_s is None:
            self._give_up(f"its worker keeps dying and is not restarted any more; the last {how}")
            return None
        logger.error(
            "The worker of %s %s; restarting it in %.0f s, %d requests wait.",
            self.name, how, delay_s, len(self._open),
        )  # fmt: skip
        self._set_loading(f"its worker {how}; restarting in {delay_s:.0f} s")
        return delay_s

    def _give_up(self, reason: str) -> None:
        logger.error("%s failed: %s", self.name, reason)
        self._set_state(ModelState.FAILED, reason)
        self._kv_limit.fail(ModelLoadError(f"{self.name} failed: {reason}"))
        self._open.fail_all(  # without the reason: it may name files, and this goes to clients
            ModelLoadError(
                f"The worker of {self.name} died while this request was aboard, and no other could be "
                "started. The model's state and the server's log say why."
            )
        )

    def _kill_if_beyond_hope(self, process: WorkerProcess) -> None:
        now_s = time.monotonic()
        self._stall_rule.observed(process.cpu_seconds(), now_s)
        if self._has_work and self._stall_rule.beyond_hope(now_s):
            logger.error(
                "The worker of %s has made no step for too long with work aboard; killing it.", self.name
            )
            process.kill()

    # ---- messages

    def _receive(self, message: Message) -> None:
        match message:
            case Events(events):
                self._stall_rule.moved(time.monotonic())
                for event in events:
                    self._uncounted_tokens += len(event.token_ids)
                    self._open.deliver(event)
            case Stats(stats, step_p99_s):
                self.stats, self._uncounted_tokens = stats, 0
                self._stall_rule.counted(stats.steps, step_p99_s, time.monotonic())
            case Progress(phase, fraction):
                self.progress = LoadProgress(phase, fraction)
                self.reason = phase
            case Ready(info):
                self._became_ready(info)
            case Failed(error):
                self._last_words = error
            case Slept(report):
                self._sleep_switch.answered(report)
            case Woke():
                self._sleep_switch.answered(SleepReport())
            case KvLimit(num_bytes):
                self._kv_limit.answered(num_bytes)
            case Pong():
                pass
            case _:
                raise FrameError(f"a server does not take {type(message).__name__} frames.")

    def _became_ready(self, info: EngineInfo) -> None:
        self._ready_s = time.monotonic()
        self.times.ready_s = self._ready_s - self._asked_s
        self._stall_rule = self._limits.stall_rule(self._ready_s)
        self.info = info
        self.progress = LoadProgress("ready", 1.0)
        logger.info("%s is ready after %.2f s.", self.name, self.times.ready_s)
        if self.state is ModelState.LOADING:
            self._set_state(ModelState.READY, None)
        self._kv_limit.worker_ready()
        self._resume()
        if self.state is ModelState.DRAINING:
            self._drain_if_ready()

    def _resume(self) -> None:
        """Hand what waited to the worker that is ready now."""
        waiting = self._open.resumed()
        for request in waiting:
            self._send_frame(encode(Submit(request)))
        self.num_resumed += len(waiting)
        if waiting:
            logger.info("%s resumes %d requests.", self.name, len(waiting))

    def _send_frame(self, frame: bytes) -> None:
        if self._process is not None:
            self._process.send_frame(frame)

    def _drain_if_ready(self) -> None:
        """Let the worker end after the requests aboard. One that is not ready would refuse those to come."""
        if self._ready_s is not None:
            self._send_frame(encode(Drain()))

    def _set_loading(self, reason: str) -> None:
        if self.state is not ModelState.DRAINING:
            self._set_state(ModelState.LOADING, reason)

    def _set_state(self, state: ModelState, reason: str | None) -> None:
        self.state, self.reason = state, reason
        self._settled.set()

    def _require_ready(self) -> None:
        match self.state:
            case ModelState.READY:
                return
            case ModelState.LOADING:
                raise OverloadedError(f"{self.name} is loading ({self.reason}). Try again in a few seconds.")
            case ModelState.DRAINING:
                raise OverloadedError("The server is shutting down. Try again later.", retry_after_s=5.0)
            case ModelState.ASLEEP:
                raise OverloadedError(f"{self.name} sleeps. Try again in a few seconds.")
            case _:
                raise ModelLoadError(f"{self.name} is {self.state}: {self.reason}")

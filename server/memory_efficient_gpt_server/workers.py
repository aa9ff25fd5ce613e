"""A model served by a worker process that is kept alive.

Purpose: requests to the worker, its events to whoever asked; states, sleep, shutdown.
Does not know: HTTP, text; when a worker is restarted or killed (worker_lives.py).
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
import logging
import time
from collections.abc import Callable
from dataclasses import replace

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.engine_info import EngineInfo, EngineStats, SleepReport
from memory_efficient_gpt.errors import (
    EngineFailedError,
    InvalidRequestError,
    ModelLoadError,
)
from memory_efficient_gpt.frames import (
    Abort,
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
from memory_efficient_gpt_server.errors import shutting_down
from memory_efficient_gpt_server.event_stream import EventStream
from memory_efficient_gpt_server.kv_limit import KvLimitCalls
from memory_efficient_gpt_server.model_states import LoadProgress, LoadTimes, refusal_in
from memory_efficient_gpt_server.model_states import ModelState as ModelState
from memory_efficient_gpt_server.open_requests import OpenRequest, OpenRequests
from memory_efficient_gpt_server.supervision import USUAL_LIMITS, RestartRule, WorkerLimits
from memory_efficient_gpt_server.worker_lives import WorkerLives
from memory_efficient_gpt_server.worker_process import WorkerProcess
from memory_efficient_gpt_server.worker_sleep import SleepSwitch

logger = logging.getLogger(__name__)


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
        self.num_resumed = 0
        self._log_level, self._log_json = log_level, log_json
        self._load = load
        self._open = OpenRequests(limits.resume_wait_s)
        self._sleep_switch = SleepSwitch()
        self._kv_limit = KvLimitCalls(lambda num_bytes: self._lives.send_frame(encode(SetKvLimit(num_bytes))))
        self._lives = WorkerLives(self.name, self._start_worker, self, restart_rule(), limits)
        self._settled = asyncio.Event()

    # ---- for those who serve requests

    @property
    def pid(self) -> int | None:
        """The worker's process id while it lives."""
        return self._lives.process.pid if self._lives.process is not None else None

    @property
    def times(self) -> LoadTimes:
        """How long the present worker's load took."""
        return self._lives.times

    @property
    def num_restarts(self) -> int:
        """Workers that followed a dead one."""
        return self._lives.num_restarts

    @property
    def num_open_requests(self) -> int:
        """Requests that have not ended; those that wait for the next worker too."""
        return len(self._open)

    @property
    def stalled(self) -> bool:
        """Whether the worker has work but its step counter has stood still for too long."""
        return self.has_work() and self._lives.stall_rule.stalled(time.monotonic())

    @property
    def ready(self) -> bool:
        """Whether a request submitted now would be computed."""
        return self.state is ModelState.READY and not self.stalled

    def submit(self, request: Request) -> EventStream:
        """Hand a request to the worker, or to the next one while a dead one is replaced. What is wrong with
        it comes as events with an error.

        Raises OverloadedError while it can't take any, ModelLoadError if it won't, InvalidRequestError.
        """
        replaced = self.state is ModelState.LOADING and self._open.wait_for_next
        if not replaced and (refusal := refusal_in(self.state, self.name, self.reason)) is not None:
            raise refusal
        if request.id in self._open:
            raise InvalidRequestError(f"Request id {request.id!r} is in use. Ids must be unique.", param="id")
        stream = EventStream(request.id, request.params.n, abandon=self.abort)
        opened = OpenRequest(request, stream)
        try:
            frame = encode(Submit(opened.request))
        except FrameError as error:
            raise InvalidRequestError(f"The request can't be handed to the model: {error}") from error
        if not self._open:
            self._lives.stall_rule.moved(time.monotonic())
        self._open.add(opened)
        if not replaced:  # else it goes with those that are resumed
            self._lives.send_frame(frame)
        return stream

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sequence of it, without further events. Unknown ids are fine."""
        if self._open.close(request_id, index) and self._lives.ready_s is not None:
            self._lives.send_frame(encode(Abort(request_id, index)))

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
        if self._lives.going_on:
            return
        self._set_state(ModelState.LOADING, "starting")
        self._lives.start()

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
        process = self._lives.process
        if not self.ready or self._open or process is None:
            raise EngineFailedError(f"{self.name} is {self.state} with {len(self._open)} requests aboard")
        self._set_state(ModelState.ASLEEP, None)
        return await self._sleep_switch.ask(process, Sleep(), self.info)

    async def wake(self) -> None:
        """Take requests again. Raises EngineFailedError as `sleep`."""
        process = self._lives.process
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
        if self._lives.begun and self._open and drain_s > 0:
            self._drain_if_ready()
            await self._lives.wait_end(drain_s)
        self._open.fail_all(shutting_down())
        await self._lives.end()
        self._count_ended()
        self._set_state(ModelState.CLOSED, "closed")
        self._kv_limit.fail(ModelLoadError(f"{self.name} is closed."))

    # ---- what its workers' lives tell (Supervised)

    def has_work(self) -> bool:
        """See Supervised."""
        return self._lives.ready_s is not None and len(self._open) > 0

    def worker_died(self, how: str, *, was_ready: bool) -> bool:
        """See Supervised. Its requests wait for the next one."""
        self._count_ended()
        self._kv_limit.worker_died()
        if was_ready:
            self._open.crashed(self.name, how)
            if self._open:
                logger.warning("%d requests of %s wait for its next worker.", len(self._open), self.name)
        if self.state is ModelState.ASLEEP:
            self.gave_up(str(self._lives.last_words or f"its worker {how} in its sleep"))
        return self.state in (ModelState.LOADING, ModelState.READY) or len(self._open) > 0

    def restarting(self, reason: str) -> None:
        """See Supervised."""
        if self.state is not ModelState.DRAINING:
            self._set_state(ModelState.LOADING, reason)

    def gave_up(self, reason: str) -> None:
        """See Supervised. Whoever waits gets an error."""
        logger.error("%s failed: %s", self.name, reason)
        self._set_state(ModelState.FAILED, reason)
        self._kv_limit.fail(ModelLoadError(f"{self.name} failed: {reason}"))
        self._open.fail_all(  # without the reason: it may name files, and this goes to clients
            ModelLoadError(
                f"The worker of {self.name} died while this request was aboard, and no other could be "
                "started. The model's state and the server's log say why."
            )
        )

    async def _start_worker(self, receive: Callable[[Message], None]) -> WorkerProcess:
        return await WorkerProcess.start(
            self.config, receive, log_level=self._log_level, log_json=self._log_json, load=self._load
        )

    def _count_ended(self) -> None:
        """Keep what the worker counted, to the last token that it gave; nothing runs any more."""
        last = replace(self.stats, generated_tokens=self.stats.generated_tokens + self._uncounted_tokens)
        self.ended_stats = add_counters(self.ended_stats, last)
        self.stats, self._uncounted_tokens = EngineStats(), 0

    # ---- messages

    def receive(self, message: Message) -> None:
        """See Supervised."""
        match message:
            case Events(events):
                self._lives.stall_rule.moved(time.monotonic())
                for event in events:
                    self._uncounted_tokens += len(event.token_ids)
                    self._open.deliver(event)
            case Stats(stats, step_p99_s):
                self.stats, self._uncounted_tokens = stats, 0
                self._lives.stall_rule.counted(stats.steps, step_p99_s, time.monotonic())
            case Progress(phase, fraction):
                self.progress = LoadProgress(phase, fraction)
                self.reason = phase
            case Ready(info):
                self._became_ready(info)
            case Failed(error):
                self._lives.last_words = error
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
        self._lives.became_ready()
        self.info = info
        self.progress = LoadProgress("ready", 1.0)
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
            self._lives.send_frame(encode(Submit(request)))
        self.num_resumed += len(waiting)
        if waiting:
            logger.info("%s resumes %d requests.", self.name, len(waiting))

    def _drain_if_ready(self) -> None:
        """Let the worker end after the requests aboard. One that is not ready would refuse those to come."""
        if self._lives.ready_s is not None:
            self._lives.send_frame(encode(Drain()))

    def _set_state(self, state: ModelState, reason: str | None) -> None:
        self.state, self.reason = state, reason
        self._settled.set()

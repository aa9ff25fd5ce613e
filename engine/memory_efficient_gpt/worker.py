"""The process around an Engine: frames in, token events out.

Purpose: the entry point of a worker process and its loop.
Does not know: HTTP, tokenizers, who started it; the engine only through `StepEngine`.
Invariant: nothing that the server does or fails to do makes a step wait: news is buffered, and past
`MAX_OUTBOX_BYTES` of unread news the engine pauses between steps. The process never outlives the server.

    +-> inbox: read what has come, without waiting  -- submit, abort, KV limit, drain, close, ping
    |   work and room in the outbox?  -> engine.step() -> one frame with all its events
    |   no work, and told to sleep or to wake -> do it
    |   otherwise                     -> wait for bytes to read, or for room to write
    +---+
"""

from __future__ import annotations

import logging
import math
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.engine_info import EngineInfo, EngineStats, SleepReport
from memory_efficient_gpt.errors import EngineFailedError, MegptError, ModelLoadError, OverloadedError
from memory_efficient_gpt.frames import (
    Abort,
    Close,
    Drain,
    Failed,
    KvLimit,
    Message,
    Ping,
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
    encode_events,
)
from memory_efficient_gpt.progress import PhaseClock
from memory_efficient_gpt.request import FinishReason, Request, SequenceEvent
from memory_efficient_gpt.wire import FrameError, unpack_record
from memory_efficient_gpt.worker_channel import ConnectionClosedError, FrameChannel
from memory_efficient_gpt.worker_process import configure_logging, detach_from_server

logger = logging.getLogger(__name__)

PRELOAD_ENVIRONMENT: Final = {"OMP_WAIT_POLICY": "PASSIVE", "OPENBLAS_NUM_THREADS": "1"}
"""Must be set before torch or numpy is loaded in the fork server. PASSIVE: threads of one worker that wait
don't burn the cores of another. OpenBLAS would start threads when loaded; nothing here uses it."""

MAX_OUTBOX_BYTES: Final = 4 << 20
STATS_INTERVAL_S: Final = 0.1
LAST_WORDS_S: Final = 2.0
STEP_TIMES_KEPT: Final = 512
MAX_CONSECUTIVE_OUT_OF_MEMORY: Final = 3

EXIT_CLOSED: Final = 0
EXIT_ENGINE_FAILED: Final = 70
EXIT_LOAD_FAILED: Final = 71
EXIT_BROKEN_FRAME: Final = 76

ProgressCallback = Callable[[str, float], None]


class StepEngine(Protocol):
    """What a worker needs of an engine. Owned by one thread."""

    @property
    def info(self) -> EngineInfo:
        """What was loaded."""

    @property
    def has_work(self) -> bool:
        """Whether `step` has anything to do."""

    def submit(self, request: Request) -> None:
        """Queue a request. Raises MegptError."""

    def abort(self, request_id: str, index: int | None = None) -> None:
        """End a request, or one sequence of it, and free its blocks now."""

    def step(self) -> list[SequenceEvent]:
        """Compute one step."""

    def stats(self) -> EngineStats:
        """Counters and present state."""

    def sleep(self) -> SleepReport:
        """Give memory back while there is no work. Any error leaves an engine that is to be ended."""

    def wake(self) -> None:
        """Take it back. Any error leaves an engine that is to be ended."""

    def set_kv_limit(self, num_bytes: int) -> int:
        """Let the KV cache have so many bytes; returns what it can hold now."""

    def close(self) -> None:
        """Drop all work."""


LoadEngine = Callable[[EngineConfig, ProgressCallback], StepEngine]


def load_engine(config: EngineConfig, progress: ProgressCallback) -> StepEngine:
    """Load the real engine. Raises ModelLoadError, ConfigError."""
    from memory_efficient_gpt.core import Engine

    return Engine.load(config, progress)


def run_worker(
    sock: socket.socket,
    config: Mapping[str, object],
    log_level: str = "INFO",
    log_json: bool = False,
    load: LoadEngine = load_engine,
) -> None:
    """Entry point of the forked process; ends it with an exit code.

    sock: this side of the connection to the server. config: an EngineConfig as `pack_record` gives it.
    log_json: whether log lines (to standard error) are JSON objects. load: called once with the config
    and a progress callback; tests give a fake.
    """
    configure_logging(log_level, as_json=log_json)
    signal.signal(signal.SIGTERM, _exit_on_signal)
    engine_config = unpack_record(EngineConfig, config)
    detach_from_server(sock, name=engine_config.model)
    channel = FrameChannel(sock)
    try:
        engine = _load(channel, engine_config, load)
        code = EXIT_LOAD_FAILED if engine is None else Worker(channel, engine).run()
    except ConnectionClosedError:
        code = EXIT_CLOSED
    except FrameError:
        logger.exception("The server sent a frame that can't be understood; the worker exits.")
        code = EXIT_BROKEN_FRAME
    raise SystemExit(code)


def _exit_on_signal(signum: int, _frame: object) -> None:
    """SIGTERM means close. Raising works in a load, a step and a wait alike; the server sees the end."""
    raise SystemExit(EXIT_CLOSED)


def _load(channel: FrameChannel, config: EngineConfig, load: LoadEngine) -> StepEngine | None:
    """The engine, once the server has been told; or None once it has been told why not."""

    started, clock = time.monotonic(), PhaseClock()

    def report(phase: str, fraction: float) -> None:
        clock.tell(phase)
        channel.send(encode(Progress(phase, fraction)))

    try:
        engine = load(config, report)
    except ConnectionClosedError:
        raise
    except Exception as error:
        if not isinstance(error, MegptError):
            logger.exception("Loading %s failed.", config.model)
            error = ModelLoadError(
                f"{config.model} could not be loaded: an unexpected {type(error).__name__}. "
                "The server's log has the details."
            )
        channel.send(encode(Failed(error)))
        channel.flush(timeout_s=LAST_WORDS_S)
        return None
    seconds = time.monotonic() - started
    logger.info("Loaded %s in %.2f s: %s.", config.model, seconds, clock.summary() or "no phases")
    channel.send(encode(Ready(engine.info)))
    return engine


class Worker:
    """The loop. One thread owns it, its channel and its engine."""

    def __init__(self, channel: FrameChannel, engine: StepEngine) -> None:
        self._channel = channel
        self._engine = engine
        self._open: dict[str, set[int]] = {}  # request id -> its sequences that have not ended
        self._draining = False
        self._closing = False
        self._wishes: deque[Sleep | Wake] = deque()
        self._step_times_s: deque[float] = deque(maxlen=STEP_TIMES_KEPT)
        self._stats_due_s = 0.0
        self._stats_stale = True
        self._times_out_of_memory = 0

    def run(self) -> int:
        """Serve until closed, drained or failed; returns the exit code.

        Raises ConnectionClosedError when the server is gone, FrameError when it makes no sense.
        """
        try:
            while not self._closing:
                for message in self._channel.receive():
                    self._handle(message)
                if not self._turn():
                    return EXIT_ENGINE_FAILED
        finally:
            self._engine.close()
        self._channel.flush(timeout_s=LAST_WORDS_S)
        return EXIT_CLOSED

    def _turn(self) -> bool:
        """One step, or one wait. False if the engine can't go on."""
        working = self._engine.has_work
        if working and self._channel.pending_bytes <= MAX_OUTBOX_BYTES:
            return self._step()
        if not working and self._wishes:
            return self._grant(self._wishes.popleft())
        if not working:
            self._report_stats(now=math.inf)
            if self._draining:
                self._closing = True
        if not self._closing:
            self._channel.wait()
        return True

    def _handle(self, message: Message) -> None:
        match message:
            case Submit(request):
                self._submit(request)
            case Abort(request_id, index):
                self._engine.abort(request_id, index)
                self._ended(request_id, index)
                self._stats_stale, self._stats_due_s = True, 0.0
            case Ping(nonce):
                self._channel.send(encode(Pong(nonce)))
            case SetKvLimit(num_bytes):
                self._channel.send(encode(KvLimit(self._engine.set_kv_limit(num_bytes))))
                self._stats_stale, self._stats_due_s = True, 0.0
            case Drain():
                self._draining = True
            case Close():
                self._closing = True
            case Sleep() | Wake():
                self._wishes.append(message)
            case _:
                raise FrameError(f"a worker does not take {type(message).__name__} frames.")

    def _submit(self, request: Request) -> None:
        error: MegptError
        try:
            if self._draining:
                raise OverloadedError("The model is being shut down. Try again later.")
            self._engine.submit(request)
            self._open[request.id] = set(request.open_indices)
            return
        except MegptError as refusal:
            error = refusal
        except Exception:
            logger.exception("Submitting request %s failed.", request.id)
            error = EngineFailedError(
                "The request could not be started: an internal error. It has been logged."
            )
        self._send_events([_error_event(request.id, index, error) for index in request.open_indices])

    def _step(self) -> bool:
        started = time.monotonic()
        try:
            events = self._engine.step()
        except Exception as error:  # noqa: BLE001 - the boundary: _survive logs it and tells those aboard
            return self._survive(error)
        ended = time.monotonic()
        self._times_out_of_memory = 0
        self._step_times_s.append(ended - started)
        self._stats_stale = True
        for event in events:
            if event.finish_reason is not None:
                self._ended(event.request_id, event.index)
        if events:
            self._send_events(events)
        self._report_stats(now=ended)
        return True

    def _grant(self, wish: Sleep | Wake) -> bool:
        """Sleep or wake, and say so. False if it failed: the engine may be half of each."""
        try:
            if isinstance(wish, Sleep):
                self._channel.send(encode(Slept(self._engine.sleep())))
            else:
                self._engine.wake()
                self._channel.send(encode(Woke()))
        except ConnectionClosedError:
            raise
        except Exception as error:
            logger.exception("The model could not %s; the worker exits.", type(wish).__name__.lower())
            why = str(error) if isinstance(error, MegptError) else type(error).__name__
            self._channel.send(
                encode(Failed(EngineFailedError(f"it could not {type(wish).__name__.lower()} ({why})")))
            )
            self._channel.flush(timeout_s=LAST_WORDS_S)
            return False
        self._stats_stale, self._stats_due_s = True, 0.0
        return True

    def _survive(self, error: Exception) -> bool:
        """After a failed step: say whether the engine can go on.

        An allocator that is out of memory leaves the device usable, so only the requests are lost: again
        they would need as much. Any other error may have left it in an unknown state (a CUDA error is
        sticky): the process must end, and what is aboard is left to its successor.
        """
        self._times_out_of_memory += 1
        out_of_memory = _out_of_memory(error)
        recoverable = out_of_memory and self._times_out_of_memory < MAX_CONSECUTIVE_OUT_OF_MEMORY
        logger.error(
            "A step failed with %d requests aboard; %s.",
            len(self._open),
            "out of memory, going on without them" if recoverable else "the worker exits",
            exc_info=error,
        )
        reason = EngineFailedError(
            "The device ran out of memory. Send fewer or shorter requests at a time."
            if out_of_memory
            else "The engine failed while computing this request. Try again."
        )
        if out_of_memory:
            self._fail_open_requests(reason)
        if not recoverable:
            self._channel.send(encode(Failed(reason)))
            self._channel.flush(timeout_s=LAST_WORDS_S)
        return recoverable

    def _fail_open_requests(self, reason: MegptError) -> None:
        lost, self._open = self._open, {}
        self._send_events(
            [
                _error_event(request_id, index, reason)
                for request_id, indices in lost.items()
                for index in sorted(indices)
            ]
        )
        for request_id in lost:
            self._engine.abort(request_id)

    def _ended(self, request_id: str, index: int | None) -> None:
        still_open = self._open.get(request_id, set())
        still_open.discard(index) if index is not None else still_open.clear()
        if not still_open:
            self._open.pop(request_id, None)

    def _send_events(self, events: list[SequenceEvent]) -> None:
        for frame in encode_events(events):
            self._channel.send(frame)

    def _report_stats(self, now: float) -> None:
        """Send counters if they have changed: at most every STATS_INTERVAL_S, at once when going idle."""
        if self._stats_stale and now >= self._stats_due_s:
            self._channel.send(encode(Stats(self._engine.stats(), self._step_p99_s())))
            self._stats_stale = False
            self._stats_due_s = time.monotonic() + STATS_INTERVAL_S

    def _step_p99_s(self) -> float:
        times = sorted(self._step_times_s)
        return times[int(len(times) * 0.99)] if times else 0.0


def _error_event(request_id: str, index: int, error: MegptError) -> SequenceEvent:
    return SequenceEvent(request_id=request_id, index=index, finish_reason=FinishReason.ERROR, error=error)


def _out_of_memory(error: BaseException) -> bool:
    """Whether an allocator refused: Python's, torch's on a GPU, or torch's on the host (a RuntimeError)."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))
    )

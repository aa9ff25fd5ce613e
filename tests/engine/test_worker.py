"""The worker's loop around a scripted engine, in a thread; processes are tested in tests/server."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TypeVar

import pytest

from memory_efficient_gpt import worker as worker_module
from memory_efficient_gpt.engine_info import EngineStats, SleepReport
from memory_efficient_gpt.errors import EngineFailedError, InvalidRequestError, OverloadedError
from memory_efficient_gpt.frames import (
    Abort,
    Close,
    Drain,
    Events,
    Failed,
    FrameDecoder,
    KvLimit,
    Message,
    Ping,
    Pong,
    SetKvLimit,
    Sleep,
    Slept,
    Stats,
    Submit,
    Wake,
    Woke,
    encode,
)
from memory_efficient_gpt.request import FinishReason, Request, SequenceEvent
from memory_efficient_gpt.wire import FrameError
from memory_efficient_gpt.worker import EXIT_CLOSED, EXIT_ENGINE_FAILED, Worker
from memory_efficient_gpt.worker_channel import ConnectionClosedError, FrameChannel
from tests.engine.scripted_engine import (
    COUNT,
    FAIL,
    OUT_OF_MEMORY,
    REFUSE,
    SUBMIT_BUG,
    ScriptedEngine,
    request,
)

_Kind = TypeVar("_Kind", bound=Message)


class Server:
    """The other end of a worker's socket, and the thread the worker runs in."""

    def __init__(self, engine: ScriptedEngine) -> None:
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(5)
        self.engine = engine
        self.outcome: int | Exception | None = None
        self._decoder = FrameDecoder()
        self._messages: list[Message] = []
        self.passed: list[Message] = []
        self._theirs = theirs
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.outcome = Worker(FrameChannel(self._theirs), self.engine).run()
        except (ConnectionClosedError, FrameError) as error:
            self.outcome = error
        self._theirs.close()

    def send(self, *messages: Message) -> None:
        self.sock.sendall(b"".join(map(encode, messages)))

    def next(self, kind: type[_Kind], where: Callable[[_Kind], bool] = lambda _: True) -> _Kind:
        """The next message of that kind; what comes before it goes to `passed`."""
        while True:
            while self._messages:
                message = self._messages.pop(0)
                if isinstance(message, kind) and where(message):
                    return message
                self.passed.append(message)
            data = self.sock.recv(1 << 16)
            assert data, f"the worker ended ({self.outcome!r}) before it sent {kind.__name__}"
            self._messages += self._decoder.feed(data)

    def events_until_end(self, request_id: str = "r", sequences: int = 1) -> list[SequenceEvent]:
        got: list[SequenceEvent] = []
        while sum(event.finish_reason is not None for event in got) < sequences:
            got += [event for event in self.next(Events).events if event.request_id == request_id]
        return got

    def join(self) -> int | Exception | None:
        self.thread.join(5)
        assert not self.thread.is_alive()
        return self.outcome


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(ScriptedEngine())
    yield server
    with contextlib.suppress(OSError):
        server.send(Close())
    server.sock.close()
    server.join()


def test_a_request_is_answered_token_by_token(server: Server) -> None:
    server.send(Submit(request(COUNT, max_tokens=4)))
    events = server.events_until_end()
    assert [event.token_ids for event in events] == [[0], [1], [2], [3]]
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_all_events_of_a_step_share_a_frame(server: Server) -> None:
    server.send(Submit(request(COUNT, max_tokens=3, n=4)))
    assert [len(server.next(Events).events) for _ in range(3)] == [4, 4, 4]


def test_stats_come_when_work_ends_and_then_no_more(server: Server) -> None:
    server.send(Submit(request(COUNT, max_tokens=3)))
    server.events_until_end()
    idle = server.next(Stats, lambda m: m.stats.num_running == 0)
    assert (idle.stats.steps, idle.stats.generated_tokens) == (3, 3)
    server.sock.settimeout(0.3)
    with pytest.raises(TimeoutError):
        server.next(Stats)


def test_stats_come_at_most_ten_times_a_second_while_working(server: Server) -> None:
    server.send(Submit(request(COUNT, delay_ms=5, max_tokens=100_000)))
    server.next(Stats, lambda m: m.stats.num_running == 1)
    started, seen = time.monotonic(), 0
    while time.monotonic() - started < 0.55:
        server.next(Stats)
        seen += 1
    assert 2 <= seen <= 7


def test_step_times_are_told_for_the_stall_rule(server: Server) -> None:
    server.send(Submit(request(COUNT, delay_ms=20, max_tokens=3)))
    server.events_until_end()
    assert 0.02 <= server.next(Stats, lambda m: m.stats.num_running == 0).step_p99_s < 1


def test_abort_frees_at_once_and_says_so(server: Server) -> None:
    seconds = []
    for _ in range(3):  # other programs share the machine
        server.send(Submit(request(COUNT, delay_ms=1, max_tokens=100_000)))
        server.next(Stats, lambda m: m.stats.num_free_blocks == 90)
        aborted = time.monotonic()
        server.send(Abort("r"))
        server.next(Stats, lambda m: m.stats.num_free_blocks == 100)
        seconds.append(time.monotonic() - aborted)
    assert min(seconds) < 0.1, seconds


def test_aborting_one_sequence_leaves_the_others(server: Server) -> None:
    server.send(Submit(request(COUNT, delay_ms=1, max_tokens=500, n=2)))
    server.next(Events)
    server.send(Abort("r", 0), Abort("unknown"), Abort("unknown", 3))
    assert {event.index for event in server.events_until_end()[-50:]} == {1}


def test_a_refused_request_gets_the_error_for_each_sequence(server: Server) -> None:
    server.send(Submit(request(REFUSE, n=2)))
    events = server.events_until_end(sequences=2)
    assert [event.index for event in events] == [0, 1]
    assert all(isinstance(event.error, InvalidRequestError) and event.error.param for event in events)


def test_a_bug_in_submit_costs_one_request_and_tells_nothing(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.send(Submit(request(SUBMIT_BUG)))
    (event,) = server.events_until_end()
    assert isinstance(event.error, EngineFailedError)
    assert "secret" not in str(event.error)
    assert "secret" in caplog.text
    server.send(Submit(request(COUNT, request_id="next")))
    assert server.events_until_end("next")[-1].finish_reason is FinishReason.LENGTH


def test_out_of_memory_fails_what_is_aboard_and_the_worker_goes_on(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.send(Submit(request(OUT_OF_MEMORY, n=2)))
    events = server.events_until_end(sequences=2)
    assert all("ran out of memory" in str(event.error) for event in events)
    server.send(Submit(request(COUNT, request_id="next")))
    assert server.events_until_end("next")[-1].finish_reason is FinishReason.LENGTH
    assert "out of memory, going on" in caplog.text


def test_each_sequence_of_a_failed_request_ends_once(server: Server) -> None:
    """One of three was aborted before the failure: the error goes to the two others, whichever they are."""
    server.send(Submit(request(COUNT, request_id="three", delay_ms=1, max_tokens=10**6, n=3)))
    server.next(Events)
    server.send(Abort("three", 0))
    server.send(Submit(request(OUT_OF_MEMORY, request_id="oom")))
    ended = [e for e in server.events_until_end("three", sequences=2) if e.finish_reason is not None]
    assert [event.index for event in ended] == [1, 2]
    server.send(Submit(request(COUNT, request_id="next")))
    assert server.events_until_end("next")[-1].finish_reason is FinishReason.LENGTH


def test_out_of_memory_again_and_again_ends_the_worker(server: Server) -> None:
    for attempt in range(worker_module.MAX_CONSECUTIVE_OUT_OF_MEMORY):
        server.send(Submit(request(OUT_OF_MEMORY, request_id=str(attempt))))
        server.events_until_end(str(attempt))
    assert server.join() == EXIT_ENGINE_FAILED


def test_a_failed_step_ends_the_worker_and_no_request(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """Another worker may go on with what was aboard, so nothing is said about it."""
    server.send(Submit(request(COUNT, request_id="bystander", max_tokens=10**6)))
    server.next(Events)
    server.send(Submit(request(FAIL)))
    failed = server.next(Failed)
    told = [event for message in server.passed if isinstance(message, Events) for event in message.events]
    assert all(event.finish_reason is None for event in told)
    assert "secret" not in str(failed.error)
    assert "secret detail" in caplog.text
    assert server.join() == EXIT_ENGINE_FAILED
    assert server.engine.closed


def test_drain_finishes_what_is_aboard_and_refuses_the_rest(server: Server) -> None:
    server.send(
        Submit(request(COUNT, delay_ms=5, max_tokens=20)), Drain(), Submit(request(COUNT, request_id="late"))
    )
    (late,) = server.events_until_end("late")
    assert isinstance(late.error, OverloadedError)
    assert server.events_until_end()[-1].finish_reason is FinishReason.LENGTH
    assert server.join() == EXIT_CLOSED


def test_close_ends_the_worker_at_once(server: Server) -> None:
    server.send(Submit(request(COUNT, delay_ms=1, max_tokens=10**6)))
    server.next(Events)
    server.send(Close())
    assert server.join() == EXIT_CLOSED
    assert server.engine.closed


def test_sleep_waits_for_what_is_aboard_and_requests_come_again_after_wake(server: Server) -> None:
    server.send(Submit(request(COUNT, delay_ms=2, max_tokens=20)), Sleep())
    assert server.events_until_end()[-1].finish_reason is FinishReason.LENGTH
    assert server.next(Slept).report == SleepReport(kv_bytes=1, parked_bytes=1, device_bytes=3)
    assert not [m for m in server.passed if isinstance(m, Slept)] and server.engine.asleep
    server.send(Ping(1), Wake())
    assert server.next(Pong).nonce == 1, "it listens in its sleep"
    server.next(Woke)
    server.send(Submit(request(COUNT, request_id="next")))
    assert server.events_until_end("next")[-1].finish_reason is FinishReason.LENGTH


@pytest.mark.parametrize("wish", ["sleep", "wake"])
def test_a_failed_sleep_or_wake_ends_the_worker(
    wish: str, server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    server.engine.info = replace(server.engine.info, model=f"fails {wish}")
    server.send(Sleep(), Wake())
    failed = server.next(Failed)
    assert f"could not {wish} (MemoryError)" in str(failed.error) and "secret" not in str(failed.error)
    assert "secret detail" in caplog.text
    assert server.join() == EXIT_ENGINE_FAILED and server.engine.closed


def test_a_sleeping_worker_is_closed_at_once(server: Server) -> None:
    server.send(Sleep())
    server.next(Slept)
    server.send(Close())
    assert server.join() == EXIT_CLOSED


def test_ping_is_answered_at_work_and_at_rest(server: Server) -> None:
    server.send(Ping(1))
    assert server.next(Pong).nonce == 1
    server.send(Submit(request(COUNT, delay_ms=1, max_tokens=10**6)), Ping(2))
    assert server.next(Pong).nonce == 2


def test_kv_limits_are_set_between_steps_and_answered_in_order(server: Server) -> None:
    server.send(Submit(request(COUNT, delay_ms=1, max_tokens=10**6)), SetKvLimit(5000), SetKvLimit(1))
    assert [server.next(KvLimit).num_bytes for _ in range(2)] == [5000, 1000]
    assert server.engine.kv_limits == [5000, 1]
    server.next(Stats, lambda s: s.stats.num_kv_blocks == 1)


def test_an_idle_worker_tells_its_new_kv_limit(server: Server) -> None:
    server.next(Stats)
    server.send(SetKvLimit(7000))
    assert server.next(KvLimit).num_bytes == 7000
    assert server.next(Stats).stats.num_kv_blocks == 7000


def test_the_end_of_the_server_ends_the_worker(server: Server) -> None:
    server.send(Submit(request(COUNT, max_tokens=10**6)))
    server.next(Events)
    server.sock.close()
    assert isinstance(server.join(), ConnectionClosedError)
    assert server.engine.closed


@pytest.mark.parametrize("frame", [b"\xff\xff\xff\xff", b"\x00\x00\x00\x01\xc1", encode(Pong(1))])
def test_a_frame_that_makes_no_sense_ends_the_worker(server: Server, frame: bytes) -> None:
    server.sock.sendall(frame)
    assert isinstance(server.join(), FrameError)


def test_a_server_that_stops_reading_pauses_the_engine_but_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, server: Server
) -> None:
    monkeypatch.setattr(worker_module, "MAX_OUTBOX_BYTES", 1 << 16)
    many = [request(COUNT, request_id=f"{i:0200}", max_tokens=400) for i in range(20)]
    server.send(*map(Submit, many))
    steps = _steps_once_still(server.engine.counters)
    assert steps < 400
    server.sock.settimeout(10)
    tokens: dict[str, list[int]] = {r.id: [] for r in many}
    while any(len(got) < 400 for got in tokens.values()):
        for event in server.next(Events).events:
            tokens[event.request_id] += event.token_ids
    assert all(got == list(range(400)) for got in tokens.values())


def test_a_paused_engine_still_hears_an_abort(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    monkeypatch.setattr(worker_module, "MAX_OUTBOX_BYTES", 1 << 14)
    server.send(*(Submit(request(COUNT, request_id=f"r{i}", max_tokens=10**6)) for i in range(20)))
    _steps_once_still(server.engine.counters)
    server.send(*(Abort(f"r{i}") for i in range(20)))
    _wait_until(lambda: not server.engine.has_work)


def _steps_once_still(counters: EngineStats) -> int:
    while True:
        before = counters.steps
        time.sleep(0.2)
        if counters.steps == before > 0:
            return before


def _wait_until(condition: Callable[[], bool], timeout_s: float = 5) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_requests_reach_the_engine_unchanged(server: Server) -> None:
    sent = Request(
        id="whole", prompt_token_ids=(COUNT, 0, 7), client="c", cache_salt="s", use_prefix_cache=False
    )
    server.send(Submit(sent), Ping(1))
    server.next(Pong)
    assert server.engine.requests["whole"] == sent

"""What happens between a request and its end: disconnects, silence, slow readers, failures, shutdown."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from memory_efficient_gpt.errors import EngineFailedError, MegptError, SamplingFailedError
from memory_efficient_gpt.request import Request
from tests.server.conftest import ANSWER, LiveServer, Serve
from tests.server.scripted_model import ScriptedEngine
from tests.server.test_bad_requests import assert_error

SLOW = 0.02
BODY: dict[str, Any] = {"model": "demo", "prompt": "a", "max_tokens": 200}
CHAT_BODY: dict[str, Any] = {"model": "demo", "messages": [{"role": "user", "content": "a"}]}


def wait_until(condition: Callable[[], bool], timeout_s: float = 3.0) -> float:
    """Seconds until `condition` holds."""
    started = time.perf_counter()
    while not condition():
        assert time.perf_counter() - started < timeout_s, "it never happened"
        time.sleep(0.002)
    return time.perf_counter() - started


def send(live: LiveServer, body: dict[str, Any], path: str = "/v1/completions") -> socket.socket:
    """A raw connection on which `body` has been posted."""
    payload = json.dumps(body).encode()
    connection = socket.create_connection((live.host, live.port), timeout=10)
    head = (
        f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(payload)}"
    )
    connection.sendall(head.encode() + b"\r\n\r\n" + payload)
    return connection


def events_of(text: str) -> list[str]:
    """The data of a stream's events, comments left out."""
    assert text.endswith("\n\n")
    return [part.removeprefix("data: ") for part in text[:-2].split("\n\n") if not part.startswith(":")]


def test_the_stream_has_the_right_bytes(live: LiveServer) -> None:
    with live.client() as client:
        response = client.post("/v1/completions", json={**BODY, "stream": True})
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache" and response.headers["x-accel-buffering"] == "no"
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    first, last = json.loads(chunks[0]), json.loads(chunks[-1])
    assert set(first) == {"id", "object", "created", "model", "system_fingerprint", "choices"}
    assert last["choices"] == [{"text": "", "index": 0, "logprobs": None, "finish_reason": "stop"}]


@pytest.mark.parametrize(
    "text", ['quote " backslash \\ newline \n tab \t', "naïve 日本語 🎉 \u2028 \x7f", "a" * 500]
)
def test_any_text_survives_the_stream(serve: Serve, tokenizer: Any, text: str) -> None:
    with serve(ScriptedEngine(list(tokenizer.encode(text)))) as live:
        stream = live.openai().completions.create(model="demo", prompt="a", max_tokens=500, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == text


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
def test_a_client_that_leaves_is_aborted_at_once(
    serve: Serve, answer_ids: list[int], stream: bool, n: int
) -> None:
    with serve(ScriptedEngine(answer_ids * 20, step_s=SLOW)) as live:
        connection = send(live, {**BODY, "stream": stream, "n": n, "prompt": ["a", "b"]})
        wait_until(lambda: live.engine.num_running == 2)
        time.sleep(0.1)
        connection.close()
        assert wait_until(lambda: live.engine.num_running == 0) < 0.1
        wait_until(lambda: live.server.lifecycle.num_running == 0)
        assert live.server.admission.sequences == live.server.admission.tokens == 0


def test_a_client_that_leaves_before_the_first_token_is_aborted(serve: Serve, answer_ids: list[int]) -> None:
    with serve(ScriptedEngine(answer_ids, step_s=30)) as live:
        connection = send(live, {**BODY, "stream": True})
        wait_until(lambda: live.engine.num_running == 1)
        connection.close()
        assert wait_until(lambda: live.engine.num_running == 0) < 0.1


def test_silence_is_filled_with_comments(serve: Serve, answer_ids: list[int]) -> None:
    with serve(ScriptedEngine(answer_ids[:2], step_s=0.5), keepalive_s=0.1) as live, live.client() as client:
        response = client.post("/v1/completions", json={**BODY, "stream": True})
        assert response.text.startswith(": ping\n\n") and response.text.count(": ping\n\n") >= 6
        assert events_of(response.text)[-1] == "[DONE]"


def test_a_reader_that_stops_is_aborted_and_holds_up_nobody(serve: Serve, answer_ids: list[int]) -> None:
    engine = ScriptedEngine(answer_ids * 10_000, step_s=0.0)
    assert engine.info is not None
    with serve(engine, stream_stall_s=0.4) as live:
        live.engine.before_token = lambda request, count: None
        with socket.socket() as parked:
            parked.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            parked.connect((live.host, live.port))
            body = {**BODY, "max_tokens": 480, "n": 8, "stream": True, "logprobs": 20}
            payload = json.dumps(body).encode()
            head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            parked.sendall(f"{head}Content-Length: {len(payload)}\r\n\r\n".encode() + payload)
            wait_until(lambda: live.server.lifecycle.num_running == 1)
            quick = live.openai().completions.create(model="demo", prompt="a", max_tokens=5)
            assert quick.choices[0].finish_reason == "length"
            wait_until(lambda: live.server.lifecycle.num_running == 0, 5)
        assert live.server.admission.sequences == 0


def fail_at(token: int, error: MegptError) -> Callable[[Request, int], MegptError | None]:
    return lambda request, count: error if count == token else None


def test_an_error_in_a_stream_is_its_last_event(serve: Serve, answer_ids: list[int]) -> None:
    engine = ScriptedEngine(answer_ids, before_token=fail_at(5, EngineFailedError("It died. Retry.")))
    with serve(engine) as live, live.client() as client:
        response = client.post("/v1/chat/completions", json={**CHAT_BODY, "stream": True})
        *chunks, last = events_of(response.text)
        kind = "service_unavailable_error"
        error = {"message": "It died. Retry.", "type": kind, "param": None, "code": "engine_failed"}
        assert response.status_code == 200 and json.loads(last) == {"error": error}
        assert len(chunks) >= 4 and "[DONE]" not in response.text
        assert live.server.admission.sequences == 0


@pytest.mark.parametrize("stream", [True, False])
def test_an_error_before_the_first_token_is_a_status(
    serve: Serve, answer_ids: list[int], stream: bool
) -> None:
    engine = ScriptedEngine(answer_ids, before_token=fail_at(0, SamplingFailedError("No usable logits.")))
    with serve(engine) as live, live.client() as client:
        response = client.post("/v1/completions", json={**BODY, "stream": stream, "n": 2})
        assert_error(response, 500, code="sampling_failed")


def test_an_unexpected_error_tells_only_its_id(
    serve: Serve, answer_ids: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    engine = ScriptedEngine(answer_ids, refuse_with=KeyError("/secret/path"))  # type: ignore[arg-type]  # a bug
    with serve(engine) as live, live.client() as client:
        for stream in (True, False):
            response = client.post(
                "/v1/completions", json={**BODY, "stream": stream}, headers={"x-request-id": "my-id.1"}
            )
            message = assert_error(response, 500, code="internal_error", param=None)
            assert "my-id.1" in message and "secret" not in response.text
            assert response.headers["x-request-id"] == "my-id.1"
    assert "/secret/path" in caplog.text


def test_requests_that_take_too_long_end_with_504(serve: Serve, answer_ids: list[int]) -> None:
    with (
        serve(ScriptedEngine(answer_ids, step_s=0.05), request_timeout_s=0.3) as live,
        live.client() as client,
    ):
        assert_error(client.post("/v1/completions", json=BODY), 504, code="request_timeout")
        response = client.post("/v1/completions", json={**BODY, "stream": True})
        assert json.loads(events_of(response.text)[-1])["error"]["code"] == "request_timeout"
        assert live.engine.num_running == 0


def test_first_tokens_are_sent_at_once(serve: Serve, answer_ids: list[int]) -> None:
    with serve(ScriptedEngine(answer_ids, step_s=0.1)) as live:
        started = time.perf_counter()
        stream = live.openai().completions.create(model="demo", prompt="a", max_tokens=10, stream=True)
        next(iter(stream))
        assert time.perf_counter() - started < 0.4  # the whole answer takes 1.0
        stream.close()


def in_background(function: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    return thread, results


def test_draining_finishes_what_runs_and_refuses_the_rest(serve: Serve, answer_ids: list[int]) -> None:
    with serve(ScriptedEngine(answer_ids, step_s=SLOW)) as live, live.client() as client:
        thread, results = in_background(lambda: client.post("/v1/completions", json={**BODY, "stream": True}))
        wait_until(lambda: live.engine.num_running == 1)
        drained = asyncio.run_coroutine_threadsafe(live.server.lifecycle.drained(5), live.loop)
        wait_until(lambda: live.server.lifecycle.draining)
        with live.client() as other:
            response = other.post("/v1/completions", json=BODY)
            assert_error(response, 503, code="draining")
            assert other.get("/readyz").status_code == 503 and other.get("/livez").status_code == 200
        assert drained.result(6) is True
        thread.join()
        assert events_of(results[0].text)[-1] == "[DONE]"


def test_draining_ends_what_takes_too_long_with_an_error(serve: Serve, answer_ids: list[int]) -> None:
    with serve(ScriptedEngine(answer_ids * 20, step_s=SLOW)) as live, live.client() as client:
        bodies = [{**BODY, "stream": True}, BODY]
        running = [in_background(lambda b=body: client.post("/v1/completions", json=b)) for body in bodies]  # type: ignore[misc]  # b is a default
        wait_until(lambda: live.engine.num_running == 2)
        time.sleep(0.2)
        drained = asyncio.run_coroutine_threadsafe(live.server.lifecycle.drained(0.1), live.loop)
        assert drained.result(5) is False
        for thread, _ in running:
            thread.join()
        streamed, plain = running[0][1][0], running[1][1][0]
        assert json.loads(events_of(streamed.text)[-1])["error"]["code"] == "draining"
        assert_error(plain, 503, code="draining")
        assert live.engine.num_running == 0


def test_long_texts_do_not_hold_up_the_event_loop(live: LiveServer) -> None:
    text = "The old house stood. " * 60_000
    with live.client() as client, live.client() as other:
        thread, results = in_background(
            lambda: client.post("/v1/tokenize", json={"model": "demo", "prompt": text})
        )
        slowest = 0.0
        while thread.is_alive():
            started = time.perf_counter()
            assert other.get("/livez").status_code == 200
            slowest = max(slowest, time.perf_counter() - started)
        assert results[0].json()["count"] > 100_000
    assert slowest < 0.3


def test_many_streams_share_writes_and_lose_nothing(serve: Serve, answer_ids: list[int]) -> None:
    def num_events(interval_s: float) -> int:
        with serve(ScriptedEngine(answer_ids, step_s=0.01), stream_interval_s=interval_s) as live:
            connections = [send(live, {**BODY, "stream": True}) for _ in range(12)]
            bodies = []
            for connection in connections:
                received = b""
                while not received.endswith(b"0\r\n\r\n"):
                    received += connection.recv(65536)
                connection.close()
                bodies.append(received.count(b'"text"'))
                text = "".join(
                    json.loads(line[6:])["choices"][0]["text"]
                    for line in received.decode().splitlines()
                    if line.startswith("data: {")
                )
                assert text == ANSWER
            return max(bodies)

    assert num_events(0.1) < num_events(0.0) / 2

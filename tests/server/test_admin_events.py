"""GET /admin/events over a real connection: what is told, resuming, slow readers, the server's end."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from memory_efficient_gpt_server.registry.happenings import Happening, HappeningKind
from memory_efficient_gpt_server.registry.journal import Journal
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import ADMIN, Stage, Start
from tests.server.test_bad_requests import assert_error

Blocks = Iterator[dict[str, str]]


def blocks(lines: Iterator[str]) -> Blocks:
    """Events and comments as they come; a comment is {"": text}."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line:
            yield fields
            fields = {}
            continue
        name, _, value = line.partition(":")
        assert name in ("id", "event", "data", "retry", ""), line
        fields[name] = value.removeprefix(" ")


@contextlib.contextmanager
def reading(s: Stage, after: str | None = None) -> Iterator[tuple[httpx.Response, Blocks]]:
    headers = {} if after is None else {"last-event-id": after}
    with s.client.stream("GET", "/admin/events", headers=headers) as response:
        assert response.status_code == 200
        found = blocks(response.iter_lines())
        assert next(found) == {"retry": "2000", "": "events follow"}
        yield response, found


def until(found: Blocks, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """The data of all events up to the one that is wanted."""
    seen = []
    for block in found:
        if "data" in block:
            seen.append(json.loads(block["data"]) | {"id": block.get("id")})
            assert block["event"] == seen[-1].get("kind", block["event"])
            if wanted(seen[-1]):
                return seen
    raise AssertionError(f"the stream ended after {seen}")


def note(s: Stage, *numbers: int, padding: str = "") -> None:
    """Happenings of no meaning."""
    told = [Happening(HappeningKind.STATE, {"n": n, "padding": padding}) for n in numbers]
    s.live.call(lambda: s.registry.journal.add(told))


def test_a_models_life_is_told_as_it_happens(stage: Start) -> None:
    host = FakeHost()
    host.held = {"B"}
    with stage(host) as s, ThreadPoolExecutor() as pool, reading(s) as (response, found):
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["x-accel-buffering"] == "no"
        before_s = time.time()
        s.ask("A")
        seen = until(found, lambda e: e.get("to") == "ready")
        assert [(e["kind"], e["model"]) for e in seen] == [("state", "A"), ("load", "A"), ("state", "A")]
        assert seen[1]["result"] == "success" and 0 <= seen[1]["seconds"] < 5
        assert all(before_s - 1 <= e["time"] <= time.time() + 1 for e in seen)

        waiting = pool.submit(s.ask, "B")  # A has to leave for it
        seen = until(found, lambda e: (e.get("model"), e.get("to")) == ("B", "loading"))
        (eviction,) = [e for e in seen if e["kind"] == "eviction"]
        assert (eviction["model"], eviction["reason"], eviction["held_bytes"]) == ("A", "budget", {"cpu": 60})
        s.finish_load("B")
        assert waiting.result(5).status_code == 200


def test_operations_budgets_and_models_are_told(stage: Start) -> None:
    with stage() as s, reading(s) as (_, found):
        operation = s.client.post("/admin/models/A/load", json={"wait": True}).json()["operation"]
        seen = until(found, lambda e: e["kind"] == "operation" and e["state"] == "done")
        assert {e["operation"] for e in seen if e["kind"] == "operation"} == {operation["id"]}
        s.client.patch("/admin/memory", json={"device": "cpu", "budget_bytes": 90})
        assert until(found, lambda e: e["kind"] == "budget")[-1]["budget_bytes"] == 90
        s.client.patch("/admin/models/A", json={"pinned": True})
        assert until(found, lambda e: e["kind"] == "model")[-1]["settings"] == {"pinned": True}
        assert s.ask("B").status_code == 507
        refused = until(found, lambda e: e["kind"] == "refusal")[-1]
        assert (refused["model"], refused["code"], refused["requests"]) == ("B", "insufficient_memory", 1)


def test_last_event_id_goes_on_where_the_reader_was(stage: Start) -> None:
    with stage() as s:
        with reading(s) as (_, found):
            note(s, 1, 2)
            first = until(found, lambda e: e["n"] == 1)[-1]
        note(s, 3)
        with reading(s, after=first["id"]) as (_, found):
            seen = until(found, lambda e: e["n"] == 3)
        assert [e["n"] for e in seen] == [2, 3]
        with reading(s) as (_, found):  # without an id only what is new
            note(s, 4)
            assert [e["n"] for e in until(found, lambda e: e["n"] == 4)] == [4]


def test_what_is_lost_is_said(stage: Start) -> None:
    with stage() as s:
        s.registry.journal = Journal(most_entries=3)
        note(s, *range(10))
        with reading(s, after=s.registry.journal.id_of(2)) as (_, found):
            seen = until(found, lambda e: e.get("n") == 9)
        assert seen[0] == {"kind": "missed", "count": 5, "reason": seen[0]["reason"], "id": None}
        assert [e["n"] for e in seen[1:]] == [7, 8, 9]
        with reading(s, after=Journal().id_of(0)) as (_, found):  # of another server
            note(s, 10)
            seen = until(found, lambda e: e.get("n") == 10)
        assert seen[0]["count"] is None and "anew" in seen[0]["reason"] and len(seen) == 2


@pytest.mark.parametrize("wrong", ["7", "nonsense", "00000000-x", "x" * 3000])
def test_what_is_no_event_id_is_400(stage: Start, wrong: str) -> None:
    with stage() as s:
        answer = s.client.get("/admin/events", headers={"last-event-id": wrong})
        assert "Last-Event-ID" in assert_error(answer, 400, code="invalid_value")


def test_silence_is_broken_by_comments(stage: Start) -> None:
    with stage(keepalive_s=0.05) as s, reading(s) as (_, found):
        assert next(found) == {"": "ping"} and next(found) == {"": "ping"}


def test_head_answers_and_ends(stage: Start) -> None:
    with stage() as s:
        answer = s.client.head("/admin/events")
        assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")


def raw_reader(s: Stage) -> socket.socket:
    """A reader with small buffers that has read nothing yet."""
    made = socket.socket()
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    made.settimeout(10)
    made.connect((s.live.host, s.live.port))
    head = f"GET /admin/events HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\n\r\n"
    made.sendall(head.encode())
    return made


def received(connection: socket.socket, wanted: bytes | None) -> bytes:
    """All that comes until `wanted` or, if None, until the server closes."""
    data = b""
    while wanted is None or wanted not in data:
        piece = connection.recv(1 << 16)
        if not piece:
            break
        data += piece
    assert wanted is None or wanted in data
    return data


def flood(s: Stage) -> None:
    """More than sockets and the journal hold."""
    for n in range(300):
        note(s, *range(n * 10, n * 10 + 10), padding="x" * 10_000)


def test_a_slow_reader_holds_nobody_up_and_is_told_what_it_has_missed(stage: Start) -> None:
    with stage() as s:
        s.registry.journal = Journal(most_entries=20)
        with contextlib.closing(raw_reader(s)) as slow:
            received(slow, b"events follow")
            flood(s)
            began_s = time.monotonic()
            assert s.ask("A").status_code == 200 and time.monotonic() - began_s < 2
            assert len(s.registry.journal._entries) == 20
            data = received(slow, b'"to":"ready"')
            missed = [json.loads(line[6:]) for line in data.split(b"\n") if b'"kind":"missed"' in line]
            assert missed and sum(m["count"] for m in missed) > 1000
            assert all("faster than they were read" in m["reason"] for m in missed)


def test_who_reads_nothing_at_all_is_cut_off(stage: Start) -> None:
    with stage(stream_stall_s=0.2) as s, contextlib.closing(raw_reader(s)) as stalled:
        received(stalled, b"events follow")
        flood(s)
        time.sleep(0.6)
        received(stalled, None)  # what was on the way, then the end


def test_many_readers_get_the_same(stage: Start) -> None:
    with stage() as s, contextlib.ExitStack() as stack:
        readers = [stack.enter_context(reading(s))[1] for _ in range(5)]
        note(s, 1, 2, 3)
        ids = [[e["id"] for e in until(found, lambda e: e["n"] == 3)] for found in readers]
        assert len(set(map(tuple, ids))) == 1 and len(ids[0]) == 3


def test_a_reader_that_leaves_is_forgotten(stage: Start) -> None:
    with stage() as s:
        with reading(s):
            pass
        s.until(lambda: s.live.call(lambda: not s.registry.journal._wakeup._waiters))


def test_a_drain_ends_streams_at_once_and_says_so(stage: Start) -> None:
    with stage() as s, reading(s) as (_, found):
        note(s, 1)
        until(found, lambda e: e["n"] == 1)
        began_s = time.monotonic()
        s.live.call(s.live.server.lifecycle.begin_drain)
        last = next(found)
        assert last["event"] == "end" and "shutting down" in last["data"]
        assert list(found) == [] and time.monotonic() - began_s < 2
        assert s.live.server.lifecycle.num_running == 0
        assert_error(s.client.get("/admin/events"), 503, code="draining")

"""`megpt set | queue | events` against real servers over fake engines."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from memory_efficient_gpt_server.cli import main
from memory_efficient_gpt_server.commands.admin_client import AdminClient, ServerRefusedError
from memory_efficient_gpt_server.commands.event_lines import ServerEvent, line_of, read_events
from memory_efficient_gpt_server.commands.events import follow
from memory_efficient_gpt_server.registry.happenings import HappeningKind
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import ADMIN, Start

Megpt = Callable[..., tuple[int, str, str]]


# ---- set


def test_set_changes_and_shows_all_settings(stage: Start, megpt: Megpt) -> None:
    with stage() as s:
        at = ("--url", s.live.url)
        done = megpt("set", "A", "pinned=true", "ttl_s=60", "priority=-3", *at)
        said = (
            "A: unloaded, pinned=true, ttl_s=60, min_residency_s=0, priority=-3, kv_soft_limit_bytes=null, "
            "kv_hard_limit_bytes=null\n"
        )
        assert done == (0, said, "")
        assert "ttl_s=null" in megpt("set", "A", "ttl_s=null", "min_residency_s=2.5", *at)[1]
        entry = s.registry.entry("A")
        assert (entry.pinned, entry.ttl_s, entry.min_residency_s, entry.priority) == (True, None, 2.5, -3)


def test_set_takes_sizes_and_takes_limits_away(stage: Start, megpt: Megpt) -> None:
    host = FakeHost()
    host.kv["A"] = (30, 1 << 40)
    with stage(host) as s:
        at = ("--url", s.live.url)
        code, out, err = megpt("set", "A", "kv_soft_limit_bytes=4096", "kv_hard_limit_bytes=64MiB", *at)
        assert (code, err) == (0, "") and out.endswith(
            "soft_limit_bytes=4096, kv_hard_limit_bytes=67108864\n"
        )
        assert s.registry.entry("A").kv_limits == (4096, 64 << 20)
        code, _, err = megpt("set", "A", "kv_hard_limit_bytes=1KiB", *at)
        assert code == 1 and "kv_soft_limit_bytes is 4,096, more than kv_hard_limit_bytes, 1,024" in err
        megpt("set", "A", "kv_hard_limit_bytes=null", *at)
        assert s.registry.entry("A").kv_limits == (4096, None)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("pinned", "write NAME=VALUE with one of pinned, ttl_s, min_residency_s, priority"),
        ("pined=true", "sets nothing"),
        ("pinned=yes", "pinned must be true or false, got 'yes'"),
        ("ttl_s=soon", "ttl_s must be a number of seconds or null"),
        ("ttl_s=inf", "ttl_s must be a number"),
        ("min_residency_s=null", "min_residency_s must be a number of seconds"),
        ("priority=1.5", "priority must be an integer"),
        ("kv_hard_limit_bytes=-5", "kv_hard_limit_bytes must be bytes, a size such as 64MiB, or null"),
        ("kv_soft_limit_bytes=", "kv_soft_limit_bytes must be bytes, a size"),
    ],
)
def test_wrong_settings_are_told_without_a_server(
    capsys: pytest.CaptureFixture[str], setting: str, said: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["set", "A", setting])
    assert ended.value.code == 2 and said in " ".join(capsys.readouterr().err.split())


def test_settings_that_stand_twice_are_wrong_use(megpt: Megpt) -> None:
    code, _, err = megpt("set", "A", "ttl_s=1", "ttl_s=2")
    assert code == 2 and "ttl_s stands twice" in err


def test_what_the_server_refuses_is_told(stage: Start, megpt: Megpt) -> None:
    with stage() as s:
        code, _, err = megpt("set", "A", "ttl_s=-1", "--url", s.live.url)
        assert code == 1 and "ttl_s must be greater than 0" in err
        code, _, err = megpt("set", "D", "ttl_s=1", "--url", s.live.url)
        assert code == 1 and "Models: A, B, C" in err


# ---- queue


def test_the_queue_is_a_table_with_reasons(stage: Start, megpt: Megpt) -> None:
    host = FakeHost()
    host.held = {"A"}
    with stage(host) as s, ThreadPoolExecutor() as pool:
        at = ("--url", s.live.url)
        assert megpt("queue", *at) == (0, "nobody waits for a model\n\n0 of 20 swaps within 120 s\n", "")
        asking = [pool.submit(s.ask, "A"), pool.submit(s.ask, "A")]
        s.until(lambda: len(s.registry.state.queue) == 2)
        s.client.post("/admin/models/B/load")
        code, out, _ = megpt("queue", *at)
        header, first, second, _, churn = out.splitlines()
        assert code == 0 and header.split()[:4] == ["#", "model", "state", "waiting"]
        assert first.split()[:4] == ["1", "A", "loading", "2"] and first.endswith("loading")
        assert second.split()[:4] == ["2", "B", "queued", "1"] and second.endswith("busy; in its way: A")
        assert churn == "0 of 20 swaps within 120 s"
        groups = json.loads(megpt("queue", "--json", *at)[1])["groups"]
        assert [g["why"]["code"] for g in groups] == ["loading", "busy"]
        s.finish_load("A")
        assert [answer.result(5).status_code for answer in asking] == [200, 200]


# ---- events


def test_events_are_lines_as_they_happen(stage: Start, megpt: Megpt) -> None:
    with stage() as s, ThreadPoolExecutor() as pool:
        told = pool.submit(megpt, "events", "--count", "3", "--url", s.live.url)
        s.until(lambda: s.live.call(lambda: bool(s.registry.journal._wakeup._waiters)))
        s.ask("A")
        code, out, _ = told.result(5)
    first, second, third = out.splitlines()
    assert code == 0 and first.endswith("state      A: unloaded -> loading")
    assert "  load       A: loaded after 0.0" in second and third.endswith("A: loading -> ready")


def test_events_as_json_are_the_servers_own(stage: Start, megpt: Megpt) -> None:
    with stage() as s, ThreadPoolExecutor() as pool:
        told = pool.submit(megpt, "events", "--json", "--count", "1", "--url", s.live.url)
        s.until(lambda: s.live.call(lambda: bool(s.registry.journal._wakeup._waiters)))
        s.client.patch("/admin/memory", json={"device": "cpu", "budget_bytes": 70})
        event = json.loads(told.result(5)[1])
    assert (event["kind"], event["from_bytes"], event["budget_bytes"]) == ("budget", 100, 70)


class Answers:
    """Answers of a server, one after the other, and what was asked."""

    def __init__(self, *answers: httpx.Response | Exception) -> None:
        self.asked: list[httpx.Request] = []
        self._answers = list(answers)

    def client(self) -> AdminClient:
        return AdminClient("http://there", ADMIN, transport=httpx.MockTransport(self._handle))

    def _handle(self, request: httpx.Request) -> httpx.Response:
        self.asked.append(request)
        answer = self._answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def stream(text: str) -> httpx.Response:
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream"})


def test_after_a_break_it_goes_on_behind_the_last_event(capsys: pytest.CaptureFixture[str]) -> None:
    server = Answers(
        stream('id: a-1\nevent: new\ndata: {"n":1}\n\nevent: end\ndata: {"reason":"bye"}\n\n'),
        httpx.ConnectError("refused"),
        httpx.ConnectError("refused"),
        httpx.Response(503, json={"error": {"code": "draining", "message": "The server is shutting down."}}),
        stream('event: missed\ndata: {"count":null,"reason":"anew"}\n\nid: b-1\ndata: {"n":2}\n\n'),
    )
    pauses: list[float] = []
    with server.client() as client:
        follow(client, as_json=False, count=2, pause=pauses.append)
    out, err = capsys.readouterr()
    assert [line.split(None, 1)[1] for line in out.splitlines()] == [
        'new        {"n": 1}',
        "end        bye",
        "missed     some events are lost: anew",
        'message    {"n": 2}',
    ]
    assert err.count("can't be reached: refused") == 1 and "shutting down" in err and len(pauses) == 4
    assert [request.headers.get("last-event-id") for request in server.asked] == [None, *["a-1"] * 4]


@pytest.mark.parametrize(
    "answer",
    [
        httpx.ConnectError("refused"),
        httpx.Response(401, json={"error": {"code": "invalid_api_key", "message": "No."}}),
        httpx.Response(200, text="<html>"),
    ],
)
def test_a_server_that_refuses_at_first_is_not_asked_again(answer: Any) -> None:
    server = Answers(answer)
    with server.client() as client, pytest.raises(ServerRefusedError):
        follow(client, as_json=False, count=None)
    assert len(server.asked) == 1


def test_lines_of_a_stream_become_events() -> None:
    text = ': c\n\nretry: 5\n: d\n\nid: 1\nevent: state\ndata: {"a":1}\n\ndata: no json\n\nid: 2\ndata: {"cut'
    assert list(read_events(text.splitlines())) == [
        ServerEvent("1", "state", {"a": 1}),
        ServerEvent(None, "message", {"data": "no json"}),
    ]


A = {"model": "A", "variant": "A"}
FAILED = {"code": "c", "message": "why"}
LINES: tuple[tuple[str, dict[str, Any], str], ...] = (
    ("state", {**A, "from": "ready", "to": "draining", "reason": "admin"}, "A: ready -> draining (admin)"),
    (
        "load",
        {**A, "result": "failure", "seconds": 2, "reason": "x\n\x1b[31my"},
        "A: not loaded after 2.00 s (x [31my)",
    ),
    (
        "eviction",
        {**A, "way": "sleep", "reason": "ttl", "held_bytes": {"cpu": 1 << 20}},
        "A: put to sleep (ttl); it holds 1.0 MiB of cpu",
    ),
    (
        "refusal",
        {**A, "requests": 2, "code": "models_busy", "reason": None},
        "A: 2 requests refused, models_busy",
    ),
    (
        "operation",
        {**A, "what": "load", "state": "failed", "operation": "op-1", "error": FAILED},
        "A: load failed, op-1: why",
    ),
    (
        "kv",
        {**A, "device": "cpu", "change_bytes": 1 << 20, "kv_bytes": 3 << 20, "partner": "B"},
        "A: +1.0 MiB of KV memory from B, 3.0 MiB now",
    ),
    (
        "kv",
        {**A, "device": "cpu", "change_bytes": -(1 << 20), "kv_bytes": 3 << 20, "partner": "B"},
        "A: -1.0 MiB of KV memory for B, 3.0 MiB now",
    ),
    (
        "kv",
        {**A, "device": "cpu", "change_bytes": 1 << 20, "kv_bytes": 3 << 20, "partner": None},
        "A: +1.0 MiB of KV memory, 3.0 MiB now",
    ),
    (
        "budget",
        {"device": "cpu", "from_bytes": 1 << 30, "budget_bytes": 1 << 20},
        "cpu: 1.00 GiB -> 1.0 MiB",
    ),
    ("model", {"model": "A", "change": "changed", "settings": {"ttl_s": None}}, "A: changed, ttl_s=null"),
    ("missed", {"count": 7, "reason": "slow"}, "7 events are lost: slow"),
    ("end", {"reason": "bye"}, "bye"),
)


@pytest.mark.parametrize(("kind", "facts", "line"), LINES)
def test_every_kind_has_a_line(kind: str, facts: dict[str, Any], line: str) -> None:
    assert line_of(ServerEvent("1", kind, facts)) == f"--:--:--  {kind:9}  {line}"
    of_another_version = line_of(ServerEvent("1", kind, {"kind": "?"}))
    assert json.loads(of_another_version.split(None, 2)[2]) == {"kind": "?"}


def test_no_kind_was_forgotten() -> None:
    assert {kind for kind, _, _ in LINES} == {*map(str, HappeningKind), "missed", "end"}

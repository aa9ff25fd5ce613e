"""The receipt of an answer: what served it and what that cost, for those who ask."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from memory_efficient_gpt.request import Cost, FinishReason, Request, SequenceEvent
from memory_efficient_gpt_server.event_stream import EventStream
from memory_efficient_gpt_server.open_requests import OpenRequest
from memory_efficient_gpt_server.receipts import Serving, later, receipt
from memory_efficient_gpt_server.registry.choice import Choices
from memory_efficient_gpt_server.registry.variants import VariantKey
from tests.server.conftest import Serve
from tests.server.registry.fake_engines import FakeHost
from tests.server.scripted_model import INFO, ScriptedEngine
from tests.server.staged_models import Start

ASKS: dict[str, Any] = {"optimizations": {"receipt": True}}
BODY: dict[str, Any] = {"model": "demo", "prompt": "a", "max_tokens": 3}
PATHS = [
    ("/v1/completions", {"prompt": "a"}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
]


def ask(serve: Serve, engine: ScriptedEngine, **fields: Any) -> dict[str, Any]:
    with serve(engine) as live, live.client() as client:
        answer: dict[str, Any] = client.post("/v1/completions", json={**BODY, **ASKS, **fields}).json()
    return answer


def events_of(text: str) -> list[dict[str, Any]]:
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.parametrize(("path", "prompt"), PATHS)
def test_the_answer_tells_what_was_applied_and_measured(
    serve: Serve, path: str, prompt: dict[str, Any]
) -> None:
    engine = ScriptedEngine([5, 6, 7, 8], cached_tokens=16)
    with serve(engine) as live, live.client() as client:
        answer = client.post(path, json={"model": "demo", "max_tokens": 3, **prompt, **ASKS}).json()
        plain = client.post(path, json={"model": "demo", "max_tokens": 3, **prompt}).json()
    told = answer["receipt"]
    assert told.pop("load_ms") >= 0
    assert told == {
        "model": "demo", "variant": "demo", "quantization": None, "dtype": "float32",
        "kv_cache_dtype": "float32", "attention_backend": "none", "device": "cpu", "weights_bytes": 1000,
        "cached_tokens": 16, "kv_peak_bytes": 30, "kv_byte_seconds": 15.0, "queue_ms": 250.0,
        "resumed": False,
    }  # fmt: skip
    assert "receipt" not in plain and [r.metered for r in engine.requests] == [True, False]


@pytest.mark.parametrize("usage", [False, True])
@pytest.mark.parametrize(("path", "prompt"), PATHS)
def test_a_streams_last_event_has_it(serve: Serve, path: str, prompt: dict[str, Any], usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if usage else {}
    body = {"model": "demo", "max_tokens": 3, "stream": True, **prompt, **ASKS, **options}
    with serve(ScriptedEngine([5, 6, 7, 8])) as live, live.client() as client:
        *others, last = events_of(client.post(path, json=body).text)
    assert last["choices"] == [] and last["receipt"]["kv_peak_bytes"] == 30 and last["id"] == others[0]["id"]
    assert ("usage" in last) is usage and not any("receipt" in event for event in others)


def test_a_stop_string_ends_the_measurement_with_the_token_that_completed_it(
    serve: Serve, answer_ids: list[int]
) -> None:
    answer = ask(serve, ScriptedEngine(answer_ids), stop="house", max_tokens=16)
    assert answer["choices"][0]["finish_reason"] == "stop"
    tokens = answer["receipt"]["kv_peak_bytes"] // 10
    assert 1 < tokens < 16


def test_prompts_of_one_request_are_added_up(serve: Serve) -> None:
    told = ask(serve, ScriptedEngine([5, 6, 7], cached_tokens=16), prompt=["a", "b"], n=2)["receipt"]
    assert (told["kv_peak_bytes"], told["kv_byte_seconds"], told["queue_ms"]) == (60, 30.0, 250.0)
    assert told["cached_tokens"] == 32


def test_what_was_not_measured_is_null(serve: Serve) -> None:
    told = ask(serve, ScriptedEngine([5, 6, 7], block_bytes=None))["receipt"]
    assert (told["kv_peak_bytes"], told["kv_byte_seconds"], told["queue_ms"]) == (None, None, 250.0)
    serving = Serving("m", "m", INFO, 0.0)
    told = receipt(serving, [Cost(queue_s=1.0, kv_peak_bytes=5, kv_byte_seconds=5.0)], 2, 0)
    assert (told["kv_peak_bytes"], told["queue_ms"]) == (None, None), "of one prompt nothing is known"


def test_the_receipt_names_the_variant_and_the_wait_for_its_load(stage: Start) -> None:
    int4 = VariantKey("A", "int4")
    host = FakeHost(sizes={str(int4): 30})
    host.choices["A"] = Choices((int4,))
    with stage(host) as s:
        wish = {"quantization": "int4", "receipt": True}
        answer = s.ask("A", optimizations=wish)
        told = answer.json()["receipt"]
        assert (told["model"], told["variant"], told["quantization"]) == ("A", str(int4), "int4")
        assert round(told["load_ms"]) == int(answer.headers["x-megpt-load-ms"])
        assert s.ask("A", **ASKS).json()["receipt"]["variant"] == "A"


def test_costs_only_grow_in_whatever_order_news_is_read() -> None:
    early, late = (Cost(queue_s=0.0, kv_peak_bytes=1, kv_byte_seconds=s) for s in (1.0, 2.0))
    assert later(early, late) is later(late, early) is later(None, late) is late
    resumed = replace(early, resumed=True)
    assert later(late, resumed) is resumed


def test_a_resumed_requests_costs_are_those_of_both_workers() -> None:
    stream = EventStream("r", 1, abandon=lambda request_id: None)
    opened = OpenRequest(Request(id="r", prompt_token_ids=(1,), metered=True), stream)
    told: list[Cost | None] = []

    def news(queue_s: float, peak: int, byte_s: float) -> None:
        cost = Cost(queue_s=queue_s, kv_peak_bytes=peak, kv_byte_seconds=byte_s)
        event = SequenceEvent(request_id="r", token_ids=[1], cost=cost)
        opened.put(event)
        told.append(event.cost)

    news(0.5, 20, 3.0)
    opened.crashed = True
    news(0.25, 10, 1.0)
    news(0.25, 30, 2.0)
    assert told == [
        Cost(queue_s=0.5, kv_peak_bytes=20, kv_byte_seconds=3.0),
        Cost(queue_s=0.75, kv_peak_bytes=20, kv_byte_seconds=4.0, resumed=True),
        Cost(queue_s=0.75, kv_peak_bytes=30, kv_byte_seconds=5.0, resumed=True),
    ]


def test_unread_news_keeps_the_latest_cost() -> None:
    stream = EventStream("r", 1, abandon=lambda request_id: None)
    for number in (1, 2):
        cost = Cost(queue_s=0.0, kv_peak_bytes=number, kv_byte_seconds=float(number))
        stream.put(SequenceEvent(request_id="r", token_ids=[number], cost=cost))
    stream.put(SequenceEvent(request_id="r", finish_reason=FinishReason.STOP))
    (unread,) = stream._unread.values()
    assert unread.cost is not None and unread.cost.kv_peak_bytes == 2


def test_a_wish_for_a_prefix_cache_that_is_not_there_is_refused(serve: Serve) -> None:
    engine = ScriptedEngine([5, 6], info=replace(INFO, prefix_cache=False))
    with serve(engine) as live, live.client() as client:
        for fields, param in (
            ({"prefix_cache": True}, "prefix_cache"),
            ({"optimizations": {"prefix_cache": True}}, "optimizations.prefix_cache"),
        ):
            answer = client.post("/v1/completions", json={**BODY, **fields})
            assert answer.status_code == 400 and answer.json()["error"]["param"] == param
        assert client.post("/v1/completions", json={**BODY, "prefix_cache": False}).status_code == 200

"""What operators see: readiness that doesn't lie, metrics under vLLM's names, one log line a request."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
import time
from dataclasses import fields, replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from memory_efficient_gpt.engine_info import EngineStats
from memory_efficient_gpt.errors import EngineFailedError
from memory_efficient_gpt_server.counters import COUNTERS, add_counters
from memory_efficient_gpt_server.histogram import Histogram
from memory_efficient_gpt_server.logs import HumanFormatter, JsonFormatter, configure_logging, request_id_var
from tests.server.conftest import LiveServer, Serve
from tests.server.scripted_model import ScriptedEngine
from tests.server.test_bad_requests import assert_error

BODY: dict[str, Any] = {"model": "demo", "prompt": "a secret prompt", "max_tokens": 4}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"state": "loading", "info": None}, "demo is loading"),
        ({"state": "failed", "reason": "/secret/path is damaged"}, "demo is failed"),
        ({"state": "draining"}, "demo is draining"),
        ({"stalled": True}, "makes no step"),
    ],
)
def test_not_ready_says_why_and_tells_no_paths(
    serve: Serve, answer_ids: list[int], change: dict[str, Any], reason: str
) -> None:
    with serve(replace(ScriptedEngine(answer_ids), **change)) as live, live.client() as client:
        response = client.get("/readyz")
        assert response.status_code == 503 and response.headers["retry-after"]
        assert reason in response.json()["reasons"][0] and "secret" not in response.text
        assert client.get("/livez").json() == {"status": "alive"}
        model = client.get("/v1/models/demo").json()
        assert model["state"] == live.engine.state and model["reason"] == live.engine.reason


def test_requests_to_a_model_that_is_not_ready_are_refused(serve: Serve, answer_ids: list[int]) -> None:
    with serve(ScriptedEngine(answer_ids, state="loading", info=None)) as live, live.client() as client:
        assert_error(client.post("/v1/completions", json=BODY), 503, code="model_loading")
        live.engine.state = "draining"
        assert_error(client.post("/v1/completions", json=BODY), 503, code="draining")
        live.engine.state = "failed"
        response = client.post("/v1/completions", json=BODY)
        assert response.status_code == 503 and response.headers["x-should-retry"] == "false"
        assert response.json()["error"]["code"] == "model_load_failed"


def test_ready_and_root(live: LiveServer) -> None:
    with live.client() as client:
        assert client.get("/readyz").json() == {"status": "ready", "reasons": []}
        about = client.get("/").json()
        described = client.get("/openapi.json").json()["paths"]
    for endpoint in about["endpoints"].values():
        method, path = endpoint.split()
        assert path == "/openapi.json" or method.lower() in described[path]
    assert "requestBody" in described["/v1/completions"]["post"]


def scrape(live: LiveServer) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    with live.client() as client:
        families = text_string_to_metric_families(client.get("/metrics").text)
        return {(s.name, tuple(sorted(s.labels.items()))): s.value for f in families for s in f.samples}


def test_metrics_have_vllms_names_and_count(serve: Serve, answer_ids: list[int]) -> None:
    with serve(ScriptedEngine(answer_ids, step_s=0.01)) as live:
        with live.client() as client:
            for stream in (True, False):
                assert client.post("/v1/completions", json={**BODY, "stream": stream}).status_code == 200
            client.get("/v1/models/demo")
            client.get("/not/a/route")
            client.request("BREW", "/livez")
        live.engine.stats = EngineStats(
            num_running=3, num_waiting=2, num_kv_blocks=100, num_free_blocks=75, prefix_queries_tokens=50,
            prefix_hits_tokens=20, num_preemptions=1, prompt_tokens=80, generated_tokens=8,
        )  # fmt: skip
        values = scrape(live)
        model = (("model_name", "demo"),)
        assert values["megpt_num_requests_running", model] == 3
        assert values["megpt_num_requests_waiting", model] == 2
        assert values["megpt_kv_cache_usage_perc", model] == 0.25
        for name, value in [
            ("prompt_tokens", 80), ("generation_tokens", 8), ("prefix_cache_queries", 50),
            ("prefix_cache_hits", 20), ("num_preemptions", 1),
        ]:  # fmt: skip
            assert values[f"megpt_{name}_total", model] == value
        finished = ("finished_reason", "length"), *model
        assert values["megpt_request_success_total", finished] == 2
        for histogram in (
            "time_to_first_token_seconds", "e2e_request_latency_seconds", "request_prompt_tokens",
            "request_generation_tokens",
        ):  # fmt: skip
            assert values[f"megpt_{histogram}_count", model] == 2
        assert values["megpt_inter_token_latency_seconds_count", model] == 6
        assert values["megpt_request_generation_tokens_sum", model] == 8
        assert values["megpt_admitted_sequences", ()] == values["megpt_admitted_tokens", ()] == 0
        http = {labels: v for (name, labels), v in values.items() if name == "megpt_http_requests_total"}
        routes = {dict(labels)["route"]: v for labels, v in http.items()}
        assert routes["/v1/completions"] == 2 and routes["/v1/models/{model_id}"] == 1
        assert routes["unmatched"] == 1
        assert {dict(labels)["method"] for labels in http} == {"POST", "GET", "other"}


def test_counters_go_on_and_gauges_do_not_when_an_engine_restarts(
    serve: Serve, answer_ids: list[int]
) -> None:
    with serve(ScriptedEngine(answer_ids)) as live:
        life = EngineStats(num_running=8, num_kv_blocks=9, prompt_tokens=50, generated_tokens=70, steps=7)
        # the second life counts further than the first, before anyone scrapes: nothing may be lost by that
        live.engine.ended_stats = add_counters(add_counters(EngineStats(), life), life)
        live.engine.stats = EngineStats(generated_tokens=100)
        values, model = scrape(live), (("model_name", "demo"),)
    assert values["megpt_generation_tokens_total", model] == 240
    assert values["megpt_prompt_tokens_total", model] == 100
    assert values["megpt_num_requests_running", model] == values["megpt_kv_cache_usage_perc", model] == 0


def test_every_total_of_an_engine_is_kept() -> None:
    present = {"num_running", "num_waiting", "num_kv_blocks", "num_free_blocks", "num_cached_blocks"}
    present |= {"num_waiting_for_blocks"}  # what the registry asks, no metric
    assert {f.name for f in fields(EngineStats)} == {*COUNTERS, *present, "last_step_s"}


def test_head_is_answered_as_get_without_a_body(live: LiveServer) -> None:
    with live.client() as client:
        for path in ("/livez", "/readyz", "/metrics", "/v1/models/demo"):
            head, get = client.head(path), client.get(path)
            assert (head.status_code, head.content) == (get.status_code, b"") == (200, b"")
            assert head.headers["content-type"] == get.headers["content-type"]
        assert client.head("/v1/completions").status_code == 405
        assert client.head("/nothing").status_code == 404
    assert 'method="HEAD",route="/livez"' in str(live.server.metrics.expose())


def test_answers_on_a_kept_connection_come_at_once(live: LiveServer) -> None:
    with live.client() as client:
        client.get("/livez")
        seconds = []
        for _ in range(20):
            began = time.perf_counter()
            client.post("/v1/completions", json={**BODY, "max_tokens": 1})
            seconds.append(time.perf_counter() - began)
        assert sorted(seconds)[5] < 0.03  # a delayed ACK takes 40 ms of each


def test_histograms_put_values_on_a_bound_below_it() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 7.0):
        histogram.observe(value)
    histogram.observe(2.0, times=3)
    assert histogram.cumulative() == ([("1.0", 2.0), ("2.0", 6.0), ("+Inf", 7.0)], 16.0)


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What is logged as JSON, by line."""
    stream = io.StringIO()
    root = logging.getLogger()
    before, level = list(root.handlers), root.level
    configure_logging("INFO", "json", stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers, root.level = before, level
    logging.getLogger("uvicorn.access").propagate = True


def test_each_request_leaves_one_line_without_its_text(
    serve: Serve, answer_ids: list[int], lines: Any
) -> None:
    key = "a-very-secret-key-" + "x" * 16
    evil = 'me\r\n{"level": "ERROR"}\u2028'
    headers = {"authorization": f"Bearer {key}", "x-request-id": "id-1"}
    with serve(ScriptedEngine(answer_ids), api_keys=[key]) as live, live.client(headers=headers) as client:
        client.post("/v1/completions", json={**BODY, "stream": True, "user": evil})
        client.post("/v1/completions", json={**BODY, "temperature": 9})
    requests = [line["request"] for line in lines() if "request" in line]
    told = [request for request in requests if request["id"] == "id-1"]  # an earlier test's may end only now
    assert len(told) == 2
    good, bad = told
    assert (good["id"], good["route"], good["status"], good["model"]) == (
        "id-1",
        "/v1/completions",
        200,
        "demo",
    )
    assert (good["completion_tokens"], good["stream"], good["user"]) == (4, True, evil)
    assert good["ttft_s"] <= good["duration_s"] and re.fullmatch("[0-9a-f]{16}", good["client"])
    assert (bad["status"], bad["error"]) == (400, "invalid_value")
    text = json.dumps(lines())
    assert "secret" not in text


def test_a_health_check_is_news_only_when_its_answer_changes(
    serve: Serve, answer_ids: list[int], lines: Any
) -> None:
    with serve(ScriptedEngine(answer_ids)) as live, live.client() as client:
        for stalled in (False, False, True, True, False, False):
            live.engine.stalled = stalled
            client.get("/readyz")
            client.get("/v1/models")
    told = [line["request"] for line in lines() if "request" in line]
    assert [line["status"] for line in told if line["route"] == "/readyz"] == [200, 503, 200]
    assert len([line for line in told if line["route"] == "/v1/models"]) == 6


def test_a_failed_stream_is_logged_with_its_error(serve: Serve, answer_ids: list[int], lines: Any) -> None:
    engine = ScriptedEngine(
        answer_ids, before_token=lambda request, count: EngineFailedError("It died.") if count == 3 else None
    )
    with serve(engine) as live, live.client() as client:
        client.post("/v1/completions", json={**BODY, "stream": True})
    (told,) = [line["request"] for line in lines() if "request" in line]
    assert (told["status"], told["error"], told["completion_tokens"]) == (200, "engine_failed", 3)


@pytest.mark.parametrize("bad", ["", "x" * 129, "a b", "a\tb", "<script>", "é"])
def test_request_ids_that_are_not_sane_are_replaced(live: LiveServer, bad: str) -> None:
    with live.client() as client:
        headers = [(b"x-request-id", bad.encode())]
        assert client.get("/livez", headers=headers).headers["x-request-id"].startswith("req-")


def test_records_stay_on_one_line_in_both_formats() -> None:
    record = logging.LogRecord("a", logging.INFO, "", 0, "got %s", ("x\r\ny\u2028\x1b[31m",), None)
    token = request_id_var.set("id-7")
    try:
        human, structured = HumanFormatter().format(record), JsonFormatter().format(record)
    finally:
        request_id_var.reset(token)
    assert len(human.splitlines()) == len(structured.splitlines()) == 1
    assert "\x1b" not in human and "id=id-7" in human and json.loads(structured)["request_id"] == "id-7"


def test_tracebacks_are_logged() -> None:
    try:
        raise KeyError("why")
    except KeyError:
        record = logging.LogRecord("a", logging.ERROR, "", 0, "failed", (), sys.exc_info())
    assert "KeyError" in json.loads(JsonFormatter().format(record))["exception"]
    assert "KeyError" in HumanFormatter().format(record)

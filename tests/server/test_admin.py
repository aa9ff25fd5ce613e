"""Models on demand over HTTP, with fake engines: what clients, operators and administrators see."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from memory_efficient_gpt_server.registry.choice import Choices
from memory_efficient_gpt_server.registry.variants import VariantKey
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import Start
from tests.server.test_bad_requests import assert_error


def test_models_are_listed_and_ready_without_being_loaded(stage: Start) -> None:
    with stage() as s:
        states = {m["id"]: m["state"] for m in s.client.get("/v1/models").json()["data"]}
        assert states == dict.fromkeys("ABC", "unloaded") and s.client.get("/readyz").status_code == 200
        assert s.client.post("/v1/tokenize", json={"model": "A", "prompt": "a b"}).json()["count"] == 2
        assert not s.host.engines


def test_readiness_waits_for_models_at_start_only(stage: Start) -> None:
    host = FakeHost()
    host.held = {"A", "B"}
    host.at_start = {"A"}
    with stage(host) as s:
        s.until(lambda: s.state("A") == "loading")
        answer = s.client.get("/readyz")
        assert (answer.status_code, answer.json()["reasons"]) == (503, ["model A is loading"])
        s.finish_load("A")
        s.until(lambda: s.client.get("/readyz").status_code == 200)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_waits_for_its_model_and_holds_it_to_its_end(stage: Start, stream: bool) -> None:
    with stage() as s:
        answer = s.ask("A", stream=stream)
        assert answer.status_code == 200 and ("[DONE]" in answer.text) is stream
        told = s.client.get("/admin/models/A").json()
        assert (told["state"], told["leases"], told["measured_bytes"]) == ("ready", 0, {"weights": 60})
        assert s.host.engine("A").requests[0].params.max_tokens == 2


def test_a_wrong_request_loads_nothing(stage: Start) -> None:
    with stage() as s:
        assert_error(s.ask("A", logit_bias={"4096": 1}), 400)
        assert_error(s.ask("A", temperature=9), 400)
        assert_error(s.ask("nothing"), 404, code="model_not_found")
        assert not s.host.engines


def test_a_model_that_can_never_fit_is_507_with_the_plan(stage: Start) -> None:
    with stage(FakeHost(sizes={"B": 101})) as s:
        s.ask("A")
        answer = s.ask("B")
        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["param"]) == (507, "insufficient_memory", "model")
        assert answer.headers["x-should-retry"] == "false" and "memory_budget_bytes" in error["message"]
        assert error["plan"]["needed_bytes"] == {"cpu": 101} and not error["plan"]["fits"]
        assert s.state("A") == "ready"


def test_a_failed_load_is_500_with_its_cause(stage: Start) -> None:
    host = FakeHost()
    host.fails = {"A": "model.safetensors is truncated"}
    with stage(host) as s:
        answer = s.ask("A")
        assert_error(answer, 500, code="load_failed")
        assert "model.safetensors is truncated" in answer.text
        assert answer.headers["x-should-retry"] == "false"
        assert s.state("A") == "failed" and s.client.get("/admin/models/A").json()["retry_in_s"] > 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_load_that_takes_too_long_is_503_with_retry_after(stage: Start, stream: bool) -> None:
    host = FakeHost(max_wait_s=0.1)
    host.held = {"A"}
    with stage(host) as s:
        answer = s.ask("A", stream=stream)
        assert_error(answer, 503, code="model_loading")
        assert int(answer.headers["retry-after"]) >= 1
        s.finish_load("A")
        s.until(lambda: s.state("A") == "ready")
        assert s.ask("A", stream=stream).status_code == 200


def test_a_client_that_leaves_while_it_waits_leaves_no_lease(stage: Start) -> None:
    host = FakeHost()
    host.held = {"A"}
    with stage(host) as s:
        with pytest.raises(httpx.ReadTimeout):
            s.client.post("/v1/completions", json={"model": "A", "prompt": "a"}, timeout=0.2)
        s.until(lambda: s.client.get("/admin/models/A").json()["waiting"] == 0)
        s.finish_load("A")
        s.until(lambda: s.state("A") == "ready")
        assert s.client.get("/admin/models/A").json()["leases"] == 0
        assert s.live.server.admission.sequences == 0


def test_administrators_load_and_unload(stage: Start) -> None:
    host = FakeHost()
    host.held = {"A"}
    with stage(host) as s, ThreadPoolExecutor() as pool:
        begun = s.client.post("/admin/models/A/load")
        assert (begun.status_code, begun.json()["state"]) == (202, "loading")
        waits = pool.submit(s.client.post, "/admin/models/A/load", json={"wait": True})
        assert s.client.get("/admin/models/A").json()["waiting"] == 1
        s.finish_load("A")
        done = waits.result(5)
        assert (done.status_code, done.json()["state"]) == (200, "ready")
        gone = s.client.post("/admin/models/A/unload", json={"wait": True})
        assert (gone.status_code, gone.json()["state"]) == (200, "unloaded")
        assert_error(s.client.post("/admin/models/D/load"), 404, code="model_not_found")


def test_an_unload_waits_for_streams_or_cuts_them(stage: Start, answer_ids: list[int]) -> None:
    with stage() as s, ThreadPoolExecutor() as pool:
        s.ask("A")
        s.host.engine("A").answer, s.host.engine("A").step_s = answer_ids, 0.02
        stream = pool.submit(s.ask, "A", stream=True, max_tokens=200)
        s.until(lambda: s.client.get("/admin/models/A").json()["leases"] == 1)
        refused = s.client.post("/admin/models/A/unload", json={"mode": "if_idle"})
        assert_error(refused, 409, code="model_busy")
        waits = s.client.post("/admin/models/A/unload", json={"mode": "drain"})
        assert (waits.status_code, waits.json()["state"]) == (202, "draining")
        assert_error(s.ask("A"), 503, code="model_unloading")
        assert "[DONE]" in stream.result(10).text
        s.until(lambda: s.state("A") == "unloaded")

        s.ask("A")
        s.host.engine("A").answer, s.host.engine("A").step_s = answer_ids, 0.1
        stream = pool.submit(s.ask, "A", stream=True, max_tokens=200)
        s.until(lambda: s.host.engine("A").num_running == 1)
        assert (
            s.client.post("/admin/models/A/unload", json={"mode": "abort", "wait": True}).status_code == 200
        )
        text = stream.result(10).text
        assert "model_unloading" in text and "[DONE]" not in text
        assert s.live.server.admission.sequences == 0


def test_pinned_models_stay(stage: Start) -> None:
    host = FakeHost()
    host.entries["A"]["pinned"] = True
    with stage(host) as s:
        s.ask("A")
        assert_error(s.client.post("/admin/models/A/unload"), 409, code="model_pinned")
        assert s.ask("B").status_code == 507


@pytest.mark.parametrize(
    "body",
    [{"mode": "now"}, {"deadline_s": -1}, {"mode": "abort", "deadline_s": 1}, {"wait": "yes"}, {"huh": 1}],
)
def test_wrong_wishes_are_refused(stage: Start, body: dict[str, Any]) -> None:
    with stage() as s:
        assert_error(s.client.post("/admin/models/A/unload", json=body), 400)


def test_the_plan_says_who_would_go(stage: Start) -> None:
    with stage() as s:
        s.ask("A")
        told = s.client.post("/admin/plan", json={"model": "B"}).json()
        assert (told["fits"], told["verdict"], told["evict"]) == (True, "after_eviction", ["A"])
        assert s.state("A") == "ready" and "B" not in s.host.engines
        memory = s.client.get("/admin/memory").json()
        assert memory["devices"]["cpu"] == {
            "budget_bytes": 100,
            "used_bytes": 60,
            "freeing_bytes": 0,
            "leaked_bytes": 0,
            "available_bytes": 40,
        }
        (entry,) = memory["entries"]
        assert entry == {"owner": "A", "device": "cpu", "kind": "weights", "stage": "measured", "bytes": 60}


def test_the_plan_of_several_models_says_what_fits_together(stage: Start) -> None:
    host = FakeHost(sizes={"A": 30, "B": 50, "C": 60, "B[quantization=int4]": 10})
    host.choices["B"] = Choices((VariantKey("B", "int4"),))
    with stage(host) as s:
        s.ask("C")
        two = s.client.post("/admin/plan", json={"loads": [{"model": "A"}, {"model": "B"}]}).json()
        assert (two["fits"], two["verdict"], two["evict"]) == (True, "after_eviction", ["C"])
        assert two["needed_bytes"] == {"cpu": 80} and two["would_fit"] == [] and two["eta_s"] > 0
        loads: list[dict[str, Any]] = [{"model": "C"}, {"model": "A"}, {"model": "B"}]
        three = s.client.post("/admin/plan", json={"loads": loads}).json()
        assert (three["fits"], three["verdict"], three["evict"]) == (False, "never", [])
        told = [(x["variant"], x["fits"], x["bytes"]["weights"], x["needed_bytes"]) for x in three["loads"]]
        assert told == [
            ("C", True, 60, {}), ("A", True, 30, {"cpu": 30}), ("B", False, 50, {"cpu": 50}),
        ]  # fmt: skip
        assert [(x["text"], x["loads"]) for x in three["would_fit"]] == [
            ("with B[quantization=int4] for B", ["C", "A", "B[quantization=int4]"]),
            ("without C", ["A", "B"]),
            ("without B", ["C", "A"]),
        ]
        loads[2] = {"model": "B", "optimizations": {"quantization": "int4"}}
        assert s.client.post("/admin/plan", json={"loads": loads}).json()["verdict"] == "now"
        assert s.state("C") == "ready" and set(s.host.engines) == {"C"}


def test_a_load_for_which_nobody_may_leave_is_refused_with_the_plan(stage: Start) -> None:
    with stage(FakeHost(sizes={"C": 101})) as s:
        s.ask("A")
        refused = s.client.post("/admin/models/B/load", json={"evict": "never", "wait": True})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (409, "eviction_needed", "evict")
        assert error["message"] == (
            "Model B needs 60 bytes of cpu, more than is free, and nobody may leave for it: A would have to "
            "leave. Unload a model, or load it with evict: auto."
        )
        assert (error["plan"]["verdict"], error["plan"]["evict"]) == ("after_eviction", ["A"])
        never = s.client.post("/admin/models/C/load", json={"evict": "never"})
        assert (never.status_code, never.json()["error"]["code"]) == (507, "insufficient_memory")
        assert s.state("A") == "ready" and s.state("B") == "unloaded"
        wrong = s.client.post("/admin/models/B/load", json={"evict": "always"})
        assert_error(wrong, 400, code="invalid_value", param="evict")
        failed = s.client.get("/admin/operations").json()["operations"][1]
        assert (failed["options"], failed["error"]["code"]) == ({"evict": "never"}, "eviction_needed")
        s.client.post("/admin/models/A/unload", json={"wait": True})
        loaded = s.client.post("/admin/models/B/load", json={"evict": "never", "wait": True})
        assert loaded.status_code == 200 and s.state("B") == "ready"
        swapped = s.client.post("/admin/models/A/load", json={"evict": "auto", "wait": True})
        assert swapped.status_code == 200 and s.state("B") == "unloaded"


@pytest.mark.parametrize(
    ("body", "status", "param", "said"),
    [
        ({}, 400, "model", "model is required, or loads"),
        ({"loads": []}, 400, "loads", "loads should have at least 1 item"),
        ({"loads": [{"model": "A"}] * 65}, 400, "loads", "at most 64 items"),
        ({"model": "A", "loads": [{"model": "B"}]}, 400, "loads", "Leave model out, or put it into loads"),
        ({"optimizations": {}, "loads": [{"model": "B"}]}, 400, "loads", "Leave optimizations out"),
        ({"loads": [{"model": "A"}, {"modle": "B"}]}, 400, "loads[1].model", "loads[1].model is required"),
        (
            {"loads": [{"model": "A", "evict": "auto"}]},
            400,
            "loads[0].evict",
            "loads[0].evict is not a field",
        ),
        ({"loads": "A"}, 400, "loads", "loads must be"),
        ({"loads": [{"model": "A"}, {"model": "A"}]}, 400, "loads[1]", "loads[1] is A, as loads[0] is"),
        ({"loads": [{"model": "A"}, {"model": "D"}]}, 404, "loads[1].model", "There is no model 'D'"),
        (
            {"loads": [{"model": "A", "optimizations": {"quantization": "int4"}}]},
            400,
            "loads[0].optimizations.quantization",
            "int4 was asked for",
        ),
    ],
)
def test_wrong_plans_are_refused_by_name(
    stage: Start, body: dict[str, Any], status: int, param: str, said: str
) -> None:
    with stage() as s:
        assert said in assert_error(s.client.post("/admin/plan", json=body), status, param=param)


def test_metrics_tell_states_loads_evictions_and_bytes(stage: Start) -> None:
    with stage() as s:
        s.ask("A")
        s.ask("B")
        text = s.client.get("/metrics").text
    values = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return values[f"megpt_{name}", tuple(sorted(labels.items()))]

    assert value("model_state", model_name="B", state="ready") == 1
    assert value("model_state", model_name="A", state="unloaded") == 1
    assert value("model_state", model_name="A", state="ready") == 0
    assert value("model_loads_total", model_name="A", result="success") == 1
    assert value("model_load_seconds_count", model_name="B") == 1
    assert value("model_evictions_total", model_name="A", reason="budget") == 1
    assert value("model_evictions_total", model_name="C", reason="ttl") == 0
    assert value("model_loads_total", model_name="C", result="failure") == 0
    assert value("model_load_seconds_count", model_name="C") == 0
    assert value("load_queue_depth") == 0
    assert value("load_queue_wait_seconds_count", model_name="B") == 1
    assert value("load_queue_wait_seconds_count", model_name="C") == 0
    assert value("model_estimate_error_ratio", model_name="B") == 0
    assert ("megpt_model_estimate_error_ratio", (("model_name", "C"),)) not in values, "it was never loaded"
    assert value("memory_budget_bytes", device="cpu") == 100
    assert value("memory_bytes", model_name="B", device="cpu", kind="weights") == 60
    assert value("model_leases", model_name="B") == 0
    of_models = {dict(labels).get("model_name") for name, labels in values if name.startswith("megpt_model_")}
    assert of_models == set("ABC") and not any("model" in dict(labels) for _, labels in values)

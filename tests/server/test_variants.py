"""Variants over HTTP, with fake engines: what clients, operators and administrators see."""

from __future__ import annotations

import re
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from memory_efficient_gpt.engine_info import EngineStats
from memory_efficient_gpt_server.registry.choice import Choices
from memory_efficient_gpt_server.registry.variants import VariantKey
from tests.server.conftest import Serve
from tests.server.registry.fake_engines import FakeHost
from tests.server.scripted_model import ScriptedEngine
from tests.server.staged_models import Stage, Start
from tests.server.test_bad_requests import assert_error

INT4, KV8 = VariantKey("A", "int4"), VariantKey("A", kv_cache_dtype="int8")
AS_INT4 = {"optimizations": {"quantization": "int4"}}


def host() -> FakeHost:
    """A takes 60 bytes, its variants 30, B 80, of 100."""
    made = FakeHost(sizes={"B": 80, str(INT4): 30, str(KV8): 30})
    made.choices["A"] = Choices((INT4, KV8))
    return made


def variants(s: Stage, model: str = "A") -> dict[str, str]:
    return {v["variant"]: v["state"] for v in s.client.get(f"/v1/models/{model}").json()["variants"]}


@pytest.mark.parametrize("streams", [False, True])
def test_a_wish_loads_its_variant_and_is_served_by_it(stage: Start, streams: bool) -> None:
    with stage(host()) as s:
        cold = s.ask("A", stream=streams, **AS_INT4)
        assert cold.status_code == 200 and cold.headers["x-megpt-model-state"] == "unloaded"
        assert variants(s) == {"A": "unloaded", str(INT4): "ready", str(KV8): "unloaded"}
        warm = s.ask("A", on_cold="fail", **AS_INT4)
        assert warm.status_code == 200 and warm.headers["x-megpt-model-state"] == "ready"
        assert len(s.host.engine(str(INT4)).requests) == 2 and "A" not in s.host.engines


def test_on_cold_fail_is_about_the_variant(stage: Start) -> None:
    with stage(host()) as s:
        assert s.ask("A").status_code == 200
        refused = s.ask("A", on_cold="fail", **AS_INT4)
        assert_error(refused, 503, code="model_loading")
        assert refused.headers["x-should-retry"] == "false", "nothing loads it"
        assert "A[quantization=int4] is unloaded" in refused.text and str(INT4) not in s.host.engines


def test_a_load_of_a_variant_is_waited_for_and_timed(stage: Start) -> None:
    made = host()
    made.held = {str(INT4)}
    made.fails = {str(KV8): "no kernel for it"}
    with stage(made) as s:
        begun = s.client.post("/admin/models/A/load", json=AS_INT4)
        assert (begun.status_code, begun.json()["variant"], begun.json()["state"]) == (
            202,
            str(INT4),
            "loading",
        )
        s.finish_load(str(INT4))
        assert int(s.ask("A", **AS_INT4).headers["x-megpt-load-ms"]) >= 0
        failed = s.ask("A", optimizations={"kv_cache_dtype": "int8"})
        assert_error(failed, 500, code="load_failed")
        assert "A[kv=int8]" in failed.text and "no kernel for it" in failed.text


@pytest.mark.parametrize(
    ("wish", "param", "said"),
    [({"quantization": "int8"}, "quantization", "It can also be had as int4"),
     ({"quantization": "int4", "kv_cache_dtype": "int8"}, "quantization", "int4 with a KV cache in int8 was"),
     ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype", "a KV cache in fp8 was asked for"),
     ({"quantization": "int5"}, "quantization", "int5"),
     ({"kv_cache_dtype": "int3"}, "kv_cache_dtype", "must be auto, float32")],
)  # fmt: skip
def test_what_the_operator_does_not_allow_is_400_and_loads_nothing(
    stage: Start, wish: dict[str, str], param: str, said: str
) -> None:
    with stage(host()) as s:
        for answer in (s.ask("A", optimizations=wish), s.client.post(
            "/admin/models/A/load", json={"optimizations": wish}
        )):  # fmt: skip
            assert_error(answer, 400, param=f"optimizations.{param}")
            assert said in answer.json()["error"]["message"]
        assert_error(s.ask("B", **AS_INT4), 400, param="optimizations.quantization")
        assert not s.host.engines and s.live.server.admission.sequences == 0


def test_without_a_budget_the_remedy_is_named(serve: Serve) -> None:
    with serve(ScriptedEngine([5])) as live, live.client() as client:
        answer = client.post("/v1/completions", json={"model": "demo", "prompt": "a", **AS_INT4})
        assert_error(answer, 400, param="optimizations.quantization")
        assert "memory_budget_bytes" in answer.text and "variants" in answer.text
        assert "variants" not in client.get("/v1/models/demo").json()


def test_attention_is_checked_against_the_variant_that_was_chosen(stage: Start) -> None:
    with stage(host()) as s:
        wish = {"quantization": "int4", "attention": "flash"}
        assert_error(s.ask("A", optimizations=wish), 400, param="optimizations.attention")


def test_administrators_load_plan_and_unload_variants(stage: Start) -> None:
    with stage(host()) as s:
        plan = s.client.post("/admin/plan", json={"model": "A", **AS_INT4}).json()
        assert (plan["model"], plan["variant"], plan["needed_bytes"]) == ("A", str(INT4), {"cpu": 30})
        own = s.client.post("/admin/models/A/load", json={"wait": True}).json()
        both = s.client.post("/admin/models/A/load", json={"wait": True, **AS_INT4}).json()
        assert [(m["variant"], m["state"]) for m in (own, both)] == [("A", "ready"), (str(INT4), "ready")]
        third = s.client.post("/admin/plan", json={"model": "B"}).json()
        assert set(third["evict"]) == {"A", str(INT4)}
        owners = {e["owner"]: e["bytes"] for e in s.client.get("/admin/memory").json()["entries"]}
        assert owners == {"A": 60, str(INT4): 30}
        gone = s.client.post("/admin/models/A/unload", json={"wait": True, **AS_INT4}).json()
        assert (gone["variant"], gone["state"]) == (str(INT4), "unloaded") and s.state("A") == "ready"
        wrong = s.client.post("/admin/models/A/load", json={"optimizations": {"attention": "sdpa"}})
        assert_error(wrong, 400, param="optimizations.attention")


def test_a_plan_names_the_variants_that_would_fit_instead(stage: Start) -> None:
    made = FakeHost(sizes={"A": 200, str(INT4): 30, str(KV8): 150})
    made.choices["A"] = Choices((INT4, KV8))
    with stage(made) as s:
        plan = s.client.post("/admin/plan", json={"model": "A"}).json()
        assert (plan["verdict"], [a["variant"] for a in plan["alternatives"]]) == ("never", [str(INT4)])
        assert plan["alternatives"][0]["needed_bytes"] == {"cpu": 30}
        assert s.client.post("/admin/plan", json={"model": "B"}).json()["alternatives"] == []


def test_administrators_see_every_variant(stage: Start) -> None:
    made = host()
    made.entries["A"]["pinned"] = True
    with stage(made) as s:
        s.ask("A", **AS_INT4)
        told = s.client.get("/admin/models/A").json()
        assert (told["variant"], told["state"], told["pinned"], told["any_variant"]) == (
            "A",
            "unloaded",
            True,
            False,
        )
        shown = {v["variant"]: v for v in told["variants"]}
        assert list(shown) == ["A", str(INT4), str(KV8)]
        assert shown[str(INT4)]["measured_bytes"] == {"weights": 30} and shown[str(INT4)]["last_load_s"] >= 0
        assert (shown[str(INT4)]["quantization"], shown[str(INT4)]["kv_cache_dtype"]) == ("int4", None)
        assert s.client.post("/admin/models/A/unload", json=AS_INT4).status_code in (200, 202), "not pinned"


def sample(s: Stage, name: str, *labels: str) -> float:
    """The sample with these values of labels."""
    for family in text_string_to_metric_families(s.client.get("/metrics").text):
        for found in family.samples:
            if found.name == name and set(found.labels.values()) == set(labels):
                return float(found.value)
    raise AssertionError(f"there is no {name} of {labels}")


def test_metrics_of_all_variants_are_under_the_models_name(stage: Start) -> None:
    with stage(host()) as s:
        s.ask("A")
        s.ask("A", **AS_INT4)
        s.host.engine("A").stats = EngineStats(generated_tokens=3, num_kv_blocks=10, num_free_blocks=10)
        s.host.engine(str(INT4)).stats = EngineStats(generated_tokens=4, num_kv_blocks=30, num_free_blocks=10)
        names = re.findall(r'model_name="([^"]*)"', s.client.get("/metrics").text)
        assert set(names) == {"A", "B", "C"}
        assert sample(s, "megpt_generation_tokens_total", "A") == 7
        assert sample(s, "megpt_kv_cache_usage_perc", "A") == 0.5
        assert sample(s, "megpt_memory_bytes", "A", "cpu", "weights") == 90
        assert sample(s, "megpt_model_loads_total", "A", "success") == 2
        s.client.post("/admin/models/A/unload", json={"wait": True})
        assert sample(s, "megpt_generation_tokens_total", "A") == 7, "a counter must not fall"
        assert sample(s, "megpt_model_state", "A", "ready") == 1
        assert sample(s, "megpt_model_state", "A", "unloaded") == 0
        assert sample(s, "megpt_model_ready", "A") == 1


def test_any_variant_may_be_chosen_if_the_operator_says_so(stage: Start) -> None:
    made = FakeHost(sizes={"A": 10})
    made.choices["A"] = Choices(any=True)
    made.impossible["A[quantization=fp8]"] = "fp8 is for CUDA."
    with stage(made) as s:
        wish: dict[str, Any] = {"quantization": "INT8-g64", "kv_cache_dtype": "bfloat16"}
        assert s.ask("A", optimizations=wish).status_code == 200
        assert variants(s) == {"A": "unloaded", "A[quantization=int8-g64,kv=bfloat16]": "ready"}
        impossible = s.ask("A", optimizations={"quantization": "fp8"})
        assert_error(impossible, 400, param="optimizations")
        assert "fp8 is for CUDA" in impossible.text
        assert s.client.get("/v1/models/A").json()["any_variant"] is True

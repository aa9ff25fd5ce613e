"""How a request wants to be computed: fulfilled or refused, never ignored; and what the headers tell."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import pytest

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt_server.optimizations import check_optimizations
from memory_efficient_gpt_server.schemas import Optimizations
from tests.server.conftest import LiveServer, Serve
from tests.server.registry.fake_engines import FakeHost
from tests.server.scripted_model import INFO, ScriptedEngine
from tests.server.staged_models import Stage
from tests.server.test_bad_requests import assert_error

BODY: dict[str, Any] = {"model": "demo", "prompt": "a", "max_tokens": 2}
INT4 = replace(INFO, quantization="int4", kv_cache_dtype="int8", attention_backend="torch")


def refusal(wanted: dict[str, Any]) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        check_optimizations(Optimizations(**wanted), "a", INT4, [("b", replace(INFO, quantization="int8"))])
    return caught.value


@pytest.mark.parametrize(
    "wanted",
    [{}, {"quantization": "int4"}, {"quantization": "INT4"}, {"kv_cache_dtype": "int8"},
     {"attention": "sdpa"}, {"quantization": "auto", "kv_cache_dtype": "auto", "attention": "auto"},
     {"prefix_cache": False}],
)  # fmt: skip
def test_what_a_model_is_served_with_is_granted(wanted: dict[str, Any]) -> None:
    check_optimizations(Optimizations(**wanted), "a", INT4, [])


def test_bf16_is_what_is_not_quantized() -> None:
    check_optimizations(Optimizations(quantization="none"), "a", INFO, [])
    assert "stored as int4; bf16 was asked for" in str(refusal({"quantization": "bf16"}))


def test_another_scheme_is_refused_with_the_models_that_have_it() -> None:
    error = refusal({"quantization": "int8"})
    assert error.param == "optimizations.quantization"
    assert "Model a is stored as int4; int8 was asked for; b would do." in str(error)
    assert "would do" not in str(refusal({"quantization": "int4-g128"}))


@pytest.mark.parametrize(
    ("wanted", "field", "words"),
    [({"quantization": "int5"}, "quantization", "unknown"),
     ({"kv_cache_dtype": "bfloat16"}, "kv_cache_dtype", "KV cache in int8; bfloat16 was asked for"),
     ({"attention": "lsh"}, "attention", "attention by torch; lsh was asked for"),
     ({"attention": "flash"}, "attention", "flash was asked for")],
)  # fmt: skip
def test_what_there_is_not_is_refused_by_its_field(wanted: dict[str, Any], field: str, words: str) -> None:
    error = refusal(wanted)
    assert error.param == f"optimizations.{field}" and words in str(error)


def test_a_refused_wish_reaches_the_client_and_no_engine(serve: Serve) -> None:
    engine = ScriptedEngine([5, 6, 7])
    with serve(engine) as live, live.client() as client:
        answer = client.post("/v1/completions", json={**BODY, "optimizations": {"quantization": "int8"}})
        assert_error(answer, 400, param="optimizations.quantization")
        answer = client.post("/v1/completions", json={**BODY, "optimizations": {"speculative": True}})
        assert answer.status_code == 400 and "speculative" in answer.text
    assert not engine.requests


@pytest.mark.parametrize(
    ("fields", "uses"),
    [({}, True), ({"optimizations": {"prefix_cache": False}}, False), ({"prefix_cache": False}, False),
     ({"prefix_cache": True, "optimizations": {"prefix_cache": True}}, True)],
)  # fmt: skip
def test_either_field_switches_the_prefix_cache_off(serve: Serve, fields: dict[str, Any], uses: bool) -> None:
    engine = ScriptedEngine([5, 6, 7])
    with serve(engine) as live, live.client() as client:
        assert client.post("/v1/completions", json={**BODY, **fields}).status_code == 200
    assert engine.requests[0].use_prefix_cache is uses


def test_fields_that_contradict_each_other_are_refused(live: LiveServer) -> None:
    body = {**BODY, "prefix_cache": True, "optimizations": {"prefix_cache": False}}
    with live.client() as client:
        assert_error(client.post("/v1/completions", json=body), 400, param="prefix_cache")


@pytest.mark.parametrize("streams", [True, False])
def test_answers_tell_the_models_state(live: LiveServer, streams: bool) -> None:
    with live.client() as client:
        headers = client.post("/v1/completions", json={**BODY, "stream": streams}).headers
    assert headers["x-megpt-model-state"] == "ready" and int(headers["x-megpt-load-ms"]) < 1000


def test_a_cold_model_is_waited_for_unless_the_request_says_fail(
    stage: Callable[..., AbstractContextManager[Stage]],
) -> None:
    with stage(FakeHost()) as s:
        assert_error(s.ask("A", on_cold="fail"), 503, code="model_loading")
        assert s.state("A") == "unloaded" and not s.host.engines
        cold = s.ask("A")
        assert cold.status_code == 200 and cold.headers["x-megpt-model-state"] == "unloaded"
        warm = s.ask("A", on_cold="fail")
        assert warm.status_code == 200 and warm.headers["x-megpt-model-state"] == "ready"

"""A small run of many models: every answer right and whole, the budget kept, nothing left behind."""

from __future__ import annotations

import time
from dataclasses import replace

import httpx
import pytest

from benchmarks.many_models import (
    Ledger,
    percentiles,
    read_metrics,
    running,
    settings_for,
    sound,
    summary,
    watched,
)
from benchmarks.model_traffic import (
    MAX_RETRIES,
    PROMPTS,
    Answer,
    Asked,
    References,
    by_chance,
    play,
    references,
    wrong,
)

PROMPT = 4  # eight tokens
MODELS = (
    {"id": "plain", "model": "demo-draft"},
    {"id": "eight", "model": "demo-draft", "quantization": "int8"},
    {"id": "four", "model": "demo-draft", "quantization": "int4"},
)
BUDGET_BYTES = 200_000_000
"""For two of them."""
REFUSED = {"error": {"code": "model_loading"}}
WHOLE = {
    "choices": [{"text": " was", "finish_reason": "length"}],
    "usage": {"completion_tokens": 1},
}
EVENT = 'data: {"choices": [{"text": " was", "finish_reason": "length"}]}\n\n'


async def answer_to(asked: Asked, *responses: httpx.Response) -> Answer:
    left, told = iter(responses), list[Answer]()
    transport = httpx.MockTransport(lambda _: next(left))
    async with httpx.AsyncClient(base_url="http://test", transport=transport) as client:
        await play(client, [iter([asked])], told.append)
    assert next(left, None) is None, "it asked too seldom"
    return told[0]


async def test_a_refusal_is_tried_again_after_the_time_that_it_names() -> None:
    refused = httpx.Response(503, json=REFUSED, headers={"retry-after": "1"})
    started = time.monotonic()
    answer = await answer_to(Asked("a", PROMPT, False), refused, httpx.Response(200, json=WHOLE))
    assert time.monotonic() - started >= 1
    assert (answer.text, answer.error, answer.retries) == (" was", None, ("503 model_loading",))


async def test_what_should_not_be_tried_again_is_not() -> None:
    never = httpx.Response(507, json=REFUSED, headers={"x-should-retry": "false"})
    assert (await answer_to(Asked("a", PROMPT, False), never)).error == "507 model_loading"
    assert (await answer_to(Asked("a", PROMPT, False), httpx.Response(400, json=REFUSED))).retries == ()
    late = httpx.Response(503, json=REFUSED, headers={"retry-after": "121"})
    assert (await answer_to(Asked("a", PROMPT, True), late)).error == "503 model_loading"


async def test_retries_come_to_an_end() -> None:
    refusals = [httpx.Response(500, json=REFUSED) for _ in range(MAX_RETRIES + 1)]
    answer = await answer_to(Asked("a", PROMPT, False), *refusals)
    assert answer.error == "500 model_loading" and len(answer.retries) == MAX_RETRIES


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (EVENT + "data: [DONE]\n\n", None),
        (EVENT, "cut"),
        (": waiting\n\n", "cut"),
        (EVENT + 'data: {"error": {"code": "load_failed"}}\n\ndata: [DONE]\n\n', "stream load_failed"),
    ],
    ids=["whole", "without its end", "nothing", "an error"],
)
async def test_a_stream_is_whole_only_with_its_end(body: str, error: str | None) -> None:
    answer = await answer_to(Asked("a", PROMPT, True), httpx.Response(200, text=body))
    assert answer.error == error and (answer.first_token_s is not None) == (EVENT in body)


def test_an_answer_is_wrong_if_its_text_or_its_end_differs() -> None:
    expected: References = {("a", PROMPT): (" was", "length")}
    right = Answer(Asked("a", PROMPT, False), " was", "length")
    assert wrong([right, replace(right, text="", error="cut")], expected) == []
    assert len(wrong([replace(right, text=" is"), replace(right, finish_reason="stop")], expected)) == 2


def test_time_is_told_apart_by_what_models_do() -> None:
    ledger = Ledger()
    memory = {"devices": {"cpu": {"budget_bytes": 9, "used_bytes": 5}}}
    for state, leases, waiting in (("ready", 1, 1), ("loading", 0, 1), ("ready", 0, 1), ("ready", 0, 0)):
        ledger.take(memory, [{"state": state, "leases": leases, "waiting": waiting}])
    assert (ledger.budget_bytes, ledger.most_booked_bytes) == (9, 5)
    assert dict(ledger.activity) == {"computing": 1, "loading": 1, "standing still": 1, "nothing": 1}


def test_percentiles_are_values_that_were_measured() -> None:
    assert percentiles([4.0, 1.0, 2.0, 3.0]) == {"p50": 2.0, "p95": 4.0, "p99": 4.0, "max": 4.0}
    assert percentiles([]) == {}


def test_metrics_are_summed_over_models() -> None:
    text = (
        'megpt_model_loads_total{model_name="a",result="success"} 2.0\n'
        'megpt_model_loads_total{model_name="b",result="success"} 1.0\n'
        'megpt_model_loads_total{model_name="b",result="failure"} 1.0\n'
        'megpt_model_load_seconds_sum{model_name="a"} 1.5\n'
        'megpt_model_evictions_total{model_name="a",reason="budget"} 4.0\n'
    )
    told = read_metrics(text)
    assert (told["loads"], told["loads_failed"], told["load_s_mean"]) == (3, 1, 0.5)
    assert told["evictions"] == {"budget": 4, "overcommit": 0, "ttl": 0, "admin": 0}


def test_chance_is_the_seeds() -> None:
    def some(seed: str) -> list[Asked]:
        chosen = by_chance(["a", "b"], seed, time.monotonic() + 60)
        return [next(chosen) for _ in range(20)]

    assert some("0-1") == some("0-1") != some("0-2")
    assert list(by_chance(["a"], "0", time.monotonic())) == []


@pytest.mark.slow
async def test_three_models_in_room_for_two_answer_as_they_do_alone() -> None:
    ids = [str(model["id"]) for model in MODELS]
    clients = [
        iter([Asked(ids[(n + k) % 3], (n + k) % len(PROMPTS), n % 2 == 0) for k in range(4)])
        for n in range(6)
    ]
    async with running(settings_for(MODELS, BUDGET_BYTES)) as (server, client):
        expected = await references(client, ids)
        run = await watched(server, client, clients, lambda _: None)
    figures = summary(run, expected)
    assert sound(figures), figures
    assert figures["answered"] == 24 and figures["streams_cut"] == 0 and figures["retried"] == {}
    assert figures["evictions"]["budget"] >= 1 and figures["memory"]["samples"] > 0
    assert 0 < figures["memory"]["most_booked_bytes"] <= figures["memory"]["budget_bytes"] == BUDGET_BYTES
    assert figures["shutdown"]["workers_seen"] >= 2

"""The official client against the server: every method it claims, sync and async, streaming and not."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from memory_efficient_gpt.tokenizer import Tokenizer
from tests.server.conftest import ANSWER, LiveServer, Serve
from tests.server.scripted_model import ScriptedEngine

USER: list[Any] = [{"role": "user", "content": "Tell me about the house."}]


def test_completion(live: LiveServer) -> None:
    answer = live.openai().completions.create(model="demo", prompt="Once", max_tokens=100)
    assert answer.id.startswith("cmpl-") and answer.model == "demo"
    (choice,) = answer.choices
    assert (choice.text, choice.finish_reason, choice.index, choice.logprobs) == (ANSWER, "stop", 0, None)
    assert answer.usage is not None and answer.usage.total_tokens == (
        answer.usage.prompt_tokens + answer.usage.completion_tokens
    )


def test_completion_defaults_to_16_tokens(live: LiveServer, tokenizer: Tokenizer) -> None:
    answer = live.openai().completions.create(model="demo", prompt="Once")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 16


def test_streamed_completion_equals_the_plain_one(live: LiveServer) -> None:
    stream = live.openai().completions.create(model="demo", prompt="Once", max_tokens=100, stream=True)
    chunks = list(stream)
    reasons: list[str | None] = [c.choices[0].finish_reason for c in chunks]
    assert "".join(c.choices[0].text for c in chunks) == ANSWER
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert len({c.id for c in chunks}) == 1 and len(chunks) > 3


def test_chat(live: LiveServer) -> None:
    answer = live.openai().chat.completions.create(model="demo", messages=USER)
    assert answer.object == "chat.completion"
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == (
        "assistant",
        ANSWER,
        "stop",
    )


def test_streamed_chat_begins_with_the_role_and_ends_with_the_reason(live: LiveServer) -> None:
    stream = live.openai().chat.completions.create(
        model="demo", messages=USER, stream=True, stream_options={"include_usage": True}
    )
    *chunks, usage = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == ANSWER
    assert chunks[-1].choices[0].finish_reason == "stop" and chunks[-1].choices[0].delta.content is None
    assert all(c.usage is None for c in chunks)
    assert usage.choices == [] and usage.usage is not None and usage.usage.completion_tokens > 3


def test_async_client(live: LiveServer) -> None:
    async def run() -> tuple[str, str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            plain = await client.chat.completions.create(model="demo", messages=USER)
            stream = await client.completions.create(model="demo", prompt="a", max_tokens=99, stream=True)
            text = "".join([chunk.choices[0].text async for chunk in stream])
            return plain.choices[0].message.content or "", text

    assert asyncio.run(run()) == (ANSWER, ANSWER)


def test_models(live: LiveServer) -> None:
    client = live.openai()
    assert [m.id for m in client.models.list()] == ["demo"]
    model = client.models.retrieve("demo")
    facts = model.model_dump()
    assert facts["object"] == "model" and facts["state"] == "ready" and facts["max_model_len"] == 512
    assert facts["tier"] == "B" and facts["weights_bytes"] == 1000 and facts["kv_cache_bytes"] == 2000
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("nothing")
    assert caught.value.code == "model_not_found"


def test_several_prompts_and_choices_are_numbered_in_order(live: LiveServer) -> None:
    answer = live.openai().completions.create(
        model="demo", prompt=["Once", "Twice and more"], n=2, echo=True, max_tokens=2, temperature=0.5
    )
    assert [c.index for c in answer.choices] == [0, 1, 2, 3]
    assert [c.text.startswith("Twice") for c in answer.choices] == [False, False, True, True]
    assert answer.usage is not None and answer.usage.completion_tokens == 8


def test_streams_of_several_choices_keep_them_apart(live: LiveServer) -> None:
    stream = live.openai().completions.create(
        model="demo", prompt=["a", "b"], n=3, max_tokens=50, stream=True, echo=True
    )
    texts: dict[int, str] = {}
    ends: list[int] = []
    for chunk in stream:
        reason: str | None = chunk.choices[0].finish_reason
        ends += [chunk.choices[0].index] if reason else []
        texts[chunk.choices[0].index] = texts.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert texts == {i: ("a" if i < 3 else "b") + ANSWER for i in range(6)}
    assert sorted(ends) == list(range(6))


def test_prompts_of_token_ids(live: LiveServer, tokenizer: Tokenizer) -> None:
    ids = list(tokenizer.encode("Once upon"))
    answer = live.openai().completions.create(model="demo", prompt=[ids, ids], echo=True, max_tokens=1)
    assert live.engine.requests[-1].prompt_token_ids == tuple(ids)
    assert all(c.text.startswith("Once upon") for c in answer.choices)


def test_stop_strings_cut_the_text_and_abort_the_sequence(live: LiveServer) -> None:
    answer = live.openai().completions.create(model="demo", prompt="a", max_tokens=99, stop=[" end", "zzz"])
    assert answer.choices[0].text == ANSWER[: ANSWER.index(" end")]
    assert answer.choices[0].finish_reason == "stop"
    assert live.engine.aborted[-1] == (live.engine.requests[-1].id, 0)
    streamed = live.openai().completions.create(
        model="demo", prompt="a", max_tokens=99, stop=" end", stream=True, n=2
    )
    assert sum(len(c.choices[0].text) for c in streamed) == 2 * ANSWER.index(" end")


def test_completion_logprobs(live: LiveServer) -> None:
    answer = live.openai().completions.create(model="demo", prompt="Once upon", max_tokens=3, logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.tokens is not None and logprobs.text_offset is not None
    assert "".join(logprobs.tokens) == answer.choices[0].text
    assert logprobs.token_logprobs == [-0.5] * 3 and logprobs.text_offset[0] == 0
    assert logprobs.top_logprobs is not None and all(len(top) == 2 for top in logprobs.top_logprobs)


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_scores_the_prompt(live: LiveServer, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "demo", "prompt": "Once upon", "max_tokens": 2, "logprobs": 0, "n": 2}
    answer: Any = live.openai().completions.create(**asked, echo=True, stream=stream)
    parts = [c.choices[0] for c in answer] if stream else answer.choices
    for index in range(2):
        mine = [p for p in parts if p.index == index]
        text = "".join(p.text for p in mine)
        tokens = [t for p in mine if p.logprobs for t in p.logprobs.tokens or []]
        scores = [s for p in mine if p.logprobs for s in p.logprobs.token_logprobs or []]
        offsets = [o for p in mine if p.logprobs for o in p.logprobs.text_offset or []]
        assert text.startswith("Once upon") and "".join(tokens) == text
        assert scores[0] is None and set(scores[1:]) == {-0.5}
        assert [text[o:].startswith(t) for o, t in zip(offsets, tokens, strict=True)] == [True] * len(tokens)


def test_echo_without_generation_scores_only_the_prompt(live: LiveServer) -> None:
    answer = live.openai().completions.create(
        model="demo", prompt="Once", max_tokens=0, echo=True, logprobs=1
    )
    assert answer.choices[0].text == "Once" and answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 0
    assert answer.choices[0].logprobs is not None and answer.choices[0].logprobs.tokens is not None
    assert "".join(answer.choices[0].logprobs.tokens) == "Once"


@pytest.mark.parametrize("stream", [False, True])
def test_chat_logprobs(live: LiveServer, stream: bool) -> None:
    asked: dict[str, Any] = {"model": "demo", "messages": USER, "max_completion_tokens": 3}
    create: Any = live.openai().chat.completions.create
    answer = create(**asked, logprobs=True, top_logprobs=2, stream=stream)
    parts = [c.choices[0] for c in answer] if stream else answer.choices
    content = [entry for p in parts if p.logprobs for entry in p.logprobs.content or []]
    assert len(content) == 3 and ANSWER.startswith("".join(entry.token for entry in content))
    assert all(len(entry.top_logprobs) == 2 and entry.logprob == -0.5 for entry in content)
    assert b"".join(bytes(entry.bytes or []) for entry in content).decode() == "".join(
        e.token for e in content
    )


def test_every_sampling_field_reaches_the_engine(live: LiveServer) -> None:
    live.openai().completions.create(
        model="demo", prompt="a", max_tokens=7, temperature=0.5, top_p=0.25, seed=11, presence_penalty=0.1,
        frequency_penalty=-0.2, logit_bias={"5": -3}, user="someone", n=1, best_of=1, stop=["q!"],
        extra_body={
            "top_k": 3, "min_p": 0.125, "repetition_penalty": 1.5, "min_tokens": 2, "stop_token_ids": [9],
            "ignore_eos": True, "cache_salt": "s", "prefix_cache": False,
        },
    )  # fmt: skip
    request = live.engine.requests[-1]
    p = request.params
    assert (p.max_tokens, p.temperature, p.top_p, p.seed, p.presence_penalty) == (7, 0.5, 0.25, 11, 0.1)
    assert (p.frequency_penalty, p.logit_bias, p.stop, p.top_k, p.min_p) == (-0.2, {5: -3}, ("q!",), 3, 0.125)
    assert (p.repetition_penalty, p.min_tokens, p.stop_token_ids, p.ignore_eos) == (1.5, 2, (9,), True)
    assert (request.cache_salt, request.use_prefix_cache) == (":s", False)


def test_absent_fields_take_the_models_own_defaults(serve: Serve, answer_ids: list[int]) -> None:
    with serve(ScriptedEngine(answer_ids), defaults={"temperature": 0.7, "top_k": 20, "top_p": 0.9}) as live:
        live.openai().chat.completions.create(
            model="demo", messages=USER, top_p=1.0, extra_body={"top_k": -1}
        )
        params = live.engine.requests[-1].params
        assert (params.temperature, params.top_k, params.top_p) == (0.7, None, 1.0)
        live.openai().chat.completions.create(model="demo", messages=USER)
        params = live.engine.requests[-1].params
        assert (params.temperature, params.top_k, params.top_p, params.max_tokens) == (0.7, 20, 0.9, None)


def test_usage_tells_cached_tokens(serve: Serve, answer_ids: list[int]) -> None:
    with serve(ScriptedEngine(answer_ids, cached_tokens=4)) as live:
        answer = live.openai().chat.completions.create(model="demo", messages=USER, n=2)
        assert answer.usage is not None and answer.usage.prompt_tokens_details is not None
        assert answer.usage.prompt_tokens_details.cached_tokens == 4


def test_tokenize_and_detokenize(live: LiveServer) -> None:
    with live.client() as client:
        got = client.post("/v1/tokenize", json={"model": "demo", "prompt": "Once upon"}).json()
        assert got["count"] == len(got["tokens"]) > 0 and got["max_model_len"] == 512
        back = client.post("/v1/detokenize", json={"model": "demo", "tokens": got["tokens"]}).json()
        assert back == {"prompt": "Once upon"}
        chat = client.post("/v1/tokenize", json={"model": "demo", "messages": USER}).json()
        assert chat["count"] > got["count"]

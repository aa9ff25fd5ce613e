"""A request that another engine began: what is left of it is exactly what that engine would have given."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.errors import ContextLengthError, InvalidRequestError
from memory_efficient_gpt.request import FinishReason, Request, SamplingParams, SequenceEvent, TokenLogprob
from tests.engine.test_core import VOCAB, make_engine, prompt, tiny_llama

STOP = 7


@dataclass
class Text:
    """One sequence as a client sees it, from however many engines it came."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[list[TokenLogprob | None]] = field(default_factory=list)
    finish: tuple[FinishReason, int | None] | None = None


class Client:
    """Takes events, and resumes what has not ended elsewhere."""

    def __init__(self, requests: list[Request]) -> None:
        self.requests = requests
        self.texts = {(r.id, i): Text() for r in requests for i in range(r.params.n)}

    def take(self, event: SequenceEvent) -> None:
        text = self.texts[event.request_id, event.index]
        assert event.error is None and text.finish is None
        text.tokens += event.token_ids
        text.logprobs += event.logprobs or []
        if event.prompt_logprobs is not None:
            text.prompt_logprobs.append(event.prompt_logprobs)
        if event.finish_reason is not None:
            text.finish = event.finish_reason, event.stop_token_id

    def left(self) -> list[Request]:
        texts = [[self.texts[r.id, i] for i in range(r.params.n)] for r in self.requests]
        return [
            replace(r, resumed_token_ids=tuple(None if t.finish else tuple(t.tokens) for t in mine))
            for r, mine in zip(self.requests, texts, strict=True)
            if any(t.finish is None for t in mine)
        ]


def requests() -> list[Request]:
    """Every way to choose and to end, with several texts of one request, in a batch that waits for slots."""
    kinds: list[dict[str, Any]] = [
        dict(temperature=0.0, logprobs=2, prompt_logprobs=1, n=2),
        dict(temperature=1.0, seed=7, n=3),
        dict(temperature=0.8, seed=8, top_p=0.8, top_k=20, logprobs=0),
        dict(temperature=1.2, seed=9, min_p=0.05, repetition_penalty=1.3, frequency_penalty=0.4),
        dict(temperature=1.0, seed=10, presence_penalty=1.0, frequency_penalty=0.5, n=2),
        dict(temperature=0.0, repetition_penalty=1.5),
        dict(temperature=0.7, seed=11, min_tokens=9, logit_bias={1: 8.0}),
        dict(temperature=0.9, seed=12, stop_token_ids=(STOP,), logit_bias={STOP: 3.0}, n=4),
    ]
    return [
        Request(
            id=f"r{number}",
            prompt_token_ids=prompt(number, 1 + 7 * number),
            params=SamplingParams(max_tokens=12 + number % 3, **kind),
        )
        for number, kind in enumerate(kinds)
    ]


def undisturbed() -> dict[tuple[str, int], Text]:
    texts: dict[tuple[str, int], Text] = {}
    engine = make_engine(max_num_seqs=8, prefix_cache=False)
    for request in requests():
        client = Client([request])
        run(engine, client, [request])
        texts |= client.texts
    return texts


def run(engine: Engine, client: Client, submitted: list[Request], steps: int = 10**6) -> None:
    for request in submitted:
        engine.submit(request)
    while engine.has_work and steps:
        for event in engine.step():
            client.take(event)
        steps -= 1


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, int], Text]:
    return undisturbed()


def assert_equal(got: dict[tuple[str, int], Text], expected: dict[tuple[str, int], Text]) -> None:
    for key, text in expected.items():
        assert got[key].tokens == text.tokens, key
        assert got[key].finish == text.finish, key
        assert [entry.token_id for entry in got[key].logprobs] == [e.token_id for e in text.logprobs]
        for mine, theirs in zip(got[key].logprobs, text.logprobs, strict=True):
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)
            assert [token for token, _ in mine.top] == [token for token, _ in theirs.top]
        assert len(got[key].prompt_logprobs) == len(text.prompt_logprobs) <= 1, key


OPTIONS = [
    dict(),
    dict(prefix_cache=False),
    dict(overlap=True),
    dict(max_batched_tokens=5, max_num_seqs=4),
    dict(num_kv_blocks=30, max_model_len=80, overlap=True),
    dict(native_kernels=False, block_size=16),
]


@pytest.mark.parametrize("cut", [0, 1, 2, 5, 9])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()))
def test_what_is_left_is_what_the_first_engine_would_have_given(
    options: dict[str, Any], cut: int, expected: dict[tuple[str, int], Text]
) -> None:
    client = Client(requests())
    run(make_engine(**options), client, client.requests, steps=cut)
    second = make_engine(**options)
    given = sum(len(text.tokens) for text in client.texts.values())
    run(second, client, client.left())
    assert_equal(client.texts, expected)
    total = sum(len(text.tokens) for text in client.texts.values())
    assert second.stats().generated_tokens == total - given
    assert second.stats().num_free_blocks == second.stats().num_kv_blocks
    assert second.stats().prefix_hits_tokens <= second.stats().prefix_queries_tokens


def test_a_text_can_be_resumed_at_every_token_again_and_again(expected: dict[tuple[str, int], Text]) -> None:
    client = Client(requests())
    while left := client.left():
        run(make_engine(), client, left, steps=2)
    assert_equal(client.texts, expected)


def test_some_sequences_ended_some_began_and_some_did_not() -> None:
    params = SamplingParams(seed=3, max_tokens=10, n=4, ignore_eos=True)
    whole = Client([Request(id="r", prompt_token_ids=prompt(1, 9), params=params)])
    run(make_engine(), whole, whole.requests)
    texts = [tuple(whole.texts["r", index].tokens) for index in range(4)]
    part = Client(whole.requests)
    for index, count in enumerate((0, 3, 10, 9)):
        part.texts["r", index].tokens = list(texts[index][:count])
    part.texts["r", 2].finish = whole.texts["r", 2].finish
    (request,) = part.left()
    assert request.open_indices == (0, 1, 3)
    run(make_engine(), part, [request])
    assert part.texts == whole.texts


def test_resumed_sequences_are_aborted_like_others() -> None:
    engine = make_engine(prefix_cache=False)
    params = SamplingParams(seed=3, max_tokens=40, n=3, ignore_eos=True)
    request = Request(
        id="r", prompt_token_ids=prompt(1, 9), params=params, resumed_token_ids=((5, 6), None, (7,))
    )
    engine.submit(request)
    engine.abort("r", 1)  # has ended: nothing to abort
    engine.step()
    engine.abort("r", 0)
    assert {event.index for event in engine.step()} == {2}
    engine.abort("r")
    assert not engine.has_work
    assert engine.stats().num_free_blocks == engine.stats().num_kv_blocks


def test_prompt_logprobs_are_not_computed_again() -> None:
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=1, ignore_eos=True)
    ids = prompt(1, 20)
    first = Client([Request(id="a", prompt_token_ids=ids, params=params)])
    run(engine, first, first.requests, steps=2)
    engine.abort("a")
    engine.submit(replace(first.left()[0], id="b"))
    (event,) = engine.step()
    assert event.prompt_logprobs is None and event.num_cached_tokens == 0
    assert engine.stats().prefix_hits_tokens == 20  # they would need every position's logits


def test_tokens_found_in_the_prefix_cache_were_looked_for() -> None:
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    first = Client([Request(id="a", prompt_token_ids=(5, 6), params=params)])
    run(engine, first, first.requests)
    engine.submit(
        replace(first.requests[0], id="b", resumed_token_ids=(tuple(first.texts["a", 0].tokens[:30]),))
    )
    engine.step()
    stats = engine.stats()
    assert (stats.prefix_hits_tokens, stats.prefix_queries_tokens) == (28, 2 + 32)


def test_transformers_own_generation_goes_on_too() -> None:
    def engine() -> Engine:
        return Engine.from_model(tiny_llama(), EngineConfig(model="tiny", tier="C"))

    params = SamplingParams(temperature=0.9, seed=5, max_tokens=8, ignore_eos=True, frequency_penalty=0.5)
    whole = Client([Request(id="r", prompt_token_ids=prompt(1, 9), params=params)])
    run(engine(), whole, whole.requests)
    part = Client(whole.requests)
    run(engine(), part, part.requests, steps=3)
    assert 0 < len(part.texts["r", 0].tokens) < 8
    run(engine(), part, part.left())
    assert part.texts == whole.texts


@pytest.mark.parametrize(
    ("resumed", "error", "told"),
    [
        (((1,),), InvalidRequestError, "one entry|each of the 2"),
        ((None, None), InvalidRequestError, "0 sequences open"),
        (((1,), (VOCAB,)), InvalidRequestError, f"from 0 to {VOCAB - 1}, got {VOCAB}"),
        (((1,), (True,)), InvalidRequestError, "integers"),
        (((1,) * 300, ()), InvalidRequestError, "has 300 tokens; max_tokens is 200"),
        (((1,) * 200, None), InvalidRequestError, "so it has ended"),
    ],
)
def test_what_can_not_be_resumed_is_refused(
    resumed: tuple[tuple[int, ...] | None, ...], error: type[Exception], told: str
) -> None:
    params = SamplingParams(max_tokens=200, n=2)
    request = Request(id="r", prompt_token_ids=(5, 6), params=params, resumed_token_ids=resumed)
    with pytest.raises(error, match=told):
        make_engine().submit(request)


def test_what_does_not_fit_any_more_is_refused() -> None:
    request = Request(id="r", prompt_token_ids=(5, 6), resumed_token_ids=((7,) * 254,))
    with pytest.raises(ContextLengthError):
        make_engine(max_model_len=256).submit(request)
    engine = make_engine(max_model_len=256)
    engine.submit(replace(request, resumed_token_ids=((7,) * 253,)))
    assert engine.step()[0].finish_reason is not None

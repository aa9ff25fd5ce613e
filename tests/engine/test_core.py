"""The engine end to end on tiny models: whatever is in the batch, a request gives what it gives alone."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.errors import (
    ContextLengthError,
    EngineFailedError,
    InvalidRequestError,
    SamplingFailedError,
)
from memory_efficient_gpt.loading import resolve_model
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import load_kernels
from memory_efficient_gpt.request import FinishReason, Request, SamplingParams, SequenceEvent
from memory_efficient_gpt.tokenizer import Tokenizer

VOCAB = 96
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def tiny_llama() -> LlamaForCausalLM:
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, eos_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    torch.random.set_rng_state(state)
    return model


def make_engine(**options: Any) -> Engine:
    settings: dict[str, Any] = dict(num_kv_blocks=200, block_size=4, debug_checks=True)
    return Engine.from_model(tiny_llama(), EngineConfig(model="tiny", **(settings | options)))


Output = tuple[list[int], FinishReason | None]


def run(engine: Engine, requests: list[Request]) -> dict[tuple[str, int], Output]:
    for request in requests:
        engine.submit(request)
    return drain(engine)


def drain(engine: Engine) -> dict[tuple[str, int], Output]:
    outputs: dict[tuple[str, int], Output] = {}
    while engine.has_work:
        for event in engine.step():
            key = (event.request_id, event.index)
            tokens, _ = outputs.get(key, ([], None))
            outputs[key] = (tokens + event.token_ids, event.finish_reason)
            if event.error:
                raise event.error
    return outputs


def prompt(seed: int, length: int) -> tuple[int, ...]:
    rng = random.Random(seed)
    return tuple(rng.randint(2, VOCAB - 1) for _ in range(length))


def mixed_requests() -> list[Request]:
    """Greedy and sampled, with and without penalties, one and several texts, long and short."""
    kinds: list[dict[str, Any]] = [
        dict(temperature=0.0),
        dict(temperature=1.0, seed=7),
        dict(temperature=0.8, seed=8, top_p=0.8, top_k=20),
        dict(temperature=1.2, seed=9, min_p=0.05, repetition_penalty=1.3),
        dict(temperature=1.0, seed=10, presence_penalty=1.0, frequency_penalty=0.5, n=3),
        dict(temperature=0.0, logit_bias={5: 4.0, 6: -100.0}, min_tokens=6),
    ]
    return [
        Request(
            id=f"r{number}",
            prompt_token_ids=prompt(number, 3 + 11 * number % 37),
            params=SamplingParams(max_tokens=10 + number % 9, **kinds[number % len(kinds)]),
        )
        for number in range(18)
    ]


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, int], Output]:
    """Each request alone, in a fresh cache, one step at a time."""
    engine = make_engine(max_num_seqs=8, prefix_cache=False)
    outputs: dict[tuple[str, int], Output] = {}
    for request in mixed_requests():
        outputs |= run(engine, [request])
    return outputs


@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(overlap=True),
        dict(max_batched_tokens=5, max_num_seqs=4),
        dict(num_kv_blocks=24, max_model_len=80, overlap=True),
        dict(num_kv_blocks=24, max_model_len=80, max_batched_tokens=16),
        dict(native_kernels=False, block_size=16),
    ],
    ids=lambda o: ",".join(f"{k}={v}" for k, v in o.items()) or "default",
)
def test_batched_output_equals_the_request_alone(
    options: dict[str, Any], expected: dict[tuple[str, int], Output]
) -> None:
    engine = make_engine(**options)
    assert run(engine, mixed_requests()) == expected
    if "num_kv_blocks" in options:
        assert engine.stats().num_preemptions > 0
    assert engine.stats().num_free_blocks == engine.stats().num_kv_blocks


def test_second_time_comes_from_the_prefix_cache_and_is_equal() -> None:
    engine = make_engine()
    first = run(engine, [Request(id="a", prompt_token_ids=prompt(1, 41), params=GREEDY)])
    engine.submit(Request(id="b", prompt_token_ids=prompt(1, 41), params=GREEDY))
    events = engine.step()
    assert events[0].num_cached_tokens == 40
    second = drain(engine)
    assert events[0].token_ids + second["b", 0][0] == first["a", 0][0]


def test_seed_decides_and_different_texts_of_one_request_differ() -> None:
    engine = make_engine()
    params = SamplingParams(seed=3, max_tokens=12, n=4, ignore_eos=True)
    outputs = [run(engine, [Request(id=name, prompt_token_ids=prompt(1, 9), params=params)]) for name in "ab"]
    assert [outputs[0]["a", i] for i in range(4)] == [outputs[1]["b", i] for i in range(4)]
    assert len({tuple(tokens) for tokens, _ in outputs[0].values()}) == 4


def test_eos_ends_a_sequence_and_ignore_eos_does_not() -> None:
    engine = make_engine()
    bias = {1: 100.0}
    for ignore, reason, count in ((False, FinishReason.STOP, 0), (True, FinishReason.LENGTH, 5)):
        params = SamplingParams(temperature=0, max_tokens=5, logit_bias=bias, ignore_eos=ignore)
        (output,) = run(engine, [Request(id="r", prompt_token_ids=(5, 6), params=params)]).values()
        assert output[1] is reason and len(output[0]) == count


def test_min_tokens_holds_off_eos_and_stop_tokens() -> None:
    engine = make_engine()
    params = SamplingParams(
        temperature=0, max_tokens=9, min_tokens=4, logit_bias={1: 100.0, 7: 90.0}, stop_token_ids=(7,)
    )
    (output,) = run(engine, [Request(id="r", prompt_token_ids=(5, 6), params=params)]).values()
    assert len(output[0]) == 4 and output[1] is FinishReason.STOP


def test_stop_token_is_named_and_not_part_of_the_output() -> None:
    engine = make_engine()
    params = SamplingParams(temperature=0, max_tokens=9, logit_bias={7: 100.0}, stop_token_ids=(7,))
    engine.submit(Request(id="r", prompt_token_ids=(5, 6), params=params))
    (event,) = engine.step()
    assert (event.token_ids, event.stop_token_id) == ([], 7)


def test_logprobs_are_the_models_own_and_prompt_logprobs_match_a_plain_forward() -> None:
    engine = make_engine(max_batched_tokens=8)
    ids = prompt(4, 30)
    params = SamplingParams(temperature=0, max_tokens=3, logprobs=2, prompt_logprobs=1, ignore_eos=True)
    engine.submit(Request(id="r", prompt_token_ids=ids, params=params))
    events: list[SequenceEvent] = []
    while engine.has_work:
        events += engine.step()
    model = tiny_llama().eval()
    tokens = [t for e in events for t in e.token_ids]
    with torch.no_grad():
        reference = model(torch.tensor([[*ids, *tokens]])).logits[0].log_softmax(-1)
    assert events[0].prompt_logprobs is not None and events[0].prompt_logprobs[0] is None
    assert len(events[0].prompt_logprobs) == 30
    for position, entry in enumerate(events[0].prompt_logprobs[1:], start=1):
        assert entry is not None and entry.token_id == ids[position]
        assert entry.logprob == pytest.approx(reference[position - 1, ids[position]].item(), abs=1e-4)
    for number, event in enumerate(events):
        assert event.logprobs is not None
        (entry,) = event.logprobs
        assert entry.top[0][0] == tokens[number] and len(entry.top) == 2
        assert entry.logprob == pytest.approx(reference[29 + number].max().item(), abs=1e-4)


@pytest.mark.parametrize("turns", range(4))
def test_abort_frees_all_blocks_at_once(turns: int) -> None:
    engine = make_engine(prefix_cache=False, overlap=True)
    engine.submit(Request(id="r", prompt_token_ids=prompt(1, 50), params=GREEDY))
    for _ in range(turns):
        engine.step()
    engine.abort("r")
    assert engine.stats().num_free_blocks == engine.stats().num_kv_blocks
    assert drain(engine) == {}


@pytest.mark.parametrize("overlap", [False, True])
def test_prompt_logprobs_survive_preemption(overlap: bool) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True, prompt_logprobs=0)
    requests = [
        Request(id=str(i), prompt_token_ids=prompt(i, 11 + i), params=params, use_prefix_cache=False)
        for i in range(6)
    ]
    roomy, tight = make_engine(), make_engine(num_kv_blocks=24, max_model_len=60, overlap=overlap)
    scores: list[dict[str, list[float]]] = []
    for engine in (roomy, tight):
        for request in requests:
            engine.submit(request)
        scores.append({})
        while engine.has_work:
            for event in engine.step():
                if event.prompt_logprobs is not None:
                    assert event.prompt_logprobs[0] is None
                    scores[-1][event.request_id] = [e.logprob for e in event.prompt_logprobs if e is not None]
    assert tight.stats().num_preemptions > 0
    for request in requests:
        assert len(scores[1][request.id]) == len(request.prompt_token_ids) - 1
        assert scores[1][request.id] == pytest.approx(scores[0][request.id], abs=1e-4)


@pytest.mark.parametrize("overlap", [False, True])
def test_steps_are_counted_when_something_is_computed(overlap: bool) -> None:
    engine = make_engine(overlap=overlap)
    run(engine, [Request(id="r", prompt_token_ids=prompt(1, 5), params=GREEDY)])
    assert engine.stats().steps == GREEDY.max_tokens


@pytest.mark.parametrize("native_kernels", [True, False])
def test_broken_logits_end_one_request_and_leave_the_others_alone(native_kernels: bool) -> None:
    engine = make_engine(num_kv_blocks=8, max_model_len=24, prefix_cache=False, native_kernels=native_kernels)
    model: Any = engine._runner._model  # type: ignore[attr-defined]  # the fault goes where NaN would arise
    healthy = run(engine, [Request(id="ok", prompt_token_ids=prompt(1, 5), params=GREEDY)])
    poison = next(t for t in range(2, VOCAB) if t not in (*prompt(1, 5), *healthy["ok", 0][0]))
    with torch.no_grad():
        model.get_input_embeddings().weight[poison] = torch.nan
    engine.submit(Request(id="bad", prompt_token_ids=(5, poison, 6) * 4, params=GREEDY))
    events: list[SequenceEvent] = []
    for again in range(3):  # the later ones get blocks in which NaN was left behind
        engine.submit(Request(id=f"ok{again}", prompt_token_ids=prompt(1, 5), params=GREEDY))
        while engine.has_work:
            events += engine.step()
    (bad,) = [e for e in events if e.request_id == "bad"]
    assert isinstance(bad.error, SamplingFailedError) and bad.finish_reason is FinishReason.ERROR
    for again in range(3):
        tokens = [t for e in events if e.request_id == f"ok{again}" for t in e.token_ids]
        assert tokens == healthy["ok", 0][0]


@pytest.mark.parametrize(
    ("request_", "error", "message"),
    [
        (Request(id="r", prompt_token_ids=()), InvalidRequestError, "the prompt is empty"),
        (Request(id="r", prompt_token_ids=(VOCAB,)), InvalidRequestError, "from 0 to 95, got 96"),
        (Request(id="r", prompt_token_ids=(-1,)), InvalidRequestError, "from 0 to 95, got -1"),
        (Request(id="r", prompt_token_ids=(2, 3.0)), InvalidRequestError, "must be integers"),  # type: ignore[arg-type]
        (Request(id="r", prompt_token_ids=(True,)), InvalidRequestError, "must be integers"),
        (Request(id="r", prompt_token_ids=(2,) * 256), ContextLengthError, "256 tokens.*context is 256"),
        (
            Request(id="r", prompt_token_ids=(2,), params=SamplingParams(max_tokens=256)),
            ContextLengthError,
            "1 tokens plus max_tokens 256",
        ),
        (Request(id="", prompt_token_ids=(2,)), InvalidRequestError, "empty or already in use"),
        (Request(id="r", prompt_token_ids=(2,), adapter="x"), InvalidRequestError, "has no adapters"),
    ],
)
def test_impossible_request_is_refused_and_nothing_is_lost(
    request_: Request, error: type[Exception], message: str
) -> None:
    engine = make_engine()
    with pytest.raises(error, match=message):
        engine.submit(request_)
    assert not engine.has_work


def test_closed_engine_says_so() -> None:
    engine = make_engine()
    engine.submit(Request(id="r", prompt_token_ids=(2, 3), params=GREEDY))
    engine.close()
    assert not engine.has_work
    with pytest.raises(EngineFailedError, match="closed"):
        engine.submit(Request(id="s", prompt_token_ids=(2, 3)))


@pytest.fixture(scope="module")
def int8_expected() -> dict[tuple[str, int], Output]:
    engine = make_engine(kv_cache_dtype="int8", prefix_cache=False)
    outputs: dict[tuple[str, int], Output] = {}
    for request in mixed_requests():
        outputs |= run(engine, [request])
    return outputs


def test_int8_cache_gives_in_a_batch_what_it_gives_alone(
    int8_expected: dict[tuple[str, int], Output],
) -> None:
    assert run(make_engine(kv_cache_dtype="int8", max_batched_tokens=16), mixed_requests()) == int8_expected


@pytest.mark.parametrize("overlap", [False, True])
def test_int8_cache_survives_preemption_and_prefix_hits(
    overlap: bool, int8_expected: dict[tuple[str, int], Output]
) -> None:
    engine = make_engine(
        kv_cache_dtype="int8", num_kv_blocks=24, max_model_len=80, max_batched_tokens=16, overlap=overlap
    )
    assert run(engine, mixed_requests()) == int8_expected
    assert engine.stats().num_preemptions > 0
    before = engine.stats().prefix_hits_tokens
    # Latest first: in the first order each prompt would evict the cached blocks that the next one needs.
    assert run(engine, mixed_requests()[::-1]) == int8_expected
    assert engine.stats().prefix_hits_tokens > before
    assert engine.stats().num_free_blocks == engine.stats().num_kv_blocks


DEMO_TEXTS = (
    "The old house stood at the end of the lane, and nobody had lived in it since the winter when",
    "The old house stood at the end of the lane, and nobody had lived in it; but one evening a light",
    "“Who is there?” cried the old man, and he took up his lantern and went slowly to the door, for",
    "It was",
)


def demo_requests() -> list[Request]:
    tokenizer = Tokenizer.load(resolve_model("demo"))
    return [
        Request(
            id=f"{number}-{seed}",
            prompt_token_ids=tuple(tokenizer.encode(text)),
            params=SamplingParams(temperature=0.8, top_p=0.95, seed=seed, max_tokens=24, ignore_eos=True),
        )
        for seed in range(3)
        for number, text in enumerate(DEMO_TEXTS)
    ]


def load_demo(**options: Any) -> Engine:
    return Engine.load(EngineConfig(model="demo", device="cpu", dtype="bfloat16", **options))


@pytest.fixture(scope="module")
def demo_expected() -> dict[tuple[str, int], Output]:
    if isinstance(kernels := load_kernels(), Unavailable):
        pytest.skip(kernels.reason)
    engine = load_demo(prefix_cache=False, num_kv_blocks=100)
    outputs: dict[tuple[str, int], Output] = {}
    for request in demo_requests():
        outputs |= run(engine, [request])
    assert engine.stats().num_preemptions == 0
    return outputs


@pytest.mark.parametrize("overlap", [False, True])
def test_bfloat16_gives_in_a_batch_what_it_gives_alone(
    overlap: bool, demo_expected: dict[tuple[str, int], Output]
) -> None:
    engine = load_demo(num_kv_blocks=12, max_batched_tokens=16, overlap=overlap, debug_checks=True)
    assert (engine.info.dtype, engine.info.attention_backend) == ("bfloat16", "cpu-native")
    assert run(engine, demo_requests()) == demo_expected
    assert engine.stats().num_preemptions > 0
    before = engine.stats().prefix_hits_tokens
    assert run(engine, demo_requests()) == demo_expected
    assert engine.stats().prefix_hits_tokens > before
    assert engine.stats().num_free_blocks == engine.stats().num_kv_blocks


def test_the_demo_requests_have_different_outputs(demo_expected: dict[tuple[str, int], Output]) -> None:
    """Guards the test above: a request that got another one's tokens would be noticed."""
    assert len({tuple(tokens) for tokens, _ in demo_expected.values()}) == len(demo_expected)

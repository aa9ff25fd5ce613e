"""`deterministic`: a request gives the same tokens and the same bits of logprobs however it is computed."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch

from memory_efficient_gpt.assembly import DETERMINISTIC_NOTE
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.request import Request, SamplingParams, TokenLogprob

Output = tuple[list[int], list[TokenLogprob]]


def make_engine(**options: Any) -> Engine:
    settings: dict[str, Any] = dict(
        model="demo", deterministic=True, num_kv_blocks=120, block_size=8, debug_checks=True
    )
    return Engine.load(EngineConfig(**(settings | options)))


def requests(seed: int, count: int) -> list[Request]:
    """Prompts of 1 to 60 tokens, some of which begin alike; greedy and drawn."""
    rng = random.Random(seed)
    beginning = tuple(rng.randint(300, 2000) for _ in range(40))
    made = []
    for number in range(count):
        own = tuple(rng.randint(300, 2000) for _ in range(rng.randint(1, 20)))
        sampling: dict[str, Any] = rng.choice(
            [dict(temperature=0.0), dict(temperature=1.0, seed=number), dict(top_p=0.9, seed=number)]
        )
        params = SamplingParams(
            max_tokens=rng.randint(2, 14), ignore_eos=True, logprobs=number % 3 or None, **sampling
        )
        prompt = beginning[: rng.choice((0, 0, 17, 33, 40))] + own
        made.append(Request(id=f"{seed}-{number}", prompt_token_ids=prompt, params=params))
    return made


def run(engine: Engine, asked: list[Request], arrivals: random.Random | None = None) -> dict[str, Output]:
    """arrivals: submits a few at a time, between steps."""
    outputs: dict[str, Output] = {request.id: ([], []) for request in asked}
    waiting = list(asked)
    while waiting or engine.has_work:
        for _ in range(len(waiting) if arrivals is None else arrivals.randint(0, 3)):
            if waiting:
                engine.submit(waiting.pop(0))
        for event in engine.step():
            assert event.error is None
            outputs[event.request_id][0].extend(event.token_ids)
            outputs[event.request_id][1].extend(event.logprobs or ())
    return outputs


@pytest.fixture(scope="module", params=[{}, {"quantization": "int4", "kv_cache_dtype": "int8"}], ids=str)
def alone(request: pytest.FixtureRequest) -> tuple[dict[str, Any], dict[str, Output]]:
    """Options, and what each request gives with nothing beside it, whole, in a cache that knows no prefix."""
    engine = make_engine(max_num_seqs=1, prefix_cache=False, **request.param)
    outputs: dict[str, Output] = {}
    for seed in range(3):
        for each in requests(seed, 14):
            outputs |= run(engine, [each])
    engine.close()
    return request.param, outputs


@pytest.mark.parametrize(
    "options",
    [
        dict(max_batched_tokens=512),
        dict(max_batched_tokens=5),
        dict(max_batched_tokens=23, overlap=True),
        dict(num_kv_blocks=16, max_model_len=80, max_batched_tokens=64),
        dict(num_threads=2),
        dict(max_batched_tokens=64, record_steps=False),
    ],
    ids=str,
)
def test_random_traffic_changes_nothing(
    options: dict[str, Any], alone: tuple[dict[str, Any], dict[str, Output]]
) -> None:
    threads = torch.get_num_threads()
    try:
        engine = make_engine(**alone[0], **options)
        for seed in range(3):
            got = run(engine, requests(seed, 14), random.Random(seed))
            assert got == {name: alone[1][name] for name in got}
        stats = engine.stats()
        assert stats.prefix_hits_tokens > 0
        assert stats.num_preemptions > 0 or "num_kv_blocks" not in options
    finally:
        torch.set_num_threads(threads)
    assert DETERMINISTIC_NOTE in engine.info.notes
    engine.close()


def test_a_prompt_that_goes_on_from_an_answer_finds_it_in_the_cache_and_changes_nothing() -> None:
    """The answer's keys were computed token by token, those of a prompt are computed together."""
    engine, plain = make_engine(), make_engine(prefix_cache=False)
    first = requests(0, 1)[0]
    first = replace(first, params=replace(first.params, max_tokens=30))
    answer = run(engine, [first])[first.id][0]
    longer = replace(first, id="longer", prompt_token_ids=(*first.prompt_token_ids, *answer, 400, 401))
    before = engine.stats().prefix_hits_tokens
    assert run(engine, [longer]) == run(plain, [longer])
    assert engine.stats().prefix_hits_tokens - before > len(first.prompt_token_ids)
    engine.close()
    plain.close()


@pytest.mark.parametrize("options", [{"quantization": "fp8"}, {"quantization": "fp8-dynamic"}], ids=str)
def test_what_can_not_keep_it_is_refused_with_the_cause(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"can't be deterministic on cpu.*multiplied by.*[Tt]ry"):
        make_engine(**options)


def test_a_model_of_tier_c_computes_each_sequence_alone() -> None:
    engine = make_engine(tier="C", block_size=None, num_kv_blocks=None)
    assert "deterministic: each sequence is computed alone" in engine.info.notes
    asked = [replace(each, params=replace(each.params, logprobs=None)) for each in requests(0, 3)]
    alone = {name: output for each in asked for name, output in run(engine, [each]).items()}
    assert run(engine, asked) == alone
    engine.close()


def test_without_native_kernels_it_is_refused_before_anything_is_loaded() -> None:
    with pytest.raises(ConfigError, match="deterministic needs native_kernels"):
        EngineConfig(model="no such model", deterministic=True, native_kernels=False)

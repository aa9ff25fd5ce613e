"""Tier C: models that can't be packed are served one at a time, equal to transformers' own generate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
)

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.request import FinishReason, Request, SamplingParams, SequenceEvent

PROMPTS = [(5, 6, 7), (9, 8, 7, 6, 5, 4, 3, 11), (20,)]


def bloom() -> PreTrainedModel:
    return BloomForCausalLM(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.4)
    )


def mamba() -> PreTrainedModel:
    return MambaForCausalLM(
        MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8, initializer_range=0.4)
    )


def make(build: Any) -> tuple[PreTrainedModel, Engine]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = build().eval()
    return model, Engine.from_model(model, EngineConfig(model="tiny", debug_checks=True))


def collect(engine: Engine) -> list[SequenceEvent]:
    events: list[SequenceEvent] = []
    while engine.has_work:
        events += engine.step()
    return events


@pytest.mark.parametrize("build", [bloom, mamba])
def test_greedy_equals_generate_for_requests_submitted_together(build: Any) -> None:
    model, engine = make(build)
    assert engine.info.tier == "C" and engine.info.tier_reason
    params = SamplingParams(temperature=0.0, max_tokens=10, ignore_eos=True)
    for number, prompt in enumerate(PROMPTS):
        engine.submit(Request(id=str(number), prompt_token_ids=prompt, params=params))
    own = model.generation_config
    events = collect(engine)
    assert model.generation_config is own  # plain calls of generate keep the checkpoint's defaults
    generate: Any = model.generate
    model.generation_config = GenerationConfig()  # the end token is ignored here, too
    config = GenerationConfig(max_new_tokens=10, do_sample=False, pad_token_id=0)
    for number, prompt in enumerate(PROMPTS):
        tokens = [t for e in events if e.request_id == str(number) for t in e.token_ids]
        ids = torch.tensor([prompt])
        expected = generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        assert tokens == expected[0, len(prompt) :].tolist()


def test_a_long_prompt_is_computed_whole_while_another_request_waits() -> None:
    _, engine = make(bloom)
    long = tuple(2 + i % 20 for i in range(engine.info.max_model_len // 2))
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    engine.submit(Request(id="alone", prompt_token_ids=long, params=params))
    alone = [t for e in collect(engine) for t in e.token_ids]
    engine.submit(Request(id="first", prompt_token_ids=long, params=params))
    engine.submit(Request(id="second", prompt_token_ids=long, params=params))
    events = collect(engine)
    for name in ("first", "second"):
        assert [t for e in events if e.request_id == name for t in e.token_ids] == alone


def test_several_texts_and_seeds_work_one_after_the_other() -> None:
    _, engine = make(bloom)
    params = SamplingParams(seed=5, n=2, max_tokens=6, ignore_eos=True)
    outputs = []
    for name in "ab":
        engine.submit(Request(id=name, prompt_token_ids=PROMPTS[0], params=params))
        events = collect(engine)
        outputs.append([[t for e in events if e.index == i for t in e.token_ids] for i in (0, 1)])
    assert outputs[0] == outputs[1] and outputs[0][0] != outputs[0][1]


def test_abort_in_the_middle_leaves_the_engine_ready_for_the_next() -> None:
    _, engine = make(bloom)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    engine.submit(Request(id="a", prompt_token_ids=PROMPTS[0], params=params))
    for _ in range(3):
        engine.step()
    engine.abort("a")
    assert not engine.has_work
    engine.submit(Request(id="b", prompt_token_ids=PROMPTS[1], params=params))
    events = collect(engine)
    assert sum(len(e.token_ids) for e in events) == 20
    assert events[-1].finish_reason is FinishReason.LENGTH


def test_prompt_logprobs_match_a_plain_forward() -> None:
    model, engine = make(bloom)
    params = SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=0, ignore_eos=True)
    engine.submit(Request(id="a", prompt_token_ids=PROMPTS[1], params=params))
    entries = collect(engine)[0].prompt_logprobs
    with torch.no_grad():
        reference = model(torch.tensor([PROMPTS[1]])).logits[0].log_softmax(-1)
    assert entries is not None and entries[0] is None
    for position, entry in enumerate(entries[1:], start=1):
        assert entry is not None
        expected = reference[position - 1, PROMPTS[1][position]].item()
        assert entry.logprob == pytest.approx(expected, abs=1e-4)


def test_failure_inside_the_model_reaches_the_caller() -> None:
    model, engine = make(bloom)

    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("planted")

    model.forward = broken
    engine.submit(Request(id="a", prompt_token_ids=PROMPTS[0]))
    with pytest.raises(RuntimeError, match="planted"):
        engine.step()
    engine.close()

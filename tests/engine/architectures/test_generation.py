"""Every packed architecture through the real engine: the tokens are those of transformers' own generate.

Eight prompts are submitted together, computed in chunks of a small token budget, preempted for want of KV
blocks, and submitted again so that they find their prefixes in the cache.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.kv_cache.geometry import probe_geometry
from memory_efficient_gpt.request import Request, SamplingParams
from tests.engine.architectures.configs import CASES, PACKED, UNPACKED, VOCAB_SIZE, Case

NEW_TOKENS = 8
PARAMS = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
LENGTHS = (1, 4, 9, 14, 19, 22, 27, 33)
SHARED_PREFIX = 13
"""The longer prompts begin with the same tokens, three full blocks of four and one more."""

# transformers 5.17 compiles a helper of gpt_bigcode with torch.jit at import.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


def make_prompts() -> list[list[int]]:
    draw = random.Random(5)
    prefix = [draw.randrange(3, VOCAB_SIZE) for _ in range(SHARED_PREFIX)]
    prompts = []
    for length in LENGTHS:
        shared = prefix if length > SHARED_PREFIX else []
        prompts.append(shared + [draw.randrange(3, VOCAB_SIZE) for _ in range(length - len(shared))])
    return prompts


def generated_alone(model: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of transformers' generate, one prompt at a time."""
    outputs = []
    generate: Any = model.generate
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(tokens[0, len(prompt) :].tolist())
    return outputs


def generated_together(engine: Engine, prompts: list[list[int]], round_name: str) -> list[list[int]]:
    outputs: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        outputs[f"{round_name}-{number}"] = []
        engine.submit(Request(id=f"{round_name}-{number}", prompt_token_ids=tuple(prompt), params=PARAMS))
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            outputs[event.request_id] += event.token_ids
    return list(outputs.values())


def tight_config(case: Case) -> EngineConfig:
    return EngineConfig(
        model=case.name,
        device="cpu",
        dtype="float32",
        block_size=4,
        num_kv_blocks=14,  # one sequence needs up to 11, all of them together 48
        max_num_seqs=8,
        max_batched_tokens=13,
        native_kernels=False,
        debug_checks=True,
    )


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_packed_generation_equals_transformers_generate(case: Case) -> None:
    model = case.model()
    prompts = make_prompts()
    wanted = generated_alone(model, prompts)
    engine = Engine.from_model(model, tight_config(case))
    assert engine.info.tier == "B"
    assert generated_together(engine, prompts, "first") == wanted
    if None in {layer.window for layer in probe_geometry(case.config())}:  # else sequences stop growing
        assert engine.stats().num_preemptions > 0
    before = engine.stats().prefix_hits_tokens
    assert generated_together(engine, prompts, "second") == wanted
    assert engine.stats().prefix_hits_tokens > before
    assert engine.stats().num_free_blocks == engine.stats().num_kv_blocks


@pytest.mark.parametrize("case", UNPACKED, ids=lambda case: case.name)
def test_refused_architectures_are_still_served_right(case: Case) -> None:
    model = case.model()
    prompts = make_prompts()[1:6:2]
    wanted = generated_alone(model, prompts)
    engine = Engine.from_model(model, tight_config(case))
    assert engine.info.tier == "C"
    assert generated_together(engine, prompts, "only") == wanted


def test_the_prompts_tell_models_apart() -> None:
    """Guards the tests above: outputs vary with the prompt and within it, so that equality says something."""
    outputs = generated_alone(CASES["llama"].model(), make_prompts())
    assert len({tuple(tokens) for tokens in outputs}) == len(LENGTHS)
    assert sum(len(set(tokens)) for tokens in outputs) > len(LENGTHS) * NEW_TOKENS / 2

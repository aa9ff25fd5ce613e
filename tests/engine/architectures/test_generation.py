"""Every packed architecture through the real engine: the tokens are those of transformers' own generate.

Eight prompts are submitted together, computed in chunks of a small token budget, preempted for want of KV
blocks, and submitted again so that they find their prefixes in the cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.kv_cache.geometry import probe_geometry
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import load_kernels
from memory_efficient_gpt.request import Request, SamplingParams
from memory_efficient_gpt.sequence import Step
from memory_efficient_gpt.step_sampling import PendingStep
from tests.engine.architectures.configs import CASES, PACKED, UNPACKED, VOCAB_SIZE, Case

LENGTHS = (1, 4, 9, 14, 19, 22, 27, 33)
SHARED_PREFIX = 13
"""The longer prompts begin with the same tokens, three full blocks of four and one more."""

# transformers 5.17 compiles a helper of gpt_bigcode with torch.jit at import.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@dataclass(frozen=True)
class Load:
    """How much is generated, and with how little: every load must force sequences out of the pool."""

    new_tokens: int
    block_size: int
    num_kv_blocks: int
    max_batched_tokens: int

    def config(self, case: Case, *, native_kernels: bool) -> EngineConfig:
        return EngineConfig(
            model=case.name,
            device="cpu",
            dtype="float32",
            block_size=self.block_size,
            num_kv_blocks=self.num_kv_blocks,
            max_num_seqs=8,
            max_batched_tokens=self.max_batched_tokens,
            native_kernels=native_kernels,
            debug_checks=True,
        )


# One sequence needs up to 11 blocks, all of them together 48.
TIGHT = Load(new_tokens=8, block_size=4, num_kv_blocks=14, max_batched_tokens=13)
# A sequence whose layers all have a window gives back what it has passed, so that it seldom needs more than
# its prompt did. With blocks twice the window it goes from one to two again and again, and is caught there.
TIGHT_FOR_WINDOWS = Load(new_tokens=40, block_size=16, num_kv_blocks=10, max_batched_tokens=24)


def tight_load(case: Case) -> Load:
    return TIGHT if None in {layer.window for layer in probe_geometry(case.config())} else TIGHT_FOR_WINDOWS


def make_prompts() -> list[list[int]]:
    draw = random.Random(5)
    prefix = [draw.randrange(3, VOCAB_SIZE) for _ in range(SHARED_PREFIX)]
    prompts = []
    for length in LENGTHS:
        shared = prefix if length > SHARED_PREFIX else []
        prompts.append(shared + [draw.randrange(3, VOCAB_SIZE) for _ in range(length - len(shared))])
    return prompts


def generated_alone(model: PreTrainedModel, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy tokens of transformers' generate, one prompt at a time."""
    outputs = []
    generate: Any = model.generate
    for prompt in prompts:
        ids = torch.tensor([prompt])
        tokens = generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        outputs.append(tokens[0, len(prompt) :].tolist())
    return outputs


@cache
def wanted_outputs(name: str, new_tokens: int) -> list[list[int]]:
    """What transformers generates for the prompts; kept, since several tests ask for it."""
    return generated_alone(CASES[name].model(), make_prompts(), new_tokens)


def generated_together(
    engine: Engine, prompts: list[list[int]], new_tokens: int, round_name: str
) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=new_tokens, ignore_eos=True)
    outputs: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        outputs[f"{round_name}-{number}"] = []
        engine.submit(Request(id=f"{round_name}-{number}", prompt_token_ids=tuple(prompt), params=params))
    while engine.has_work:
        for event in engine.step():
            assert event.error is None, event.error
            outputs[event.request_id] += event.token_ids
    return list(outputs.values())


def watch_prompt_parts(engine: Engine, patch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the chunks that end within their prompt; grows while `engine` runs."""
    runner = engine._runner
    launch: Callable[[Step], PendingStep] = runner.launch
    parts: list[int] = []

    def watched(step: Step) -> PendingStep:
        parts.extend(c.num_tokens for c in step.chunks if c.start + c.num_tokens < c.seq.prompt_len)
        return launch(step)

    patch.setattr(runner, "launch", watched)
    return parts


@pytest.fixture(params=[False, True], ids=["torch", "native"])
def native_kernels(request: pytest.FixtureRequest) -> bool:
    wanted = bool(request.param)
    if wanted and isinstance(kernels := load_kernels(), Unavailable):
        pytest.skip(kernels.reason)
    return wanted


@pytest.mark.parametrize("case", PACKED, ids=lambda case: case.name)
def test_packed_generation_equals_transformers_generate(
    case: Case, native_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = tight_load(case)
    prompts = make_prompts()
    wanted = wanted_outputs(case.name, load.new_tokens)
    engine = Engine.from_model(case.model(), load.config(case, native_kernels=native_kernels))
    assert engine.info.tier == "B"
    assert (engine.info.attention_backend == "cpu-native") == native_kernels
    prompt_parts = watch_prompt_parts(engine, monkeypatch)
    assert generated_together(engine, prompts, load.new_tokens, "first") == wanted
    assert engine.stats().num_preemptions > 0
    assert prompt_parts
    before = engine.stats().prefix_hits_tokens
    # Latest first: in the first order each prompt would evict the cached blocks that the next one needs.
    assert generated_together(engine, prompts[::-1], load.new_tokens, "second") == wanted[::-1]
    assert engine.stats().prefix_hits_tokens > before
    assert engine.stats().num_free_blocks == engine.stats().num_kv_blocks


@pytest.mark.parametrize("case", UNPACKED, ids=lambda case: case.name)
def test_refused_architectures_are_still_served_right(case: Case) -> None:
    wanted = wanted_outputs(case.name, TIGHT.new_tokens)
    engine = Engine.from_model(case.model(), TIGHT.config(case, native_kernels=False))
    assert engine.info.tier == "C"
    assert generated_together(engine, make_prompts(), TIGHT.new_tokens, "only") == wanted


def test_the_prompts_tell_models_apart() -> None:
    """Guards the tests above: outputs vary with the prompt and within it, so that equality says something."""
    outputs = wanted_outputs("llama", TIGHT.new_tokens)
    assert len({tuple(tokens) for tokens in outputs}) == len(LENGTHS)
    assert sum(len(set(tokens)) for tokens in outputs) > len(LENGTHS) * TIGHT.new_tokens / 2

"""Every architecture that runs packed, on a CUDA device: tokens and logits of the CPU's float32 reference."""

from __future__ import annotations

import random

import pytest
import torch
from transformers import PreTrainedModel

from memory_efficient_gpt.attention.model_setup import prepare_model
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.fusion.apply import fuse
from memory_efficient_gpt.fusion.merge import merge_linears
from memory_efficient_gpt.fusion.trial_run import packed_logits
from memory_efficient_gpt.kv_cache.geometry import probe_geometry
from memory_efficient_gpt.request import Request, SamplingParams
from tests.engine.architectures.configs import CASES, VOCAB_SIZE

# transformers 5.17 compiles a helper of gpt_bigcode with torch.jit at import.
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning"),
]

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
PACKED = [name for name, case in CASES.items() if case.tier == "B"]
_MIXTURES = ("mixtral", "gpt_oss", "deepseek_v2", "deepseek_v3", "dots1", "minimax_m2")
EXPERTS = [name for name in PACKED if "moe" in name or name in _MIXTURES]
"""In 16 bits a rounding may choose another expert."""
NOT_CAPTURED = ("gemma3n_text", "phimoe", "phimoe_window")
"""Their own code copies a constant from the host in every step, which no graph can hold."""


def tokens_of(model: PreTrainedModel, **options: object) -> tuple[dict[str, list[int]], Engine]:
    """Greedy tokens of a few requests of different lengths, twice: the second run replays graphs."""
    config = EngineConfig(model="tiny", num_kv_blocks=80, max_model_len=120, max_batched_tokens=48, **options)  # type: ignore[arg-type]
    engine = Engine.from_model(model, config)
    rng, tokens = random.Random(0), dict[str, list[int]]()
    prompts = [tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(1 + 11 * number)) for number in range(5)]
    for turn in range(2):
        for number, prompt in enumerate(prompts):
            params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
            engine.submit(Request(id=f"{turn}.{number}", prompt_token_ids=prompt, params=params))
        while engine.has_work:
            for event in engine.step():
                assert event.error is None, event.error
                tokens.setdefault(event.request_id, []).extend(event.token_ids)
    return tokens, engine


@pytest.mark.parametrize("name", PACKED)
def test_greedy_tokens_are_those_of_the_cpu_in_float32(name: str) -> None:
    expected, _ = tokens_of(CASES[name].model(), native_kernels=False, prefix_cache=False)
    model = CASES[name].model()
    torch.nn.Module.to(model, CUDA)
    got, engine = tokens_of(model, prefix_cache=False)
    assert got == expected
    assert engine.info.tier == ("B" if name in NOT_CAPTURED else "A"), engine.info.notes
    told = any("pinned" in note for note in engine.info.notes)
    assert told == (name in NOT_CAPTURED), engine.info.notes


@pytest.mark.parametrize("name", [name for name in PACKED if name not in EXPERTS])
def test_logits_in_bfloat16_are_near_those_of_the_cpu_in_float32(name: str) -> None:
    layers = probe_geometry(CASES[name].config())
    own = CASES[name].model()
    prepare_model(own)
    model = CASES[name].model()
    torch.nn.Module.to(model, CUDA, torch.bfloat16)
    prepare_model(model)
    merge_linears(model, lambda: packed_logits(model, layers, CUDA))
    fuse(model)
    with torch.inference_mode():
        want = packed_logits(own, layers, CPU)
        got = packed_logits(model, layers, CUDA).float().cpu()
    assert float((got - want).norm() / want.norm()) <= 0.05

"""Quantized models in the whole engine: right tokens, the same in any batch; wrong wishes are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from memory_efficient_gpt.api import LLM
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.loading import load_config, load_model, resolve_model
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import load_kernels
from memory_efficient_gpt.quantization.checkpoint import save_quantized
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import quantize_model
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.request import Request, SamplingParams
from tests.engine.quantization.test_model import dequantized_copy, quantized

PROMPTS = [tuple(range(5, 5 + length)) for length in (1, 4, 9, 17, 30)]
TEXTS = [
    f"The old house at the end of the lane had stood empty for many years, and {text}"
    for text in ("nobody knew", "one dark night", "my dear Watson,", "the children")
]


def greedy_tokens(engine: Engine, prompts: list[tuple[int, ...]], count: int) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=count, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.submit(Request(id=str(number), prompt_token_ids=prompt, params=params))
    tokens: dict[str, list[int]] = {str(number): [] for number in range(len(prompts))}
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            tokens[event.request_id] += event.token_ids
    return list(tokens.values())


def reference_tokens(model: Any, prompt: tuple[int, ...], count: int) -> list[int]:
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        output = model.generate(
            ids, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0,
            attention_mask=torch.ones_like(ids),
        )  # fmt: skip
    result: list[int] = output[0, len(prompt) :].tolist()
    return result


@pytest.mark.parametrize("scheme", ["int4", "int8", "int4-asym-g64", "fp8"])
@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "mixtral", "olmo"])
def test_the_engine_gives_the_tokens_of_the_dequantized_model(name: str, scheme: str) -> None:
    model = quantized(name, scheme)
    plain = dequantized_copy(name, model)
    want = [reference_tokens(plain, prompt, 8) for prompt in PROMPTS]
    config = EngineConfig(
        model="tiny", native_kernels=False, num_kv_blocks=12, block_size=8, max_batched_tokens=16,
        max_model_len=64,
    )  # fmt: skip
    engine = Engine.from_model(model, config)
    assert engine.info.quantization is not None
    assert greedy_tokens(engine, PROMPTS, 8) == want


@pytest.mark.parametrize("scheme", ["int4", "int8"])
def test_a_text_is_the_same_alone_and_in_a_batch_on_native_kernels(scheme: str) -> None:
    if isinstance(kernels := load_kernels(), Unavailable):
        pytest.skip(kernels.reason)
    options: dict[str, Any] = dict(
        quantization=scheme, num_kv_blocks=12, max_batched_tokens=24, progress=False
    )
    params = SamplingParams(temperature=0.8, top_p=0.95, seed=3, max_tokens=40)
    with LLM("demo", prefix_cache=False, **options) as llm:
        alone = [llm.generate(text, params).text for text in TEXTS]
    with LLM("demo", **options) as llm:
        for _ in range(2):
            together = [done.text for done in llm.generate(TEXTS, params, progress=False)]
            assert together == alone
        assert llm.stats.num_preemptions > 0 and llm.stats.prefix_hits_tokens > 0
    assert len(set(alone)) == len(TEXTS)


def test_a_saved_folder_gives_the_text_of_quantizing_at_load(tmp_path: Path) -> None:
    source = resolve_model("demo")
    model = load_model(source, load_config(source), dtype=torch.bfloat16, device=torch.device("cpu"))
    kernels = load_kernels()
    plan = uniform_plan(find_layers(model), parse_scheme("int4"))
    quantize_model(model, plan, kernels=None if isinstance(kernels, Unavailable) else kernels)
    save_quantized(model, tmp_path / "saved", source=source)
    params = SamplingParams(temperature=0.0, max_tokens=16)
    with LLM("demo", quantization="int4", progress=False) as now:
        want, facts = now.generate(TEXTS[0], params).text, now.info
    with LLM(tmp_path / "saved", progress=False) as saved:
        assert saved.generate(TEXTS[0], params).text == want
        assert saved.info.quantization == facts.quantization == "int4"
        assert saved.info.weights_bytes == facts.weights_bytes < 4_000_000


def test_facts_tell_scheme_and_bytes() -> None:
    with LLM("demo", quantization="int8", progress=False) as llm:
        assert llm.info.quantization == "int8"
        assert llm.info.weights_bytes < 0.55 * 2 * 4_984_064
        assert any("saved" in note for note in llm.info.notes)
        assert llm.info.vocab_size == 4096


def test_an_unknown_scheme_is_refused_before_anything_is_read() -> None:
    with pytest.raises(ConfigError, match="scheme 'int5' is unknown"):
        Engine.load(EngineConfig(model="/nowhere", quantization="int5"))


def test_another_scheme_for_a_quantized_folder_is_refused(tmp_path: Path) -> None:
    save_quantized(quantized("llama"), tmp_path / "saved")
    folder = str(tmp_path / "saved")
    assert (
        Engine.load(EngineConfig(model=folder, quantization="int4", num_kv_blocks=8)).info.quantization
        == "int4"
    )
    with pytest.raises(ConfigError, match="is quantized already, as int4; int8 was asked for"):
        Engine.load(EngineConfig(model=folder, quantization="int8"))

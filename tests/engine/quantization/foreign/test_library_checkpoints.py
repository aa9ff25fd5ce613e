"""Checkpoints of the formats' own libraries (see make_checkpoints.py): right weights, right tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import load_kernels
from memory_efficient_gpt.quantization.model import quantized_modules
from memory_efficient_gpt.quantization.modules import QuantizedModule
from memory_efficient_gpt.quantization.reordered import ReorderedLinear
from tests.engine.quantization.foreign.folders import float_twin, load
from tests.engine.quantization.test_engine import greedy_tokens, reference_tokens

FOLDER = Path(__file__).parent / "checkpoints"
SCHEMES = {
    "awq": "int4-asym-g16",
    "ct-fp8-dynamic": "fp8",
    "ct-fp8-static": "fp8",
    "ct-mixed": "mixed (int4-g16, int8-asym)",
    "ct-w4a16": "int4-g16",
    "ct-w4a16-asym": "int4-asym-g16",
    "ct-w8a16-asym": "int8-asym",
    "ct-w8a8-int8": "int8",
    "gptq-2bit": "int4-g16",
    "gptq-3bit": "int4-asym-g16",
    "gptq-4bit": "int4-g16",
    "gptq-4bit-asym": "int4-asym-g16",
    "gptq-8bit": "int8-asym",
    "gptq-v2-act-order": "int4-asym-g16",
}
TITLES = {"gptq": "GPTQ", "awq": "AWQ", "ct": "compressed-tensors"}
PROMPTS = [tuple(range(3, 3 + length)) for length in (1, 4, 9, 17)]


def test_every_checkpoint_is_tested() -> None:
    assert sorted(SCHEMES) == sorted(path.name for path in FOLDER.iterdir())


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_what_the_library_dequantizes(name: str) -> None:
    model = load(FOLDER / name)
    reference = load_file(FOLDER / name / "reference.safetensors")
    for key, want in reference.items():
        module = model.get_submodule(key.removesuffix(".weight"))
        assert isinstance(module, QuantizedModule)
        got, offsets = module.dequantize(torch.float32), module.quantized_weight.offsets
        if offsets is None:  # exact: the library's result is this one, rounded once to its dtype
            assert torch.equal(got.to(want.dtype), want), key
            continue
        rounded_offset = 2.0**-11 * float(offsets.float().abs().max() * module.quantized_weight.unit)
        limit = torch.finfo(want.dtype).eps * want.float().abs() + rounded_offset
        assert ((got - want.float()).abs() <= limit).all(), key
    assert len(reference) == len(quantized_modules(model))


@pytest.mark.parametrize("name", SCHEMES)
def test_the_engine_gives_the_tokens_of_the_dequantized_model(name: str) -> None:
    config = EngineConfig(
        model=str(FOLDER / name), dtype="float32", native_kernels=False, num_kv_blocks=12, block_size=8,
        max_batched_tokens=16,
    )  # fmt: skip
    twin = float_twin(load(FOLDER / name))
    want = [reference_tokens(twin, prompt, 8) for prompt in PROMPTS]
    engine = Engine.load(config)
    assert greedy_tokens(engine, PROMPTS, 8) == want
    assert len({tuple(tokens) for tokens in want}) > 1
    assert engine.info.quantization == SCHEMES[name]
    origin = next(title for key, title in TITLES.items() if name.startswith(key))
    assert any(f"in {origin} format" in note for note in engine.info.notes)
    quantizes_activations = name in ("ct-w8a8-int8", "ct-fp8-dynamic", "ct-fp8-static")
    assert any("input_activations" in note for note in engine.info.notes) == quantizes_activations


def test_activation_order_is_kept_in_the_layer() -> None:
    model = load(FOLDER / "gptq-v2-act-order")
    stored = load_file(FOLDER / "gptq-v2-act-order" / "model.safetensors")
    reordered = [m for m in quantized_modules(model) if isinstance(m, ReorderedLinear)]
    unsorted = [k for k, t in stored.items() if k.endswith("g_idx") and (t.diff() < 0).any()]
    assert 0 < len(unsorted) == len(reordered)


@pytest.mark.parametrize("name", ["awq", "gptq-v2-act-order"])
def test_native_kernels_take_every_layer_and_batches_equal_texts_alone(name: str) -> None:
    if isinstance(kernels := load_kernels(), Unavailable):
        pytest.skip(kernels.reason)
    engine = Engine.load(
        EngineConfig(
            model=str(FOLDER / name),
            num_kv_blocks=12,
            block_size=8,
            max_batched_tokens=16,
            prefix_cache=False,
        )
    )
    assert any("7 quantized" in note for note in engine.info.notes)
    alone = [greedy_tokens(engine, [prompt], 8)[0] for prompt in PROMPTS]
    assert greedy_tokens(engine, PROMPTS, 8) == alone

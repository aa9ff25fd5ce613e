"""Quantized models on a CUDA device: rounding, products, the engine, folders."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.fusion.merge import merge_linears
from memory_efficient_gpt.quantization import QuantizedModel
from memory_efficient_gpt.quantization import rounding as rounding_module
from memory_efficient_gpt.quantization.fp8 import fp8_linear
from memory_efficient_gpt.quantization.model import quantized_modules
from memory_efficient_gpt.quantization.rounding import quantize_weight
from memory_efficient_gpt.quantization.scheme import FP8_DYNAMIC, parse_scheme
from memory_efficient_gpt.request import Request, SamplingParams
from memory_efficient_gpt.triton_kernels.packing import TritonWeight

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = dict(
    vocab_size=192, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1,
)  # fmt: skip
SEARCHED = ["int4", "int4-g128", "int4-asym-g64", "int8", "int8-asym", "int4-channel"]


def small_model(dtype: torch.dtype = torch.bfloat16) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE))
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.parametrize("weighted", [False, True])
def test_the_search_on_the_device_is_as_good_as_torchs(
    name: str, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme = parse_scheme(name)
    weight = torch.randn(96, 300, device="cuda")
    importance = torch.rand(300, device="cuda") if weighted else None
    counts = importance if importance is not None else torch.ones(300, device="cuda")

    def error() -> float:
        got = quantize_weight(weight, scheme, importance=importance).dequantize()
        return float((counts * (got - weight).square()).sum())

    by_kernel = error()
    monkeypatch.setattr(rounding_module, "triton_obstacle", lambda device: "for this test")
    assert by_kernel == pytest.approx(error(), rel=1e-3)


@pytest.mark.parametrize("shape", [(64, 128), (48, 1040), (50, 130)])
@torch.inference_mode()
def test_fp8_products_are_those_of_the_rounded_inputs(shape: tuple[int, int]) -> None:
    weight = quantize_weight(torch.randn(*shape, device="cuda"), FP8_DYNAMIC, rounding="nearest")
    bias = torch.randn(shape[0], device="cuda", dtype=torch.bfloat16)
    x = torch.randn(2, 5, shape[1], device="cuda", dtype=torch.bfloat16)
    got = fp8_linear(x, weight, bias)
    want = fp8_linear(x.cpu(), weight.to("cpu"), bias.cpu())
    assert got.shape == want.shape and got.dtype is want.dtype
    assert float((got.cpu().float() - want.float()).norm() / want.float().norm()) < 0.01


@torch.inference_mode()
def test_a_row_rounded_to_fp8_alone_gives_what_it_gives_among_others() -> None:
    from memory_efficient_gpt.triton_kernels.fp8_rows import rows_to_fp8

    x = torch.randn(9, 300, device="cuda", dtype=torch.bfloat16)
    x[4] = 0.0
    codes, scales = rows_to_fp8(x, 448.0, 1e-12)
    for row in range(9):
        alone = rows_to_fp8(x[row : row + 1], 448.0, 1e-12)
        assert torch.equal(alone[0].view(torch.uint8), codes[row : row + 1].view(torch.uint8))
        assert torch.equal(alone[1], scales[row : row + 1])
    assert float((codes.float() * scales - x.float()).abs().max()) <= float(x.abs().max()) / 16


@pytest.mark.parametrize("scheme", ["int4", "int4-asym-g64", "int8", "fp8", "fp8-dynamic"])
@torch.inference_mode()
def test_a_model_on_the_device_gives_the_logits_of_its_dequantized_weights(scheme: str) -> None:
    model = QuantizedModel.from_model(small_model().to("cuda"), scheme=scheme)
    ids = torch.randint(0, 192, (2, 24), device="cuda")
    got = model(ids).logits.float()
    kinds = {type(module.packed_weight) for module in quantized_modules(model.model)}
    assert TritonWeight in kinds
    for module in quantized_modules(model.model):
        module.drop_kernels()
    want = model(ids).logits.float()
    assert float((got - want).norm() / want.norm()) < 0.02


@pytest.mark.parametrize("scheme", ["int4-g128", "int4-asym-g64", "int8", "fp8"])
def test_layers_of_one_input_share_a_product(scheme: str) -> None:
    model = QuantizedModel.from_model(small_model().to("cuda"), scheme=scheme).model
    ids = torch.randint(0, 192, (1, 24), device="cuda")
    with torch.inference_mode():
        want = model(ids).logits.float()
    report = merge_linears(model, lambda: model(ids).logits)
    assert report.merged == {2: 2}, report.summary()  # keys and values have half as many outputs as a tile
    with torch.inference_mode():
        got = model(ids).logits.float()
    assert float((got - want).norm() / want.norm()) < 0.01


@torch.inference_mode()
def test_a_saved_model_loads_to_the_same_weights_and_logits(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path / "plain")  # read again, its rotary frequencies are in float32
    model = QuantizedModel.from_pretrained(tmp_path / "plain", scheme="int4-g128", device="cuda")
    model.save_pretrained(tmp_path / "saved")
    again = QuantizedModel.from_pretrained(tmp_path / "saved", device="cuda")
    ids = torch.randint(0, 192, (1, 16), device="cuda")
    assert torch.equal(model(ids).logits, again(ids).logits)
    states = model.model.state_dict(), again.model.state_dict()
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@torch.inference_mode()
def test_a_model_moved_to_the_cpu_keeps_its_weights() -> None:
    model = small_model().to("cuda")
    held = QuantizedModel.from_model(model, scheme="int8")
    before = [module.dequantize(torch.float32).cpu() for module in quantized_modules(held.model)]
    model.to("cpu")
    after = [module.dequantize(torch.float32) for module in quantized_modules(held.model)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize(
    ("scheme", "kv_cache_dtype"), [("int4", "auto"), ("int8", "int8"), ("fp8-dynamic", "fp8")]
)
def test_the_engine_generates_alone_what_it_generates_in_a_batch_but_for_near_ties(
    scheme: str, kv_cache_dtype: Any, tmp_path: Path
) -> None:
    """Another number of rows is multiplied with another tile, in another order of sums."""
    small_model(torch.float16).save_pretrained(tmp_path)
    config = EngineConfig(
        model=str(tmp_path), device="cuda", quantization=scheme, kv_cache_dtype=kv_cache_dtype,
        num_kv_blocks=64, max_num_seqs=8, prefix_cache=False,
    )  # fmt: skip
    engine = Engine.load(config)
    assert engine.info.quantization == scheme and engine.info.device == "cuda:0"
    assert engine.info.kv_cache_dtype == ("float16" if kv_cache_dtype == "auto" else kv_cache_dtype)
    rng = random.Random(0)
    prompts = [tuple(rng.randrange(2, 190) for _ in range(7 + 9 * number)) for number in range(8)]
    together = run(engine, prompts)
    assert run(engine, prompts) == together
    alone = [run(engine, [prompt])[0] for prompt in prompts]
    same = sum(a[:4] == b[:4] for a, b in zip(together, alone, strict=True))
    assert same >= 6, (together, alone)


def run(engine: Engine, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    for number, prompt in enumerate(prompts):
        engine.submit(Request(id=str(number), prompt_token_ids=prompt, params=params))
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            tokens[int(event.request_id)] += event.token_ids
    return tokens

"""Stacked experts on another device than the CPU: what is recognised, and what is handed to the kernels.

The kernels' package needs Triton; a plain product stands in for it here.
"""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AttentionInterface

from memory_efficient_gpt.attention.model_setup import prepare_model
from memory_efficient_gpt.fusion import apply
from memory_efficient_gpt.fusion.apply import FusionReport, fuse
from memory_efficient_gpt.fusion.grouped_experts import GROUPED_EXPERTS, GroupedExperts, is_grouped_experts
from memory_efficient_gpt.fusion.structures import Kind
from memory_efficient_gpt.native.layers import LayerKernels
from memory_efficient_gpt.native.ops import Kernels
from memory_efficient_gpt.quantization.experts import QuantizedStack
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import quantize_model
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.quantization.triton_weights import pack_for_triton
from memory_efficient_gpt.triton_kernels.packing import TritonWeight
from tests.engine.architectures.configs import CASES
from tests.engine.triton_kernels import routed_reference

RECOGNISED = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss", "granitemoe", "glm4_moe", "dots1",
    "ernie4_5_moe", "minimax_m2", "phimoe", "deepseek_v3",
)  # fmt: skip
PACKAGE = "memory_efficient_gpt.triton_kernels"


class NoOtherKernels:
    """Takes CPU tensors, so that everything around the experts is what runs on a GPU."""

    label = "Triton kernels"
    device_type = "cpu"
    deterministic = False
    dtypes = frozenset((torch.float32, torch.bfloat16, torch.float16))

    def __deepcopy__(self, memo: dict[int, object]) -> NoOtherKernels:
        return self


def only_experts(kernels: LayerKernels | Kernels, kind: Kind) -> bool:
    return kind is GROUPED_EXPERTS


def dequantize(weight: TritonWeight, dtype: torch.dtype, rows: torch.Tensor) -> torch.Tensor:
    return routed_reference.floats_of(routed_reference.Stack(weight, 1))[0, rows].to(dtype)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module, linear = ModuleType(f"{PACKAGE}.experts"), ModuleType(f"{PACKAGE}.linear")
    for name in ("Stack", "Gate", "routed_mlp"):
        setattr(module, name, getattr(routed_reference, name))
    linear.dequantize = dequantize  # type: ignore[attr-defined]  # a module's
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(sys.modules, linear.__name__, linear)
    monkeypatch.setattr(apply, "_has_kernel", only_experts)
    monkeypatch.setattr(apply, "rotary_function", lambda kind: None)
    return module


def experts_of(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "gate_up_proj") and hasattr(m, "down_proj")]


def fused(model: nn.Module) -> FusionReport:
    return fuse(model, NoOtherKernels())  # type: ignore[arg-type]  # the other layers' functions are not used


@pytest.mark.parametrize("name", RECOGNISED)
@torch.no_grad()
def test_a_model_computes_what_it_did(name: str) -> None:
    model: Any = CASES[name].model()
    ids = torch.arange(2, 25).view(1, -1)
    want = model(ids).logits
    report = fused(model)
    count = sum(isinstance(m, GroupedExperts) for m in model.modules())
    assert report.replaced["experts"] == count > 0 and not report.dropped, report.summary()
    got = model(ids).logits
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


@torch.no_grad()
def test_packed_stacks_are_multiplied_as_they_are_stored() -> None:
    model: Any = CASES["mixtral"].model()
    quantize_model(model, uniform_plan(find_layers(model), parse_scheme("int4")))
    ids = torch.arange(2, 25).view(1, -1)
    want = model(ids).logits
    stacks = [m for m in model.modules() if isinstance(m, QuantizedStack)]
    for stack in stacks:
        stack.use_triton(pack_for_triton(stack.quantized_weight))
    report = FusionReport("")
    for module in model.modules():
        apply._fuse_module(module, NoOtherKernels(), report, {})  # type: ignore[arg-type]
    assert report.replaced["experts"] == len(stacks) // 2 and not report.dropped
    got = model(ids).logits
    assert float((got - want).abs().max()) <= 1e-4 * float(want.abs().max())


def test_stacks_that_are_not_packed_stay_with_their_own_code_and_are_reported() -> None:
    model: Any = CASES["mixtral"].model()
    quantize_model(model, uniform_plan(find_layers(model), parse_scheme("int4")))
    report = fused(model)
    assert report.replaced["experts"] == 0
    assert report.dropped["quantized", "experts without a kernel are dequantized one by one"] == 4


def test_a_kernel_that_differs_for_many_tokens_is_dropped_with_a_reason(stand_in: ModuleType) -> None:
    def wrong(x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        return routed_reference.routed_mlp(x, *arguments) + (1.0 if len(x) > 30 else 0.0)

    stand_in.routed_mlp = wrong  # type: ignore[attr-defined]  # a module's
    report = fused(CASES["qwen3_moe"].model())
    assert report.replaced["experts"] == 0
    assert any("differs by" in reason for kind, reason in report.dropped if kind == "experts")


@torch.no_grad()
def test_swapped_halves_and_sides_are_told_apart_by_numbers() -> None:
    model: Any = CASES["gpt_oss"].model()
    experts = next(m for m in experts_of(model) if type(m).__name__ == "GptOssExperts")
    model.set_experts_implementation("eager")
    del experts.is_concatenated, experts.is_transposed  # marks that not every version has
    settings = apply._judge(copy.deepcopy(experts), GROUPED_EXPERTS, NoOtherKernels())  # type: ignore[arg-type]
    assert isinstance(settings, dict), settings
    assert settings["interleaved"] and settings["transposed"] and settings["activation"] == "sigmoid"
    assert settings["limit"] == 7.0


@pytest.mark.parametrize("name", RECOGNISED)
@torch.no_grad()
def test_around_the_experts_nothing_is_read_by_the_host(name: str) -> None:
    """A tensor on the meta device has no values: routers that look at some would fail."""
    model: Any = CASES[name].model()
    prepare_model(model)
    AttentionInterface.register("of_no_values", attention_of_no_values)
    model.set_attn_implementation("of_no_values")
    for experts in experts_of(model):
        if is_grouped_experts(experts):
            experts.forward = lambda x, index, weights: torch.empty_like(x)
    nn.Module.to(model, "meta")
    ids = torch.zeros(1, 9, dtype=torch.int64, device="meta")
    assert model(ids, position_ids=ids, use_cache=False).logits.shape == (1, 9, model.config.vocab_size)


def attention_of_no_values(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    batch, heads, tokens, _size = query.shape
    return query.new_empty((batch, tokens, heads, value.shape[3])), None

"""Finding and merging layers of the same input: in every architecture, and only where nothing changes."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from memory_efficient_gpt.attention.model_setup import prepare_model
from memory_efficient_gpt.fusion.merge import MergeReport, merge_linears
from memory_efficient_gpt.fusion.merged_linear import DenseProduct, MergedLinear
from memory_efficient_gpt.fusion.trial_run import packed_logits
from memory_efficient_gpt.kv_cache.geometry import probe_geometry
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import quantize_model, weight_bytes
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.scheme import INT8
from tests.engine.architectures.configs import CASES, PACKED

CPU = torch.device("cpu")
# transformers 5.17 compiles a helper of gpt_bigcode with torch.jit at import.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")

MERGED = {
    "llama": {3: 2, 2: 2},  # q, k and v; gate and up; of two layers
    "qwen3": {3: 2, 2: 2},
    "gemma3_text": {3: 2, 2: 2},
    "starcoder2": {3: 2},
    "mixtral": {3: 2},
    "deepseek_v3": {2: 4},  # the compressed queries and keys; gate and up of a dense MLP or a shared expert
    "phi3": {},
    "gpt2": {},
}


@pytest.mark.parametrize("name", [case.name for case in PACKED])
def test_a_merged_model_computes_what_it_did(name: str) -> None:
    case = CASES[name]
    model, layers = case.model(), probe_geometry(case.config())
    prepare_model(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    num_bytes = weight_bytes(model)

    def run() -> torch.Tensor:
        return packed_logits(model, layers, CPU)

    with torch.inference_mode():
        want = run()
    report = merge_linears(model, run)
    with torch.inference_mode():
        got = run()
    assert not report.dropped
    if name in MERGED:
        assert dict(report.merged) == MERGED[name]
    assert float((got - want).abs().max()) <= 1e-5 * float(want.abs().max())
    after = model.state_dict()
    assert list(after) == list(before)
    assert weight_bytes(model) == num_bytes
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert not any("paged_kv" in vars(module) for module in model.modules())


class Attention(nn.Module):
    """Layers of one input, and what a test does with their results."""

    def __init__(self, *layers: nn.Module, use: Callable[[list[torch.Tensor]], Any] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.use = use

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parts = [layer(x) for layer in self.layers]
        if self.use is not None:
            self.use(parts)
        return torch.cat(parts, dim=-1)


def linears(*sizes: int, bias: bool = False, dtype: torch.dtype = torch.float32) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Linear(16, size, bias=bias, dtype=dtype) for size in sizes]


def run_of(model: nn.Module, dtype: torch.dtype = torch.float32) -> Callable[[], torch.Tensor]:
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).to(dtype)

    def run() -> torch.Tensor:
        result: torch.Tensor = model(x.clone())
        return result

    return run


def merge(model: nn.Module, dtype: torch.dtype = torch.float32) -> MergeReport:
    """The report; the model must compute afterwards what it did."""
    run = run_of(model, dtype)
    with torch.inference_mode():
        want = run()
        model_report = merge_outside_inference_mode(model, run)
        torch.testing.assert_close(run(), want, rtol=1e-5, atol=1e-6)
    return model_report


def merge_outside_inference_mode(model: nn.Module, run: Callable[[], torch.Tensor]) -> MergeReport:
    with torch.inference_mode(False):
        return merge_linears(model, run)


def none_merged(model: nn.Module) -> bool:
    return not any(isinstance(module, MergedLinear) for module in model.modules())


def test_what_was_done_is_told_in_one_line() -> None:
    assert merge(Attention(*linears(8, 4, 4))).summary() == "3 linear layers merged into 1 products"
    assert merge(nn.Linear(16, 4)).summary() == ""


def test_biases_and_no_biases_do_not_mix() -> None:
    model = Attention(nn.Linear(16, 8), nn.Linear(16, 4, bias=False))
    report = merge(model)
    assert report.dropped == {"some have biases, others none": 2}
    assert none_merged(model)
    assert "kept apart 2 layers: some have biases, others none" in report.summary()


def test_dtypes_without_a_tolerance_are_left_apart() -> None:
    model = Attention(*linears(8, 4, dtype=torch.float64))
    assert merge(model, torch.float64).dropped == {"their dtype is torch.float64": 2}
    assert none_merged(model)


class Adapted(nn.Module):
    """A layer and what was trained to be added to it, as adapters wrap layers."""

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.base_layer(x) + self.up(self.down(x))
        return result


class Scaled(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) * 2


def test_hooks_forwards_of_their_own_and_shared_weights_keep_layers_apart() -> None:
    hooked, patched, shared, twin = (nn.Linear(16, 8) for _ in range(4))
    hooked.register_forward_hook(lambda layer, inputs, out: out + 1)
    patched.forward = lambda input: input[..., :8]  # type: ignore[method-assign]
    twin.weight = shared.weight
    model = Attention(hooked, patched, shared, twin, Scaled(16, 8), nn.Linear(16, 8))
    assert merge(model) == MergeReport()
    assert none_merged(model)


def test_layers_of_adapters_are_not_merged_across_them() -> None:
    model = Attention(*(Adapted(layer) for layer in linears(8, 8)))
    report = merge(model)
    assert report == MergeReport()
    assert none_merged(model)


def test_quantized_layers_are_left_alone() -> None:
    model = CASES["llama"].model()
    layers = [layer for layer in find_layers(model) if "q_proj" in layer.name or "up_proj" in layer.name]
    quantize_model(model, uniform_plan(layers, INT8))
    ids = torch.arange(1, 6)[None]
    report = merge_linears(model, lambda: model(ids).logits)
    assert report.merged == {2: 2}  # k and v are left


def test_layers_in_different_modules_are_not_siblings() -> None:
    model = Attention(*(nn.Sequential(layer) for layer in linears(8, 8)))
    assert merge(model) == MergeReport()


def test_a_product_that_differs_is_dropped_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    right = DenseProduct._multiply

    def wrong(self: DenseProduct, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        return right(self, x, layer) + (0.01 if self.mode == "whole" else 0.0)

    monkeypatch.setattr(DenseProduct, "_multiply", wrong)
    model = Attention(*linears(8, 4, 4))
    report = merge(model)
    assert len(report.dropped) == 1 and "one product's result differs by" in next(iter(report.dropped))
    assert none_merged(model) and not report.merged


def test_a_model_that_needs_contiguous_results_keeps_its_layers() -> None:
    model = Attention(*linears(8, 4), use=lambda parts: parts[1].view(-1))
    report = merge(model)
    assert "the model does not take merged results (RuntimeError" in next(iter(report.dropped))
    assert none_merged(model)


class WritesBetween(nn.Module):
    """Changes the input of its layers between their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = linears(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.first(x)
        return torch.cat([first, self.second(x.mul_(2))], dim=-1)


def test_a_model_that_changes_the_input_between_calls_keeps_its_layers() -> None:
    model = WritesBetween()
    report = merge(model)
    assert "the model's logits differ by" in next(iter(report.dropped))
    assert none_merged(model)


def test_a_forward_pass_that_fails_is_told_and_changes_nothing() -> None:
    model = Attention(*linears(8, 4))

    def run() -> torch.Tensor:
        raise RuntimeError("no such token")

    report = merge_linears(model, run)
    assert merge_linears(nn.Linear(16, 4), run) == MergeReport()  # nothing to find: no pass
    assert "failed (RuntimeError: no such token)" in report.summary()
    assert none_merged(model) and not any(layer._forward_pre_hooks for layer in model.layers)


def test_merging_again_changes_nothing_and_reports_the_same() -> None:
    model = Attention(*linears(8, 4, 4))
    first = merge(model)
    products = {m.merged_product for m in model.modules() if isinstance(m, MergedLinear)}
    assert merge(model) == first == MergeReport(Counter({3: 1}))
    assert {m.merged_product for m in model.modules() if isinstance(m, MergedLinear)} == products


def test_a_model_that_was_moved_is_merged_anew() -> None:
    model = Attention(*linears(8, 4, 4))
    merge(model)
    model.bfloat16()
    assert merge(copy.deepcopy(model), torch.bfloat16).merged == {3: 1}
    assert merge(model, torch.bfloat16).merged == {3: 1}
    storages = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert len(storages) == 1

"""Fusing for another device than the CPU: torch's arithmetic stands in for its kernels, as do their rules."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from memory_efficient_gpt.attention.model_setup import prepare_model
from memory_efficient_gpt.fusion import kernels as kernels_module
from memory_efficient_gpt.fusion.apply import fuse
from memory_efficient_gpt.fusion.merge import merge_linears
from memory_efficient_gpt.fusion.trial_run import packed_logits
from memory_efficient_gpt.kv_cache.geometry import probe_geometry
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.layers import NativeLayer, NativeRMSNorm
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from memory_efficient_gpt.native.rotary import rotary_kernels
from tests.engine.architectures.configs import CASES

CPU = torch.device("cpu")
EXPECTED = {
    "llama": {"rms_norm": 5, "gated_mlp": 2, "rotary": 2},
    "qwen3": {"rms_norm": 9, "gated_mlp": 2, "rotary": 2},
    "gemma3_text": {"rms_norm": 13, "gated_mlp": 2, "rotary": 2},
    "phi3": {"rms_norm": 5, "gated_mlp": 2, "rotary": 2},
    "starcoder2": {"rotary": 2},
    "mixtral": {"rms_norm": 5, "rotary": 2},
    "gpt2": {},
}


class TorchKernels:
    """The layers' functions by torch; counts calls. `wrong` names one that gives something else."""

    label = "Triton kernels"
    device_type = "cpu"
    deterministic = False
    dtypes = frozenset((torch.float32, torch.bfloat16, torch.float16))

    def __init__(self, wrong: str = "") -> None:
        self.wrong = wrong
        self.calls = {"linear": 0, "rms_norm": 0, "gated": 0, "rotate": 0}

    def __deepcopy__(self, memo: dict[int, object]) -> TorchKernels:
        return self

    def _done(self, name: str, result: torch.Tensor) -> torch.Tensor:
        self.calls[name] += 1
        return result + 0.5 if self.wrong == name else result

    def multiplies(self, weight: torch.Tensor) -> bool:
        return weight.dtype is torch.bfloat16

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return self._done("linear", functional.linear(x, weight, bias))

    def rms_norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, style: str) -> torch.Tensor:
        normed = functional.rms_norm(x.float(), (x.shape[-1],), None, eps)
        if style == "round_then_scale":
            return self._done("rms_norm", weight * normed.to(x.dtype))
        scale = weight.float() + (1.0 if style == "one_plus_weight" else 0.0)
        return self._done("rms_norm", (normed * scale).to(x.dtype))

    def gated(self, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        assert gate.stride() == up.stride()
        if activation == "silu":
            return self._done("gated", functional.silu(gate) * up)
        approximate = "tanh" if activation == "gelu_tanh" else "none"
        return self._done("gated", functional.gelu(gate, approximate=approximate) * up)

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        part = cos.shape[-1]
        turned = []
        for x in (query, key):
            low, high = x[..., :part].chunk(2, dim=-1)
            half = torch.cat((-high, low), dim=-1)
            turned.append(torch.cat((x[..., :part] * cos[:, None] + half * sin[:, None], x[..., part:]), -1))
        return self._done("rotate", turned[0]), turned[1]


def prepared(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    model = CASES[name].model()
    nn.Module.to(model, dtype)
    prepare_model(model)
    return model


def logits(name: str, model: PreTrainedModel) -> torch.Tensor:
    with torch.inference_mode():
        return packed_logits(model, probe_geometry(CASES[name].config()), CPU).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", EXPECTED)
def test_a_merged_and_fused_model_computes_what_it_did(name: str, dtype: torch.dtype) -> None:
    model = prepared(name, dtype)
    want = logits(name, model)
    layers = probe_geometry(CASES[name].config())
    merge_linears(model, lambda: packed_logits(model, layers, CPU))
    products = sum(type(module) is nn.Linear for module in model.modules())
    kernels = TorchKernels()
    report = fuse(model, kernels)
    linear = {"linear": products} if products and dtype is torch.bfloat16 else {}
    assert dict(report.replaced) == EXPECTED[name] | linear
    assert not report.dropped
    kernels.calls = dict.fromkeys(kernels.calls, 0)
    got = logits(name, model)
    for kind, function in (("rms_norm", "rms_norm"), ("gated_mlp", "gated"), ("rotary", "rotate")):
        assert kernels.calls[function] == EXPECTED[name].get(kind, 0)
    limit = 1e-5 if dtype is torch.float32 else 2**-4
    assert float((got - want).abs().max()) <= limit * float(want.abs().max())


def test_products_stay_torchs_and_the_summary_names_the_kernels() -> None:
    model = prepared("llama", torch.float16)
    report = fuse(model, TorchKernels())
    assert report.summary() == "Triton kernels: 2 gated_mlp, 5 rms_norm, 2 rotary"
    assert type(model.get_submodule("lm_head")) is nn.Linear


@pytest.mark.parametrize(
    ("wrong", "kind"), [("rms_norm", "rms_norm"), ("gated", "gated_mlp"), ("rotate", "rotary")]
)
def test_a_kernel_that_differs_is_dropped_with_the_reason(wrong: str, kind: str) -> None:
    model = prepared("llama")
    report = fuse(model, TorchKernels(wrong))
    assert {name for name, _ in report.dropped} == {kind}
    assert "the kernel's result differs by" in report.summary()
    assert kind not in report.replaced


def test_a_kernel_that_cannot_be_compiled_is_dropped_with_the_reason() -> None:
    class Broken(TorchKernels):
        def rms_norm(self, *arguments: Any, **settings: Any) -> torch.Tensor:
            raise OSError("no C compiler\nand much more")

    model = prepared("llama")
    report = fuse(model, Broken())
    assert report.dropped == {("rms_norm", "its forward could not be tried (OSError: no C compiler)"): 5}
    assert report.replaced == {"gated_mlp": 2, "rotary": 2}


def test_a_kernel_that_fails_where_parts_of_heads_turn_is_dropped_with_the_reason() -> None:
    class Broken(TorchKernels):
        def rotate(self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> Any:
            if cos.shape[-1] < query.shape[-1]:
                raise OSError("no room")
            return super().rotate(query, key, cos, sin)

    assert fuse(prepared("llama"), Broken()).replaced["rotary"] == 2, "its heads turn whole"
    report = fuse(prepared("phi3"), Broken())
    assert report.dropped == {("rotary", "its function could not be tried (OSError: no room)"): 2}


def test_tensors_of_another_device_go_to_the_layers_own_forward() -> None:
    kernels = TorchKernels()
    model = prepared("llama")
    fuse(model, kernels)
    nn.Module.to(model, "meta")
    kernels.calls = dict.fromkeys(kernels.calls, 0)
    with torch.inference_mode():
        assert model.get_submodule("model.norm")(torch.empty(3, 64, device="meta")).is_meta
    assert not any(kernels.calls.values())


def test_a_model_fused_for_another_device_is_fused_anew() -> None:
    native = load_kernels()
    if isinstance(native, Unavailable):
        pytest.skip(native.reason)
    elsewhere = TorchKernels()
    model = prepared("llama")
    fuse(model, elsewhere)
    elsewhere.device_type = "cuda"  # as if the model came from there
    report = fuse(model, native)
    assert report.replaced == {"linear": 15, "rms_norm": 5, "gated_mlp": 2, "rotary": 2}
    held = [m.native_kernels for m in model.modules() if isinstance(m, NativeLayer)]
    turning = [k for m in model.modules() if (k := rotary_kernels(m)) is not None]
    assert all(isinstance(kernels, Kernels) for kernels in held + turning)
    norm: Any = model.get_submodule("model.norm")
    assert type(norm).__bases__[0] is NativeRMSNorm and NativeRMSNorm not in type(norm).__bases__[1].__mro__


def test_copies_share_the_kernels() -> None:
    kernels = TorchKernels()
    model = prepared("llama")
    fuse(model, kernels)
    twin = copy.deepcopy(model)
    assert {m.native_kernels for m in twin.modules() if isinstance(m, NativeLayer)} == {kernels}


def test_without_triton_a_model_elsewhere_keeps_its_layers_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels_module, "triton_obstacle", lambda device: "triton is not installed")
    model = nn.Linear(8, 8, device="meta")
    report = fuse(model)
    assert report.summary() == "layers by torch: Triton kernels are unavailable: triton is not installed"
    assert "triton is not installed" in caplog.text

"""Fusing layers: every architecture computes what it did, and a layer that would not is left alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from memory_efficient_gpt.fusion import kernels as kernels_module
from memory_efficient_gpt.fusion.apply import FusionReport, fuse
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import quantize_model
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.scheme import INT8

TINY: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=112,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=99,
    bos_token_id=1,
    eos_token_id=2,
    pad_token_id=0,
)
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "qwen3": Qwen3Config(**TINY, head_dim=16),
    "gemma2": Gemma2Config(**TINY, head_dim=16),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4),
    "phi3": Phi3Config(**TINY),
}
EXPECTED = {
    "llama": {"linear": 15, "rms_norm": 5, "gated_mlp": 2, "rotary": 2},
    "qwen3": {"linear": 15, "rms_norm": 9, "gated_mlp": 2, "rotary": 2},
    "gemma2": {"linear": 15, "rms_norm": 9, "gated_mlp": 2, "rotary": 2},
    "gpt2": {"linear": 1, "conv1d": 8},
    "mixtral": {"linear": 9, "rms_norm": 5, "experts": 2, "rotary": 2},
    "phi3": {"linear": 9, "rms_norm": 5, "gated_mlp": 2, "rotary": 2},
}


def tiny(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM
    model: PreTrainedModel = make.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms' ones and biases' zeros would hide mistakes
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.train(False)
    return model


def logits(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(ids).logits.float()
    return result


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = load_kernels()
    if isinstance(loaded, Unavailable):
        pytest.skip(loaded.reason)
    return loaded


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_fused_model_computes_what_it_did(kernels: Kernels, name: str, dtype: torch.dtype) -> None:
    model = tiny(name, dtype)
    original = copy.deepcopy(model)
    report = fuse(model, kernels)
    assert dict(report.replaced) == EXPECTED[name]
    assert not report.dropped
    ids = torch.arange(14).view(2, 7)
    want, got = logits(original, ids), logits(model, ids)
    # Two layers of bfloat16 roundings that may fall the other way; float32 sums in another order.
    limit = 1e-5 if dtype is torch.float32 else 2**-5
    assert float((got - want).abs().max()) <= limit * float(want.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_names_parameters_and_ties_stay(kernels: Kernels, name: str) -> None:
    model = tiny(name)
    before = {key: (value.clone(), value.shape) for key, value in model.state_dict().items()}
    identities = {key: id(parameter) for key, parameter in model.named_parameters()}
    fuse(model, kernels)
    after = model.state_dict()
    assert list(after) == list(before)
    assert {key: id(parameter) for key, parameter in model.named_parameters()} == identities
    for key, (value, shape) in before.items():
        assert after[key].shape == shape
        assert torch.equal(after[key], value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["linear", "mlp", "norm"])
def test_layers_give_a_row_the_same_in_any_batch(kernels: Kernels, kind: str, dtype: torch.dtype) -> None:
    model = tiny("llama", dtype)
    fuse(model, kernels)
    layer = model.model.layers[0]
    module = {"linear": model.lm_head, "mlp": layer.mlp, "norm": layer.input_layernorm}[kind]
    x = torch.randn(1, 50, 64).to(dtype)
    with torch.inference_mode():
        together = module(x)
        for row in (0, 17, 49):
            assert torch.equal(module(x[:, row : row + 1]), together[:, row : row + 1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_gradients_are_the_original_ones(kernels: Kernels, name: str) -> None:
    model = tiny(name)
    original = copy.deepcopy(model)
    fuse(model, kernels)
    ids = torch.arange(7).view(1, 7)
    for each in (model, original):
        each(ids, labels=ids).loss.backward()
    for (key, got), want in zip(model.named_parameters(), original.parameters(), strict=True):
        assert got.grad is not None and want.grad is not None, key
        torch.testing.assert_close(got.grad, want.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_fusing_again_changes_nothing_and_reports_the_same(kernels: Kernels, name: str) -> None:
    model = tiny(name)
    quantize_model(model, uniform_plan(find_layers(model)[:3], INT8))
    first = fuse(model, kernels)
    assert first.replaced["quantized"]
    classes = [type(module) for module in model.modules()]
    assert fuse(model, kernels).summary() == first.summary()
    assert [type(module) for module in model.modules()] == classes


def test_another_dtype_after_fusing_still_works(kernels: Kernels) -> None:
    model = tiny("llama")
    fuse(model, kernels)
    want = logits(model, torch.arange(7).view(1, 7))
    nn.Module.to(model, torch.float16)
    got = logits(model, torch.arange(7).view(1, 7))
    assert float((got - want).abs().max()) <= 0.05 * float(want.abs().max())


def test_a_fused_model_can_be_copied_and_generates(kernels: Kernels) -> None:
    model: Any = tiny("llama")
    fuse(model, kernels)
    twin: Any = copy.deepcopy(model)
    ids = torch.arange(3, 8).view(1, 5)
    first, second = (each.generate(ids, max_new_tokens=4, do_sample=False) for each in (model, twin))
    assert torch.equal(first, second)
    assert isinstance(model.lm_head, nn.Linear)


class Layers(nn.Module):
    """Some layers to fuse."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


class OddNorm(nn.Module):
    """Looks like an RMS norm and is none: it subtracts the mean."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32))
        self.eps = 1e-6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, (32,), self.weight, None, self.eps)


class ClampedMLP(nn.Module):
    """Has a gated MLP's layers and limits the gate."""

    def __init__(self, act: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48), nn.Linear(32, 48)
        self.down_proj = nn.Linear(48, 32)
        self.act_fn = act

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        inner: torch.Tensor = self.act_fn(self.gate_proj(x).clamp(max=7.0)) * self.up_proj(x)
        return self.down_proj(inner)  # type: ignore[no-any-return]


class ScaledLinear(nn.Linear):
    """A linear layer with a forward of its own."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 2


def reasons(report: FusionReport, kind: str) -> str:
    return " ".join(reason for (name, reason), _ in report.dropped.items() if name == kind)


def test_a_layer_that_computes_something_else_is_kept_with_the_reason(kernels: Kernels) -> None:
    model = Layers(norm=OddNorm(), mlp=ClampedMLP(nn.SiLU()))
    classes = [type(module) for module in (model.norm, model.mlp)]
    report = fuse(model, kernels)
    assert "differs" in reasons(report, "rms_norm")
    assert "differs" in reasons(report, "gated_mlp")
    assert [type(model.norm), type(model.mlp)] == classes
    assert report.replaced == {"linear": 3}
    assert "kept torch for 1 gated_mlp: the kernel's result differs" in report.summary()


def test_an_activation_without_a_kernel_is_kept_with_the_reason(kernels: Kernels) -> None:
    report = fuse(Layers(mlp=ClampedMLP(nn.Mish())), kernels)
    assert reasons(report, "gated_mlp") == "an activation without a kernel"


def test_layers_with_a_forward_of_their_own_are_not_taken_for_linear(kernels: Kernels) -> None:
    patched = nn.Linear(8, 8)
    patched.forward = lambda x: x  # type: ignore[method-assign,assignment]
    report = fuse(Layers(own=ScaledLinear(8, 8), patched=patched), kernels)
    assert not report.replaced
    assert reasons(report, "linear") == "its forward was replaced on the instance"


def test_dtypes_and_layouts_without_a_kernel_are_kept(kernels: Kernels) -> None:
    strided = nn.Linear(8, 8)
    strided.weight.data = strided.weight.data.t()
    report = fuse(Layers(half_precision=nn.Linear(8, 8).half(), strided=strided), kernels)
    assert not report.replaced
    assert "float16" in reasons(report, "linear")
    assert "not contiguous" in reasons(report, "linear")


def test_weights_tried_on_a_norm_are_put_back(kernels: Kernels) -> None:
    norm = nn.RMSNorm(32, eps=1e-6)
    weight = norm.weight.data
    assert fuse(Layers(norm=norm), kernels).replaced == {"rms_norm": 1}
    assert norm.weight.data.data_ptr() == weight.data_ptr()
    assert torch.equal(norm.weight, torch.ones(32))


def test_without_kernels_nothing_changes_and_the_reason_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(kernels_module, "load_kernels", lambda: Unavailable("no compiler"))
    model = Layers(linear=nn.Linear(8, 8))
    report = fuse(model)
    assert type(model.linear) is nn.Linear
    assert report.summary() == "layers by torch: native kernels are unavailable: no compiler"
    assert "no compiler" in caplog.text

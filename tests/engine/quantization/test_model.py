"""Quantizing whole models: structure, numbers, ties, experts, and what stays as it was."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoConfig,
    PretrainedConfig,
    Qwen3MoeConfig,
)

from memory_efficient_gpt.errors import UnsupportedModelError
from memory_efficient_gpt.fusion.apply import fuse
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from memory_efficient_gpt.quantization.experts import QuantizedStack
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import (
    QuantizationReport,
    give_kernels,
    present_schemes,
    quantize_model,
    quantized_modules,
    report_of,
    weight_bytes,
)
from memory_efficient_gpt.quantization.modules import QuantizedLinear
from memory_efficient_gpt.quantization.naming import name_of
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.rounding import Rounding
from memory_efficient_gpt.quantization.scheme import INT8, parse_scheme

TINY: dict[str, Any] = dict(
    hidden_size=64, intermediate_size=112, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    vocab_size=99, bos_token_id=1, eos_token_id=2, pad_token_id=0,
)  # fmt: skip
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**TINY),
    "llama-tied": LlamaConfig(**TINY, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**TINY, head_dim=16),
    "gpt2": GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, bos_token_id=1, eos_token_id=2),
    "mixtral": MixtralConfig(**TINY, num_local_experts=4),
    "qwen3_moe": Qwen3MoeConfig(**TINY, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48),
    "gpt_oss": GptOssConfig(**TINY, head_dim=16, num_local_experts=4),
    "olmo": OlmoConfig(**TINY),  # its norms have no weights: once it is quantized nothing is in floats
}
QUANTIZED = {  # modules that hold a quantized weight: linear layers, both ends, stacks of experts
    "llama": 16, "llama-tied": 16, "gemma3": 16, "gpt2": 10, "mixtral": 14, "qwen3_moe": 14, "gpt_oss": 14,
    "olmo": 16,
}  # fmt: skip
IDS = torch.arange(14).view(2, 7)


def tiny(name: str, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM
    model = make.from_config(copy.deepcopy(CONFIGS[name]), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train(False)


def quantized(name: str, scheme: str = "int4", dtype: torch.dtype = torch.float32) -> Any:
    model = tiny(name, dtype)
    quantize_model(model, uniform_plan(find_layers(model), parse_scheme(scheme)))
    return model


def dequantized_copy(name: str, model: Any) -> Any:
    """An ordinary float model with the numbers of the quantized one."""
    plain = tiny(name, model.dtype)
    state = dict(plain.state_dict())
    for key, module in model.named_modules():
        if module in quantized_modules(model):
            parameter = key if key in state else f"{key}.weight"
            weight = module.dequantize(torch.float32)
            state[parameter] = getattr(module, "weight", weight).reshape(state[parameter].shape)
    plain.load_state_dict(state)
    return plain


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(IDS).logits.float()
    return result


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = load_kernels()
    if isinstance(loaded, Unavailable):
        pytest.skip(loaded.reason)
    return loaded


@pytest.mark.parametrize("scheme", ["int4", "int8", "int4-asym-g64", "fp8"])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_quantized_model_computes_with_its_dequantized_weights(name: str, scheme: str) -> None:
    model = quantized(name, scheme)
    assert len(quantized_modules(model)) == QUANTIZED[name]
    want = logits(dequantized_copy(name, model))
    assert float((logits(model) - want).abs().max()) <= 1e-5 * float(want.abs().max())


@pytest.mark.parametrize("name", CONFIGS)
def test_native_kernels_add_only_the_rounding_of_activations(kernels: Kernels, name: str) -> None:
    model = quantized(name, "int8")
    want = logits(model)
    stacks = [m for m in quantized_modules(model) if isinstance(m, QuantizedStack)]
    assert give_kernels(model, kernels) == {"native": QUANTIZED[name] - len(stacks)}
    got = logits(model)
    # 8-bit activations: 0.7% of each layer's result, a dozen layers one after another, norms between them.
    assert float((got - want).norm() / want.norm()) <= 0.08
    assert not torch.equal(got, want)


@pytest.mark.parametrize("scheme", ["int4", "int8"])
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_multiply_natively_where_the_kernel_does_what_their_code_does(
    kernels: Kernels, name: str, scheme: str
) -> None:
    model = quantized(name, scheme)
    want = logits(model)
    report = fuse(model, kernels)
    assert report.replaced["experts"] == 2 and not any("dequantized" in why for _, why in report.dropped)
    stacks = [m for m in quantized_modules(model) if isinstance(m, QuantizedStack)]
    assert len(stacks) == 4 and all(stack.packed_weight is not None for stack in stacks)
    got = logits(model)
    assert 0 < float((got - want).norm() / want.norm()) <= 0.08
    stack = stacks[0]
    before = stack[1]
    stack.drop_kernels()
    assert torch.equal(stack[1], before)


def test_experts_that_multiply_all_at_once_are_refused_by_name() -> None:
    config = Llama4TextConfig(**TINY, head_dim=16, num_local_experts=4, intermediate_size_mlp=112)
    make: Any = AutoModelForCausalLM
    model = make.from_config(config)
    with pytest.raises(UnsupportedModelError, match=r"Llama4TextExperts multiplies with all.*bmm"):
        quantize_model(model, uniform_plan(find_layers(model), parse_scheme("int4")))


def test_experts_that_clamp_and_add_biases_keep_their_own_code(kernels: Kernels) -> None:
    model = quantized("gpt_oss")
    want = logits(model)
    report = fuse(model, kernels)
    assert report.replaced["experts"] == 0
    assert report.dropped["quantized", "experts without a kernel are dequantized one by one"] == 4
    assert float((logits(model) - want).norm() / want.norm()) <= 0.08


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_everything_around_quantized_layers_is_fused_as_without(kernels: Kernels, dtype: torch.dtype) -> None:
    for name in ("llama", "gpt2", "mixtral"):
        plain, model = tiny(name, dtype), quantized(name, "int4", dtype)
        want, got = fuse(plain, kernels).replaced, fuse(model, kernels).replaced
        layers = want.pop("linear", 0) + want.pop("conv1d", 0)
        assert got.pop("quantized") >= layers and got == want


def test_a_tied_head_shares_the_embeddings_weight(kernels: Kernels) -> None:
    model = quantized("llama-tied")
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert head.scheme == embedding.scheme == INT8
    assert head.quantized_weight.codes.data_ptr() == embedding.quantized_weight.codes.data_ptr()
    give_kernels(model, kernels)
    assert head.packed_weight is embedding.packed_weight


def test_bytes_count_what_is_shared_once_and_every_scale(kernels: Kernels) -> None:
    model = tiny("llama-tied", torch.bfloat16)
    report = quantize_model(model, uniform_plan(find_layers(model), parse_scheme("int4")))
    layer = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 112  # weights of one decoder layer
    groups = 2 * 64 + 2 * 2 * 32 + 2 * 64 + 2 * 2 * 112 + 4 * 64  # scales: ceil(112 / 32) = 4
    norms = 5 * 64 * 2
    embedding = 99 * 64 + 99 * 2
    units = 4 * (2 * 7 + 1)
    assert report.bytes_after == 2 * (layer // 2 + 2 * groups) + norms + embedding + units
    assert report.bytes_before == 2 * (2 * layer + 99 * 64) + norms
    assert sum(report.kept.values()) == norms
    give_kernels(model, kernels)
    assert weight_bytes(model) <= 1.2 * report.bytes_after  # padding to blocks of 16 outputs


def test_the_summary_tells_bytes_and_schemes() -> None:
    report = QuantizationReport(4_000_000, 1_000_000, {"a": INT8, "b": INT8})
    assert report.summary() == "quantized 2 x int8: 4.0 MB became 1.0 MB (75% saved)"


@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_a_loaded_model_is_reported_as_the_one_that_was_quantized(name: str) -> None:
    model = tiny(name, torch.bfloat16)
    report = quantize_model(model, uniform_plan(find_layers(model), parse_scheme("int4")))
    again = report_of(model)
    assert again.summary() == report.summary() and again.kept == report.kept
    assert (again.bytes_before, again.bytes_after) == (report.bytes_before, report.bytes_after)


def test_convolutions_are_not_taken_for_experts() -> None:
    model = tiny("llama")
    model.model.conv = nn.Conv1d(32, 32, 4, groups=32)
    assert "model.conv.weight" not in {layer.name for layer in find_layers(model)}


def test_routers_and_small_layers_stay() -> None:
    names = {layer.name for layer in find_layers(tiny("mixtral"))}
    assert any(name.endswith("experts.gate_up_proj") for name in names)
    assert not any("router" in name or name.endswith(".gate") for name in names)
    holder = nn.Linear(64, 8)
    model = tiny("llama")
    model.model.extra = holder
    assert "model.extra" not in {layer.name for layer in find_layers(model)}


def test_present_schemes_are_those_of_inner_layers() -> None:
    assert present_schemes(quantized("llama")) == {parse_scheme("int4")}
    assert present_schemes(tiny("llama")) == frozenset()


def test_a_mix_is_called_one() -> None:
    model = tiny("llama")
    rules = {"*.down_proj": parse_scheme("int8"), "*.up_proj": parse_scheme("bf16")}
    quantize_model(model, uniform_plan(find_layers(model), parse_scheme("int4"), rules=rules))
    assert name_of(present_schemes(model)) == "mixed (int4, int8)"
    ends = tiny("llama")
    quantize_model(ends, uniform_plan(find_layers(ends), parse_scheme("bf16"), rules={"lm_head": INT8}))
    assert name_of(present_schemes(ends)) == "int8"


def test_a_large_vocabulary_does_not_decide_the_scheme() -> None:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**TINY | {"vocab_size": 5000}))
    quantize_model(model, uniform_plan(find_layers(model), parse_scheme("int4")))
    assert present_schemes(model) == {parse_scheme("int4")}


@pytest.mark.parametrize("with_kernels", [False, True])
def test_state_dicts_hold_one_layout_and_load_bit_for_bit(kernels: Kernels, with_kernels: bool) -> None:
    model, other = quantized("llama"), quantized("llama", "int4")
    with torch.no_grad():
        other.model.norm.weight.add_(1.0)
        for module in quantized_modules(other):
            module.quantized_weight.codes.zero_()
    if with_kernels:
        give_kernels(model, kernels)
        give_kernels(other, kernels)
    state = model.state_dict()
    assert "model.layers.0.self_attn.q_proj.weight_codes" in state
    other.load_state_dict(state)
    assert all((module.packed_weight is not None) == with_kernels for module in quantized_modules(other))
    assert torch.equal(logits(other), logits(model))


def test_casting_a_model_leaves_scales_alone() -> None:
    model = quantized("llama")
    before = {k: v.clone() for k, v in model.state_dict().items() if "weight_" in k}
    model.to(torch.bfloat16)
    after = model.state_dict()
    assert all(torch.equal(after[k], v) and after[k].dtype is v.dtype for k, v in before.items())
    assert model(IDS).logits.dtype is torch.bfloat16


def test_gradients_reach_the_inputs_and_biases() -> None:
    model = quantized("gpt2")
    model.requires_grad_(False)
    bias = model.transformer.h[0].mlp.c_fc.bias.requires_grad_(True)
    model(IDS, labels=IDS).loss.backward()
    assert bias.grad is not None and bias.grad.abs().sum() > 0


def test_a_copy_is_whole_and_independent(kernels: Kernels) -> None:
    model = quantized("llama")
    give_kernels(model, kernels)
    twin = copy.deepcopy(model)
    want = logits(model)
    model.model.layers[0].self_attn.q_proj.packed_weight.codes.zero_()
    assert torch.equal(logits(twin), want) and not torch.equal(logits(model), want)


def test_a_weight_can_still_be_looked_at() -> None:
    model = quantized("gpt2", dtype=torch.bfloat16)
    linear, conv = model.lm_head, model.transformer.h[0].attn.c_attn
    assert isinstance(linear, QuantizedLinear)
    assert linear.weight.shape == (99, 64) and linear.weight.dtype is torch.bfloat16
    assert conv.weight.shape == (64, 192)


def test_generate_of_transformers_works(kernels: Kernels) -> None:
    model = quantized("llama")
    plain = model.generate(IDS, max_new_tokens=4, do_sample=False)
    assert plain.shape == (2, 11)
    give_kernels(model, kernels)
    assert model.generate(IDS, max_new_tokens=4, do_sample=False).shape == (2, 11)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_gptq_is_nearer_on_other_texts_and_says_what_was_searched(name: str) -> None:
    source = torch.Generator().manual_seed(1)
    text, others = (torch.randint(0, 90, (40, 60), generator=source) for _ in range(2))
    errors: dict[str, float] = {}
    roundings: tuple[Rounding, ...] = ("search", "gptq")
    with torch.no_grad():
        want = tiny(name)(others).logits
        for rounding in roundings:
            model = tiny(name)
            plan = uniform_plan(find_layers(model), parse_scheme("int4"))
            report = quantize_model(model, plan, rounding=rounding, text=text)
            errors[rounding] = float((model(others).logits - want).square().mean())
            assert ("not by gptq" in report.summary()) == bool(report.searched)
    assert errors["gptq"] < 0.9 * errors["search"]
    embedding = {} if name == "gpt2" else {"an embedding multiplies nothing": 1}
    assert dict(report.searched) == embedding | ({"stacked experts": 4} if name == "mixtral" else {})
    assert sum(report.rounded.values()) == len(report.schemes)
    assert report.rounded["search"] == sum(report.searched.values())


def test_gptq_without_a_text_or_elsewhere_is_refused() -> None:
    model = tiny("llama")
    plan = uniform_plan(find_layers(model), parse_scheme("int4"))
    with pytest.raises(ValueError, match="needs a text"):
        quantize_model(model, plan, rounding="gptq")
    with pytest.raises(ValueError, match="is on cpu, not meta"):
        quantize_model(model, plan, rounding="gptq", text=IDS, device=torch.device("meta"))
    assert not quantized_modules(model), "nothing was lost"

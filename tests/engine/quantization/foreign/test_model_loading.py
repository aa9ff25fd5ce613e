"""Whole models from foreign checkpoints: ties, heads, experts, biases, shards, saving, damage."""

from __future__ import annotations

import json
import logging
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from memory_efficient_gpt.errors import CheckpointError, UnsupportedModelError
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import load_kernels
from memory_efficient_gpt.quantization.checkpoint import save_quantized
from memory_efficient_gpt.quantization.experts import QuantizedStack
from memory_efficient_gpt.quantization.model import give_kernels, quantized_modules
from memory_efficient_gpt.quantization.modules import QuantizedEmbedding, QuantizedLinear
from memory_efficient_gpt.quantization.reordered import ReorderedLinear
from tests.engine.quantization.foreign import packers
from tests.engine.quantization.foreign.folders import (
    LLAMA_LAYERS,
    Pack,
    Tensors,
    change_config,
    change_tensors,
    float_twin,
    load,
    write,
)
from tests.engine.quantization.foreign.test_awq import SETTINGS as AWQ
from tests.engine.quantization.foreign.test_compressed_tensors import args, settings
from tests.engine.quantization.foreign.test_gptq import SETTINGS as GPTQ
from tests.engine.quantization.test_model import logits

FORMATS: dict[str, tuple[dict[str, Any], Pack]] = {
    "gptq": (GPTQ | {"group_size": 16}, packers.gptq),
    "awq": (AWQ, packers.awq),
    "compressed-tensors": (settings(args()), packers.compressed_tensors),
}
EXPERTS = {"mixtral": ("w1", "w2", "w3"), "qwen3_moe": ("gate_proj", "up_proj", "down_proj")}


def quantize(weight: torch.Tensor) -> packers.Grouped:
    return packers.quantize(weight, group=16)


def write_format(folder: Path, name: str, method: str, layers: tuple[str, ...] = LLAMA_LAYERS) -> Tensors:
    described, pack = FORMATS[method]
    return write(folder, name, described, quantize, pack, layers)


@pytest.mark.parametrize(("name", "method"), [*product(["llama", "llama-tied", "gemma3"], FORMATS)])
def test_a_model_is_its_float_twin(tmp_path: Path, name: str, method: str) -> None:
    expected = write_format(tmp_path, name, method)
    model = load(tmp_path)
    assert len(quantized_modules(model)) == len(expected) == 14
    for layer, want in expected.items():
        assert torch.equal(model.get_submodule(layer).dequantize(torch.float64), want)
    assert torch.allclose(logits(model), logits(float_twin(model)), atol=2e-5, rtol=1e-4)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (head.weight is embedding.weight) == (name != "llama")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_compute_dtype_is_free_and_the_scales_stay(tmp_path: Path, dtype: torch.dtype) -> None:
    write_format(tmp_path, "llama", "gptq")
    model = load(tmp_path, dtype)
    assert logits(model).isfinite().all()
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert {m.quantized_weight.scales.dtype for m in quantized_modules(model)} == {torch.float16}


@pytest.mark.parametrize(("name", "method"), [*product(EXPERTS, FORMATS)])
def test_experts_one_by_one_become_stacks(tmp_path: Path, name: str, method: str) -> None:
    write_format(tmp_path, name, method, ("q_proj", "o_proj", *EXPERTS[name]))
    model = load(tmp_path)
    stacks = [m for m in quantized_modules(model) if isinstance(m, QuantizedStack)]
    assert len(stacks) == 4
    assert torch.allclose(logits(model), logits(float_twin(model)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_equal_the_weights_that_transformers_stacks(tmp_path: Path, name: str) -> None:
    expected = write_format(tmp_path / "quantized", name, "gptq", EXPERTS[name])
    state = load_file(tmp_path / "quantized" / "model.safetensors")
    plain = {k: v for k, v in state.items() if k.rpartition(".")[0] not in expected}
    plain |= {f"{layer}.weight": weight.float().contiguous() for layer, weight in expected.items()}
    (tmp_path / "float").mkdir()
    save_file(plain, tmp_path / "float" / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "quantized" / "config.json").read_text())
    del config["quantization_config"]
    (tmp_path / "float" / "config.json").write_text(json.dumps(config))
    want, got = load(tmp_path / "float"), load(tmp_path / "quantized")
    assert torch.allclose(logits(got), logits(want), atol=2e-5, rtol=1e-4)


def test_a_missing_expert_and_an_unlike_one_are_named(tmp_path: Path) -> None:
    write_format(tmp_path, "mixtral", "gptq", EXPERTS["mixtral"])
    layer = next(k for k in load_file(tmp_path / "model.safetensors") if k.endswith("experts.2.w3.qweight"))
    layer = layer.removesuffix(".qweight")

    def drop(state: Tensors) -> None:
        for key in [k for k in state if k.startswith(layer)]:
            del state[key]

    change_tensors(tmp_path, drop)
    with pytest.raises(CheckpointError, match=r"part 1 of expert 2 of .*experts\.gate_up_proj is missing"):
        load(tmp_path)
    inputs = next(iter(load_file(tmp_path / "model.safetensors"))), torch.randn(112, 64)
    other = packers.gptq(packers.quantize(inputs[1], bits=8, group=16))
    change_tensors(tmp_path, lambda state: state.update({f"{layer}.{k}": v for k, v in other.items()}))
    with pytest.raises(UnsupportedModelError, match=r"experts\.2\.w3 has 8 bits in groups of 16, others 4"):
        load(tmp_path)


def test_conv1d_layers_are_read_like_linear_ones(tmp_path: Path) -> None:
    layers = ("c_attn", "c_proj", "c_fc")
    expected = write(tmp_path, "gpt2", GPTQ, quantize, packers.gptq, layers, transposed=True)
    model = load(tmp_path)
    for layer, want in expected.items():
        assert torch.equal(model.get_submodule(layer).dequantize(torch.float64), want)
    assert torch.allclose(logits(model), logits(float_twin(model)), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["gptq", "compressed-tensors"])
def test_a_quantized_head_is_untied_from_a_float_embedding(tmp_path: Path, method: str) -> None:
    write_format(tmp_path, "llama-tied", method)
    _, pack = FORMATS[method]
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    head = quantize(embedding * 0.5)
    change_tensors(tmp_path, lambda state: state.update({f"lm_head.{k}": v for k, v in pack(head).items()}))
    model = load(tmp_path)
    assert isinstance(model.get_output_embeddings(), QuantizedLinear)
    assert torch.equal(model.lm_head.dequantize(torch.float64), head.dequantize())
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_a_quantized_embedding_is_shared_with_a_tied_head(tmp_path: Path) -> None:
    described = settings(args(), targets=("Linear", "Embedding"))
    layers = (*LLAMA_LAYERS, "embed_tokens")
    expected = write(tmp_path, "llama-tied", described, quantize, packers.compressed_tensors, layers)
    model = load(tmp_path)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert isinstance(embedding, QuantizedEmbedding)
    assert head.quantized_weight.codes.data_ptr() == embedding.quantized_weight.codes.data_ptr()
    assert torch.equal(head.dequantize(torch.float64), expected["model.embed_tokens"])
    assert torch.allclose(logits(model), logits(float_twin(model)), atol=2e-5, rtol=1e-4)


def test_layers_too_small_for_codes_are_float(tmp_path: Path) -> None:
    described = settings(args(), targets=("Linear",))
    write(tmp_path, "llama", described, quantize, packers.compressed_tensors)
    state = load_file(tmp_path / "model.safetensors")
    small = packers.quantize(torch.randn(8, 64, generator=torch.Generator().manual_seed(0)), group=16)
    for name in ("k_proj", "v_proj"):
        for layer in (0, 1):
            prefix = f"model.layers.{layer}.self_attn.{name}"
            state |= {f"{prefix}.{k}": v.clone() for k, v in packers.compressed_tensors(small).items()}
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    shape = {"num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 8}
    change_config(tmp_path, described, **shape)
    model = load(tmp_path)
    assert type(model.model.layers[0].self_attn.k_proj) is torch.nn.Linear
    assert torch.equal(model.model.layers[0].self_attn.k_proj.weight.double(), small.dequantize())


def test_a_zero_bias_is_dropped_and_another_refused(tmp_path: Path) -> None:
    write_format(tmp_path, "llama", "gptq")
    bias = "model.layers.0.self_attn.o_proj.bias"
    change_tensors(tmp_path, lambda state: state.update({bias: torch.zeros(64)}))
    assert load(tmp_path).model.layers[0].self_attn.o_proj.bias is None
    change_tensors(tmp_path, lambda state: state.update({bias: torch.ones(64)}))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {bias} is not zero"):
        load(tmp_path)


def test_a_bias_that_the_architecture_has_is_loaded(tmp_path: Path) -> None:
    write_format(tmp_path, "llama", "gptq")
    biases = {f"model.layers.{n}.self_attn.{p}_proj.bias": torch.randn(64 if p in "qo" else 32)
              for n in (0, 1) for p in "qkvo"}  # fmt: skip
    change_tensors(tmp_path, lambda state: state.update(biases))
    change_config(tmp_path, FORMATS["gptq"][0], attention_bias=True)
    model = load(tmp_path)
    for key, bias in biases.items():
        assert torch.equal(model.get_parameter(key), bias)


def test_names_without_the_models_prefix_and_layers_it_lacks(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_format(tmp_path, "llama-tied", "gptq")
    want = logits(load(tmp_path))

    def rename(state: Tensors) -> None:
        for key in list(state):
            state[key.removeprefix("model.")] = state.pop(key)
        state.update({f"mtp.{k}": v for k, v in packers.gptq(quantize(torch.randn(32, 32))).items()})
        state["mtp.bias"] = torch.ones(32)

    change_tensors(tmp_path, rename)
    with caplog.at_level(logging.WARNING):
        assert torch.equal(logits(load(tmp_path)), want)
    assert "1 quantized layers are not used by this architecture: mtp" in caplog.text


def test_a_layer_may_be_spread_over_files_and_a_missing_tensor_is_named(tmp_path: Path) -> None:
    write_format(tmp_path, "llama", "gptq")
    want = logits(load(tmp_path))
    state = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    halves = [dict(sorted(state.items())[part::2]) for part in (0, 1)]
    files = [f"model-0000{part + 1}-of-00002.safetensors" for part in (0, 1)]
    for file, half in zip(files, halves, strict=True):
        save_file(half, tmp_path / file, {"format": "pt"})
    index = {name: file for file, half in zip(files, halves, strict=True) for name in half}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert torch.equal(logits(load(tmp_path)), want)
    lost = next(name for name in halves[1] if name.endswith("scales"))
    save_file({k: v for k, v in halves[1].items() if k != lost}, tmp_path / files[1], {"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"model-0000.-of-00002\.safetensors: {lost} is missing"):
        load(tmp_path)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    write_format(tmp_path, "llama", "gptq")
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors has .* truncated or damaged"):
        load(tmp_path)


def test_a_float_weight_that_is_missing_is_named(tmp_path: Path) -> None:
    write_format(tmp_path, "llama", "gptq")
    change_tensors(tmp_path, lambda state: state.pop("model.norm.weight"))
    with pytest.raises(CheckpointError, match=r"1 weights .* are not in the files: model\.norm\.weight"):
        load(tmp_path)


def test_generation_settings_are_the_folders(tmp_path: Path) -> None:
    write_format(tmp_path, "llama", "awq")
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8], "temperature": 0.6}')
    model = load(tmp_path)
    assert model.generation_config.eos_token_id == [7, 8] and model.generation_config.temperature == 0.6


@pytest.mark.parametrize("shuffled", [True, False])
def test_a_loaded_model_can_be_saved_in_our_format(tmp_path: Path, shuffled: bool) -> None:
    def shuffle(weight: torch.Tensor) -> packers.Grouped:
        index = torch.arange(weight.shape[1]) // 16
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(3))
        return packers.quantize(weight, index=index[order] if shuffled else index)

    write(tmp_path / "theirs", "llama", GPTQ, shuffle, packers.gptq)
    model = load(tmp_path / "theirs")
    save_quantized(model, tmp_path / "ours")
    again = load(tmp_path / "ours")
    assert any(isinstance(m, ReorderedLinear) for m in quantized_modules(again)) == shuffled
    assert torch.equal(logits(again), logits(model))
    assert (
        json.loads((tmp_path / "ours" / "config.json").read_text())["quantization_config"]["quant_method"]
        == "megpt"
    )


@pytest.mark.parametrize(("bits", "shuffled"), [*product([3, 4, 8], [True, False])])
def test_native_kernels_compute_the_same(tmp_path: Path, bits: int, shuffled: bool) -> None:
    if isinstance(kernels := load_kernels(), Unavailable):
        pytest.skip(kernels.reason)

    def shuffle(weight: torch.Tensor) -> packers.Grouped:
        index = torch.arange(weight.shape[1]) // 16
        order = torch.randperm(len(index), generator=torch.Generator().manual_seed(3))
        return packers.quantize(weight, bits=bits, symmetric=False, index=index[order] if shuffled else index)

    write(tmp_path, "llama", GPTQ, shuffle, packers.gptq)
    model = load(tmp_path)
    x = torch.randn(5, 112, generator=torch.Generator().manual_seed(0))
    layer = model.model.layers[0].mlp.down_proj
    with torch.inference_mode():
        want, weight = layer(x), layer.weight.clone()
        assert give_kernels(model, kernels) == {"native": 14}
        error = (layer(x) - want).norm() / want.norm()
    assert error < 0.02  # the kernel rounds activations to 8 bits
    assert torch.allclose(layer.weight, weight, atol=1e-7)

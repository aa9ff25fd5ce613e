"""One product for quantized layers of the same input: right, exact when taken apart again, without a copy."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from memory_efficient_gpt.fusion import merged_quantized
from memory_efficient_gpt.fusion.merge import merge_linears
from memory_efficient_gpt.fusion.merged_linear import MergedLinear, part_ways
from memory_efficient_gpt.fusion.merged_quantized import packed_of, quantized_obstacle
from memory_efficient_gpt.parking import held_tensors
from memory_efficient_gpt.quantization import modules
from memory_efficient_gpt.quantization.modules import QuantizedLinear, QuantizedModule, hold
from memory_efficient_gpt.quantization.rounding import quantize_weight
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.quantization.triton_weights import pack_for_triton, stored_layout
from memory_efficient_gpt.triton_kernels.packing import TritonWeight

SCHEMES = ["int4-g128", "int4-asym-g64", "int4", "int8", "fp8"]
SIZES = (256, 128, 128)
INPUTS = 192


@pytest.fixture(autouse=True)
def products_by_torch(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the kernels compute, computed on the CPU; the outputs of each product."""
    outputs: list[int] = []

    def multiply(x: torch.Tensor, weight: TritonWeight, bias: torch.Tensor | None) -> torch.Tensor:
        outputs.append(weight.num_outputs)
        return nn.functional.linear(x, dequantized(weight), bias)

    def by_module(module: QuantizedModule, x: torch.Tensor, packed: TritonWeight, bias: Any) -> torch.Tensor:
        return multiply(module.arrange(x), packed, bias)

    monkeypatch.setattr(merged_quantized, "multiply_packed", multiply)
    monkeypatch.setattr(modules, "_multiply_by_triton", by_module)
    return outputs


def dequantized(weight: TritonWeight) -> torch.Tensor:
    kind = (
        {"int8": "int8-asym", "int4": "int4-asym"}.get(weight.code, "fp8")
        if weight.offsets is not None
        else weight.code
    )
    group = "" if weight.group_size is None or kind == "fp8" else f"-g{weight.group_size}"
    return stored_layout(parse_scheme(f"{kind}{group}" if group else _channel(kind)), weight).dequantize()


def _channel(kind: str) -> str:
    return f"{kind}-channel" if kind.startswith("int4") else kind


class Block(nn.Module):
    """Layers that get the same input, with weights of different magnitudes."""

    def __init__(
        self,
        scheme: str,
        *,
        bias: bool = False,
        scales: tuple[float, ...] = (1.0, 0.02, 1.0),
        inputs: int = INPUTS,
    ) -> None:
        super().__init__()
        torch.manual_seed(0)
        for number, (size, scale) in enumerate(zip(SIZES, scales, strict=True)):
            layer = nn.Linear(inputs, size, bias=bias)
            layer.weight.data *= scale
            weight = quantize_weight(layer.weight.data, parse_scheme(scheme), rounding="nearest")
            held = hold(layer, QuantizedLinear, weight)
            held.use_triton(pack_for_triton(weight))
            self.add_module(f"layer{number}", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.children()], dim=-1)


def run_of(block: Block, inputs: int = INPUTS) -> Any:
    x = torch.randn(1, 5, inputs, generator=torch.Generator().manual_seed(1))
    return lambda: block(x)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_product_gives_what_the_layers_gave(
    scheme: str, bias: bool, products_by_torch: list[int]
) -> None:
    block = Block(scheme, bias=bias)
    run = run_of(block)
    with torch.inference_mode():
        want = run()
    report = merge_linears(block, run)
    assert report.merged == {3: 1}, report.summary()
    products_by_torch.clear()
    with torch.inference_mode():
        got = run()
    assert products_by_torch == [sum(SIZES)]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_merged_layer_is_saved_as_it_was(scheme: str) -> None:
    block = Block(scheme)
    before = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    merge_linears(block, run_of(block))
    assert any(isinstance(layer, MergedLinear) for layer in block.children())
    after = block.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype is after[name].dtype and torch.equal(tensor.float(), after[name].float()), name


def test_codes_are_not_held_twice() -> None:
    block = Block("int4-g128", scales=(1.0, 1.0, 1.0))
    before = sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held_tensors(block)}.values()
    )
    merge_linears(block, run_of(block))
    after = sum(
        {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held_tensors(block)}.values()
    )
    assert after <= before * 1.04  # scales of those in another unit


def test_a_layer_that_goes_back_to_its_buffers_computes_alone(products_by_torch: list[int]) -> None:
    block = Block("int8")
    run = run_of(block)
    merge_linears(block, run)
    with torch.inference_mode():
        want = run()
        for layer in block.children():
            assert isinstance(layer, QuantizedModule)
            layer.drop_kernels()
        products_by_torch.clear()
        torch.testing.assert_close(run(), want, rtol=1e-5, atol=1e-5)
    assert products_by_torch == []


@pytest.mark.parametrize("inputs", [128, INPUTS])
@pytest.mark.parametrize("scheme", ["int4", "int4-asym-g64"])
def test_a_part_in_one_piece_is_so_throughout(scheme: str, inputs: int) -> None:
    block = Block(scheme, scales=(1.0, 1.0, 1.0), inputs=inputs)
    report = merge_linears(block, run_of(block, inputs))
    assert report.merged == {3: 1}, report.summary()
    for layer in block.children():
        packed = layer.packed_weight
        assert isinstance(packed, TritonWeight)
        assert packed.codes.is_contiguous() is (inputs == 128)
        assert packed.scales.is_contiguous() or not packed.codes.is_contiguous()
        if packed.offsets is not None:
            assert packed.offsets.is_contiguous() or not packed.codes.is_contiguous()


def test_layers_part_again() -> None:
    block = Block("int4-g128")
    run = run_of(block)
    merge_linears(block, run)
    with torch.inference_mode():
        want = run()
        for layer in block.children():
            assert isinstance(layer, MergedLinear)
            part_ways(layer)
            packed = packed_of(layer)  # type: ignore[arg-type]
            assert packed is not None and packed.codes.is_contiguous()
        torch.testing.assert_close(run(), want, rtol=1e-5, atol=1e-5)


def test_what_can_not_be_one_product_is_named() -> None:
    def packed(scheme: str, outputs: int, scale: float = 1.0) -> TritonWeight:
        return pack_for_triton(
            quantize_weight(torch.randn(outputs, 128) * scale, parse_scheme(scheme), rounding="nearest")
        )

    assert quantized_obstacle([packed("int8", 128), packed("int8", 256)]) is None
    assert quantized_obstacle([packed("int8", 128), packed("int4", 128)]) == "quantized differently"
    assert "multiple of 128" in (quantized_obstacle([packed("int8", 128), packed("int8", 100)]) or "")
    assert "different sizes" in (quantized_obstacle([packed("int8", 128), packed("int8", 128, 1e-4)]) or "")


def test_a_copy_is_right_and_apart() -> None:
    block = Block("int8")
    run = run_of(block)
    merge_linears(block, run)
    with torch.inference_mode():
        torch.testing.assert_close(run_of(copy.deepcopy(block))(), run(), rtol=1e-5, atol=1e-5)

"""One product for fp8 layers of the same input: right, exact when taken apart again, without a copy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from memory_efficient_gpt.fusion import merged_fp8
from memory_efficient_gpt.fusion.merge import merge_linears
from memory_efficient_gpt.fusion.merged_linear import MergedLinear, part_ways
from memory_efficient_gpt.quantization.fp8 import fp8_linear
from memory_efficient_gpt.quantization.modules import QuantizedLinear, hold
from memory_efficient_gpt.quantization.rounding import quantize_weight
from memory_efficient_gpt.quantization.scheme import parse_scheme

SIZES = (32, 16, 16)
INPUTS = 48


class Block(nn.Module):
    """Layers that get the same input."""

    def __init__(self, schemes: tuple[str, str, str], *, bias: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        for number, (size, scheme) in enumerate(zip(SIZES, schemes, strict=True)):
            layer = nn.Linear(INPUTS, size, bias=bias)
            hold(layer, QuantizedLinear, quantize_weight(layer.weight.data, parse_scheme(scheme)))
            self.add_module(f"layer{number}", layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([layer(x) for layer in self.children()], dim=-1)


@pytest.fixture
def outputs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each product that merged layers compute."""
    counted: list[int] = []

    def multiply(x: torch.Tensor, weight: Any, *rest: Any, **options: Any) -> torch.Tensor:
        counted.append(weight.num_outputs)
        return fp8_linear(x, weight, *rest, **options)

    monkeypatch.setattr(merged_fp8, "fp8_linear", multiply)
    return counted


def x_of(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [False, True])
def test_layers_share_one_product_with_their_own_results(bias: bool, outputs: list[int]) -> None:
    block, x = Block(("fp8-dynamic",) * 3, bias=bias), x_of(2, 5, INPUTS)
    with torch.no_grad():
        want = block(x)
        report = merge_linears(block, lambda: block(x))
        outputs.clear()
        got = block(x)
    assert dict(report.merged) == {3: 1} and not report.dropped
    assert outputs == [sum(SIZES)]
    assert float((got - want).abs().max()) <= 2e-5 * float(want.abs().max())


def test_saved_tensors_are_what_they_were_and_take_no_second_copy() -> None:
    block, x = Block(("fp8-dynamic",) * 3), x_of(3, INPUTS)
    kept = {name: tensor.clone() for name, tensor in block.state_dict().items()}
    with torch.no_grad():
        merge_linears(block, lambda: block(x))
    saved = block.state_dict()
    assert saved.keys() == kept.keys()
    for name, tensor in kept.items():
        assert torch.equal(saved[name].float(), tensor.float()), name
    storages = {saved[f"layer{i}.weight_codes"].untyped_storage().data_ptr() for i in range(3)}
    assert len(storages) == 1


def test_a_layer_that_parts_ways_has_codes_of_its_own_and_the_same_result() -> None:
    block, x = Block(("fp8-dynamic",) * 3), x_of(3, INPUTS)
    with torch.no_grad():
        want = block(x)
        merge_linears(block, lambda: block(x))
        layers = [layer for layer in block.children() if isinstance(layer, MergedLinear)]
        assert len(layers) == 3
        for layer in layers:
            part_ways(layer)
        assert torch.equal(block(x), want)
    assert not any(isinstance(layer, MergedLinear) for layer in block.children())


def test_a_layer_whose_codes_were_replaced_computes_with_the_new_ones(outputs: list[int]) -> None:
    block, x = Block(("fp8-dynamic",) * 3), x_of(3, INPUTS)
    with torch.no_grad():
        merge_linears(block, lambda: block(x))
        layer: Any = block.get_submodule("layer1")
        other = torch.nn.Linear(INPUTS, SIZES[1], bias=False)
        weight = quantize_weight(other.weight.data, parse_scheme("fp8-dynamic"))
        layer.set_weight(weight)
        assert torch.equal(layer(x), fp8_linear(x, weight, None))


def test_fp8_beside_other_schemes_stays_apart() -> None:
    block, x = Block(("fp8-dynamic", "fp8-dynamic", "int8")), x_of(3, INPUTS)
    with torch.no_grad():
        report = merge_linears(block, lambda: block(x))
    assert dict(report.merged) == {2: 1}

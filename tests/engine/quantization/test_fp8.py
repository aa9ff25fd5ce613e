"""Inputs that are rounded to fp8, token by token."""

from __future__ import annotations

import pytest
import torch

from memory_efficient_gpt.quantization.fp8 import FP8_MAX, fp8_linear, multiplies_fp8, to_fp8
from memory_efficient_gpt.quantization.rounding import quantize_weight
from memory_efficient_gpt.quantization.scheme import FP8, FP8_DYNAMIC, parse_scheme
from tests.engine.quantization.test_model import IDS, quantized


def test_the_largest_element_of_each_row_is_exact_and_the_others_within_a_sixteenth() -> None:
    rows = torch.randn(20, 300) * torch.logspace(-8, 8, 20).unsqueeze(1)
    codes, scales = to_fp8(rows)
    again = codes.float() * scales
    place = rows.abs().argmax(-1, keepdim=True)
    assert torch.allclose(again.gather(1, place), rows.gather(1, place), rtol=1e-6)
    normal = codes.float().abs() >= 2**-6
    assert bool(((again - rows).abs() <= rows.abs() / 16 * 1.0001)[normal].all())
    assert float(codes.float().abs().max()) <= FP8_MAX


def test_zero_rows_stay_zero() -> None:
    codes, scales = to_fp8(torch.zeros(2, 8))
    assert not (codes.float() * scales).any() and bool(scales.isfinite().all())


def test_a_product_is_that_of_rounded_inputs_and_weights() -> None:
    weight = quantize_weight(torch.randn(24, 40), FP8_DYNAMIC, rounding="nearest")
    x, bias = torch.randn(2, 3, 40), torch.randn(24)
    codes, scales = to_fp8(x)
    want = (codes.double() * scales.double()) @ weight.dequantize(torch.float64).t() + bias.double()
    with torch.inference_mode():
        got = fp8_linear(x, weight, bias)
        plain = torch.nn.functional.linear(x, weight.dequantize(), bias)
    assert torch.allclose(got.double(), want, atol=1e-4)
    assert not torch.allclose(got, plain, atol=1e-3), "the inputs were not rounded"


def test_gradients_reach_the_inputs_as_if_nothing_was_rounded() -> None:
    weight = quantize_weight(torch.randn(8, 16), FP8_DYNAMIC, rounding="nearest")
    x = torch.randn(4, 16, requires_grad=True)
    fp8_linear(x, weight, None).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(4, 16), atol=1e-5)


def test_a_cpu_multiplies_no_fp8() -> None:
    assert not multiplies_fp8(torch.device("cpu"))


def test_the_name_tells_the_two_schemes_apart() -> None:
    assert parse_scheme("fp8-dynamic") == FP8_DYNAMIC != FP8
    assert str(FP8_DYNAMIC) == "fp8-dynamic" and str(FP8) == "fp8"
    assert FP8_DYNAMIC.bits_per_weight(64, 64) == FP8.bits_per_weight(64, 64)


@torch.inference_mode()
def test_a_model_rounds_its_inputs_only_where_the_scheme_says_so() -> None:
    logits = [quantized("llama", name)(IDS).logits for name in ("fp8", "fp8-dynamic")]
    distance = float((logits[0] - logits[1]).norm() / logits[0].norm())
    assert 1e-4 < distance < 0.2


@pytest.mark.parametrize("name", ["fp8-static", "fp8-dynamic-g64"])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(Exception, match="unknown"):
        parse_scheme(name)

"""Codes that make up for each other's errors: the definition, less error, every scheme, odd sizes."""

from __future__ import annotations

import pytest
import torch

from memory_efficient_gpt.quantization import feedback
from memory_efficient_gpt.quantization.feedback import with_feedback
from memory_efficient_gpt.quantization.rounding import quantize_weight
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.quantization.storage import QuantizedWeight, unpack_nibbles

SCHEMES = [
    "int4", "int4-g64", "int4-asym-g32", "int4-channel", "int4-tensor", "int4-asym-tensor", "int8",
    "int8-g32", "int8-asym",
]  # fmt: skip


def drawn(n: int, k: int, tokens: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight `[n, k]`, and the mean of x^T x of inputs that depend on each other and are unlike in size."""
    source = torch.Generator().manual_seed(n * k)
    mixed = torch.randn(k, k, generator=source) / k**0.5 + torch.eye(k)
    x = torch.randn(tokens, k, generator=source) @ mixed * torch.linspace(0.2, 3.0, k)
    return torch.randn(n, k, generator=source) * 0.1, x.t() @ x / tokens


def output_error(weight: torch.Tensor, stored: QuantizedWeight, products: torch.Tensor) -> float:
    """The expected square of what outputs are off by."""
    off = weight.double() - stored.dequantize(torch.float32).double()
    return float(((off @ products.double()) * off).sum())


def codes(stored: QuantizedWeight) -> torch.Tensor:
    if stored.scheme.bits == 4:
        return unpack_nibbles(stored.codes, stored.num_inputs)
    return stored.codes


def by_definition(weight: torch.Tensor, stored: QuantizedWeight, products: torch.Tensor) -> torch.Tensor:
    """Input after input in float64, with the inverse of what is left of H each time: slow and plain."""
    scheme, (n, k) = stored.scheme, weight.shape
    squares = products.diagonal()
    order = torch.argsort(squares, descending=True, stable=True)
    h = (products / squares.mean() + feedback.DAMPING[0] * torch.eye(k)).double()
    size = scheme.group_size or k
    steps = (stored.scales.float() * stored.unit).double()
    left, found = weight.double().clone(), torch.zeros(n, k, dtype=torch.uint8)
    for place, column in enumerate(order.tolist()):
        rest = order[place:]
        inverse = torch.linalg.inv(h[rest][:, rest])
        step = steps[:, column // size]
        code = torch.round(left[:, column] / step + scheme.middle).clamp(0, 2**scheme.bits - 1)
        found[:, column] = code.to(torch.uint8)
        error = (left[:, column] - (code - scheme.middle) * step) / inverse[0, 0]
        left[:, rest] -= error[:, None] * inverse[0][None]
    return found


@pytest.mark.parametrize(("n", "k"), [(24, 40), (7, 150)])
def test_codes_are_those_of_the_definition(n: int, k: int) -> None:
    weight, products = drawn(n, k)
    stored = quantize_weight(weight, parse_scheme("int4"))
    got = codes(with_feedback(weight, stored, products))
    same = float((got == by_definition(weight, stored, products)).float().mean())
    assert same > 0.995, "but for float32's ties"


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize(("n", "k"), [(32, 128), (17, 200), (3, 33)])
def test_outputs_are_nearer_than_by_search_and_only_codes_change(name: str, n: int, k: int) -> None:
    weight, products = drawn(n, k)
    scheme = parse_scheme(name)
    searched = quantize_weight(weight, scheme, importance=products.diagonal())
    got = quantize_weight(weight, scheme, rounding="gptq", products=products)
    assert got.scheme == scheme and got.num_inputs == k
    assert torch.equal(got.scales, searched.scales) and got.codes.shape == searched.codes.shape
    assert (got.offsets is None) == (searched.offsets is None)
    assert output_error(weight, got, products) < 0.8 * output_error(weight, searched, products)


def test_inputs_that_do_not_depend_on_each_other_are_rounded_to_nearest() -> None:
    weight, _ = drawn(16, 64)
    stored = quantize_weight(weight, parse_scheme("int4"))
    products = torch.diag(torch.linspace(0.1, 5.0, 64))
    assert torch.equal(with_feedback(weight, stored, products).codes, stored.codes)


def test_a_text_that_reaches_few_inputs_or_none_does_no_harm() -> None:
    weight, products = drawn(16, 64, tokens=5)  # H has no inverse
    products[10:30] = 0
    products[:, 10:30] = 0
    stored = quantize_weight(weight, parse_scheme("int4"))
    got = with_feedback(weight, stored, products)
    assert output_error(weight, got, products) < output_error(weight, stored, products)
    assert torch.equal(codes(got)[:, 10:30], codes(stored)[:, 10:30]), "nothing is known of them"
    assert torch.equal(with_feedback(weight, stored, torch.zeros(64, 64)).codes, stored.codes)


def test_rows_are_independent_in_whatever_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, products = drawn(40, 64)
    stored = quantize_weight(weight, parse_scheme("int4-tensor"))
    whole = with_feedback(weight, stored, products)
    monkeypatch.setattr(feedback, "PART_ELEMENTS", 64 * 7)
    assert torch.equal(with_feedback(weight, stored, products).codes, whole.codes)


def test_what_is_not_finite_or_missing_is_refused() -> None:
    weight, products = drawn(16, 64)
    with pytest.raises(ValueError, match="gptq needs products"):
        quantize_weight(weight, parse_scheme("int4"), rounding="gptq")
    products[3, 3] = torch.nan
    with pytest.raises(ValueError, match="not finite"):
        quantize_weight(weight, parse_scheme("int4"), rounding="gptq", products=products)

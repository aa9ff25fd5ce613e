"""Quantizers: errors within their bounds for every scheme and shape, and search never worse than rounding."""

from __future__ import annotations

import pytest
import torch

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from memory_efficient_gpt.quantization.rounding import Rounding, quantize_weight
from memory_efficient_gpt.quantization.scheme import Scheme, parse_scheme

SCHEMES = [
    "int4", "int4-g64", "int4-g128", "int4-channel", "int4-tensor", "int4-asym", "int4-asym-g64",
    "int4-asym-channel", "int8", "int8-asym", "int8-g64", "int8-tensor", "int8-asym-tensor", "fp8",
]  # fmt: skip
SHAPES = [(1, 1), (3, 31), (16, 64), (17, 100), (40, 257)]  # inputs that no group size divides, too


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = load_kernels()
    if isinstance(loaded, Unavailable):
        pytest.skip(loaded.reason)
    return loaded


def draw(n: int, k: int, *, scale: float = 0.02, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(seed + n * k)) * scale


def error(weight: torch.Tensor, scheme: Scheme, rounding: Rounding = "search", **options: object) -> float:
    """Squared error by squared norm, in float64."""
    quantized = quantize_weight(weight, scheme, rounding=rounding, **options)  # type: ignore[arg-type]
    exact = weight.double()
    return float((quantized.dequantize(torch.float64) - exact).square().sum() / exact.square().sum())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("name", SCHEMES)
def test_nearest_errs_by_half_a_step_at_most(name: str, shape: tuple[int, int]) -> None:
    """And by what rounding scale and offset to float16 moves a code: 2^-11 of at most 2^bits steps each."""
    scheme, weight = parse_scheme(name), draw(*shape)
    quantized = quantize_weight(weight, scheme, rounding="nearest")
    wrong = (quantized.dequantize(torch.float64) - weight.double()).abs()
    if scheme.kind == "fp8":
        largest = weight.abs().amax(1, keepdim=True).double()
        assert (wrong <= weight.double().abs() * 2.0**-4 * 1.01 + largest / 448 * 2.0**-9).all()
        return
    steps = quantized.scales.double() * quantized.unit.double()
    size = scheme.group_size
    steps = steps.repeat_interleave(size, dim=1)[:, : shape[1]] if size else steps
    slack = 0.5 + 2**scheme.bits * 2.0**-10
    assert (wrong <= steps * slack).all()


@pytest.mark.parametrize("shape", [(16, 64), (17, 100), (40, 257)], ids=str)
@pytest.mark.parametrize("name", [n for n in SCHEMES if n != "fp8"])
def test_search_is_never_worse_than_nearest(name: str, shape: tuple[int, int]) -> None:
    scheme, weight = parse_scheme(name), draw(*shape)
    assert error(weight, scheme, "search") <= error(weight, scheme, "nearest") * 1.001


@pytest.mark.parametrize(
    ("name", "rounding", "limit"),
    [("int4", "nearest", 0.0098), ("int4", "search", 0.0069), ("int4-g128", "search", 0.0098),
     ("int4-asym-g64", "search", 0.0075), ("int4-asym-g64", "hqq", 0.0078), ("int8", "search", 0.0001)],
)  # fmt: skip
def test_errors_of_gaussian_weights_are_those_of_the_literature(
    name: str, rounding: Rounding, limit: float
) -> None:
    """Within 5% of .0094, .0066, .0094, .0071, .0074 and of 8 bits' .00008, measured with other code."""
    assert error(draw(256, 1024, scale=1.0), parse_scheme(name), rounding) <= limit


@pytest.mark.parametrize("name", ["int4", "int4-asym-g64", "int8", "fp8"])
@pytest.mark.parametrize("scale", [1e-25, 1e-6, 1e6, 1e25])
def test_very_small_and_very_large_weights_lose_no_more(name: str, scale: float) -> None:
    scheme, weight = parse_scheme(name), draw(16, 128, scale=1.0)
    assert error(weight * scale, scheme) == pytest.approx(error(weight, scheme), rel=0.02)


@pytest.mark.parametrize("name", SCHEMES)
def test_zeros_stay_zero(name: str) -> None:
    weight = draw(4, 96)
    weight[1] = 0.0
    weight[2, :32] = 0.0
    quantized = quantize_weight(weight, parse_scheme(name)).dequantize()
    assert torch.isfinite(quantized).all()
    exact = parse_scheme(name).symmetric  # an offset is rounded like everything else
    limit = 0.0 if exact else float(weight.abs().max()) * 2.0 ** (1 - parse_scheme(name).bits)
    assert quantized[1].abs().max() <= limit and quantized[2, :32].abs().max() <= limit


@pytest.mark.parametrize("name", ["int4", "int4-asym-g64"])
def test_importance_moves_the_error_to_where_it_counts_least(name: str) -> None:
    weight, importance = draw(64, 256), torch.ones(256)
    importance[::2] = 100.0
    scheme = parse_scheme(name)
    plain = (quantize_weight(weight, scheme).dequantize() - weight).square()
    weighted = (quantize_weight(weight, scheme, importance=importance).dequantize() - weight).square()
    assert (weighted * importance).sum() < (plain * importance).sum()
    assert weighted[:, ::2].sum() < plain[:, ::2].sum()


def test_hqq_needs_zero_points() -> None:
    with pytest.raises(ConfigError, match="hqq finds zero points, and int4 has none"):
        quantize_weight(draw(4, 64), parse_scheme("int4"), rounding="hqq")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weight = draw(4, 64)
    weight[2, 3] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        quantize_weight(weight, parse_scheme("int8"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_importance", [False, True])
@pytest.mark.parametrize("shape", [(3, 31), (17, 100), (64, 512)], ids=str)
@pytest.mark.parametrize(
    "name", ["int4", "int4-g128", "int4-asym-g64", "int4-channel", "int8", "int8-asym-g64"]
)
def test_the_native_search_finds_what_torchs_finds(
    kernels: Kernels, name: str, shape: tuple[int, int], with_importance: bool, dtype: torch.dtype
) -> None:
    """Sums in another order may pick another trial of nearly the same error, hence not the same scales."""
    weight, scheme = draw(*shape).to(dtype), parse_scheme(name)
    source = torch.Generator().manual_seed(1)
    importance = torch.rand(shape[1], generator=source) + 0.1 if with_importance else None
    plain = quantize_weight(weight, scheme, importance=importance)
    native = quantize_weight(weight, scheme, importance=importance, kernels=kernels)
    assert {n: (t.shape, t.dtype) for n, t in native.tensors().items()} == {
        n: (t.shape, t.dtype) for n, t in plain.tensors().items()
    }
    counts = importance.double() if importance is not None else 1.0
    exact = weight.double()
    wrong = [float(((q.dequantize(torch.float64) - exact).square() * counts).sum()) for q in (native, plain)]
    # At 8 bits the error is 1e-5 of the sums that it is the difference of.
    slack = 1.005 if scheme.bits == 4 else 1.05
    least = 1e-7 * float(exact.square().sum())
    assert wrong[0] <= wrong[1] * slack + least
    assert wrong[1] <= wrong[0] * slack + least


@pytest.mark.parametrize("name", ["int4", "int4-asym-g64", "int8", "int8-asym-g64"])
def test_the_native_search_takes_single_numbers_and_zeros(kernels: Kernels, name: str) -> None:
    for weight in (torch.tensor([[0.3]]), torch.tensor([[-0.3]]), torch.zeros(2, 40)):
        quantized = quantize_weight(weight, parse_scheme(name), kernels=kernels).dequantize()
        assert (quantized - weight).abs().max() <= 0.01 * weight.abs().max() + 1e-25


def test_native_codes_are_the_nearest_to_what_is_stored(kernels: Kernels) -> None:
    weight = draw(33, 100)
    for name in ("int4", "int8-asym-g32"):
        quantized = quantize_weight(weight, parse_scheme(name), kernels=kernels)
        steps = (quantized.scales.double() * quantized.unit.double()).abs()
        size = quantized.scheme.group_size or 100
        steps = steps.repeat_interleave(size, dim=1)[:, :100]
        inside = (quantized.integer_codes() > 0) & (quantized.integer_codes() < 2**quantized.scheme.bits - 1)
        wrong = (quantized.dequantize(torch.float64) - weight.double()).abs()
        assert (wrong <= steps * 0.501)[inside].all()


@pytest.mark.parametrize(
    ("name", "rounding"),
    [(n, r) for n in SCHEMES for r in ("nearest", "search")] + [(n, "hqq") for n in SCHEMES if "asym" in n],
)
def test_a_large_weight_is_quantized_part_by_part(
    name: str, rounding: Rounding, monkeypatch: pytest.MonkeyPatch
) -> None:
    scheme, weight = parse_scheme(name), draw(40, 257)
    importance = torch.rand(257, generator=torch.Generator().manual_seed(1))
    whole = quantize_weight(weight, scheme, rounding=rounding, importance=importance)
    monkeypatch.setattr("memory_efficient_gpt.quantization.rounding.PART_ELEMENTS", 7 * 257)
    parts = quantize_weight(weight, scheme, rounding=rounding, importance=importance)
    assert torch.equal(parts.codes.view(torch.uint8), whole.codes.view(torch.uint8))
    assert torch.equal(parts.scales, whole.scales) and torch.equal(parts.unit, whole.unit)
    if whole.offsets is not None:
        assert parts.offsets is not None and torch.equal(parts.offsets, whole.offsets)

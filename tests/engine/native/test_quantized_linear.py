"""The quantized linear kernel: float64's numbers, on every instruction set, in any batch.

Activations are rounded to 8 bits inside, so the reference rounds them in the same way; what is left is the
rounding of float32 sums and of the result.
"""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from memory_efficient_gpt.native.build import Isa, Unavailable
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from memory_efficient_gpt.native.packed_weight import PackedWeight, dequantize_rows, pack, unpack
from memory_efficient_gpt.native.quantize import pack_stored
from memory_efficient_gpt.quantization.storage import pack_nibbles

# (outputs, inputs, bits, group size, symmetric): odd sizes, short last groups, one block and many
CASES = [
    (48, 64, 4, 32, True),
    (50, 100, 4, 32, False),
    (33, 40, 8, None, True),
    (16, 513, 8, None, False),
    (80, 300, 8, 64, True),
    (256, 1024, 4, 128, True),
    (1, 1, 4, 32, True),
    (100, 1000, 4, None, False),
    (40, 104, 8, None, True),
]
TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 4e-3}


@pytest.fixture(scope="module", params=get_args(Isa))
def kernels(request: pytest.FixtureRequest) -> Kernels:
    loaded = load_kernels(request.param)
    if isinstance(loaded, Unavailable):
        pytest.skip(loaded.reason)
    return loaded


def draw_weight(n: int, k: int, bits: int, group: int | None, *, symmetric: bool) -> PackedWeight:
    source = torch.Generator().manual_seed(n * k)
    groups = -(-k // group) if group else 1
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=source)
    scales = torch.rand(n, groups, generator=source) * 0.1 - 0.05  # negative ones are allowed
    offsets = None if symmetric else (scales * torch.rand(n, groups, generator=source) * 2**bits).half()
    return pack(codes, scales.half(), offsets, 0.125, bits=bits, group_size=group)


def dense(weight: PackedWeight) -> torch.Tensor:
    return dequantize_rows(weight, torch.arange(weight.num_outputs), torch.float32).double()


def rounded(x: torch.Tensor, span: int) -> torch.Tensor:
    """x `[M, K]` as the kernel sees it, in float64."""
    m, k = x.shape
    parts = torch.nn.functional.pad(x.float(), (0, -k % span)).view(m, -1, span)
    largest = parts.abs().amax(-1, keepdim=True)
    q = torch.where(largest > 0, torch.round(parts * (127.0 / largest)), 0.0)
    return (q.double() * (largest.double() / 127)).view(m, -1)[:, :k]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, 13, 40, 150])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_float64_of_the_rounded_activations(
    kernels: Kernels, case: tuple[int, int, int, int | None, bool], rows: int, dtype: torch.dtype
) -> None:
    n, k, bits, group, symmetric = case
    weight = draw_weight(n, k, bits, group, symmetric=symmetric)
    source = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, k, generator=source).to(dtype)
    bias = torch.randn(n, generator=source).to(dtype)
    want = rounded(x, weight.span) @ dense(weight).t() + bias.double()
    got = kernels.quantized_linear(x, weight, bias)
    assert got.dtype is dtype
    error = (got.double() - want).norm() / want.norm()
    assert error <= TOLERANCES[dtype]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_row_is_the_same_in_any_batch_and_on_any_threads(
    kernels: Kernels, case: tuple[int, int, int, int | None, bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    n, k, bits, group, symmetric = case
    weight = draw_weight(n, k, bits, group, symmetric=symmetric)
    x = torch.randn(29, k, generator=torch.Generator().manual_seed(1)).bfloat16()
    monkeypatch.setattr(kernels, "num_threads", 3)
    together = kernels.quantized_linear(x, weight)
    monkeypatch.setattr(kernels, "num_threads", 1)
    for row in range(len(x)):
        assert torch.equal(kernels.quantized_linear(x[row : row + 1], weight), together[row : row + 1])


def test_instruction_sets_agree_bit_for_bit(kernels: Kernels) -> None:
    """But for the portable one, whose multiply-add rounds twice."""
    reference = load_kernels("avx2")
    if isinstance(reference, Unavailable) or kernels.isa == "portable":
        pytest.skip("nothing to compare")
    weight = draw_weight(50, 300, 4, 32, symmetric=False)
    x = torch.randn(40, 300)  # by matrix tiles, where there are any
    assert torch.equal(kernels.quantized_linear(x, weight), reference.quantized_linear(x, weight))


def test_zeros_strides_and_leading_shapes(kernels: Kernels) -> None:
    weight = draw_weight(20, 64, 4, 32, symmetric=True)
    assert torch.equal(kernels.quantized_linear(torch.zeros(2, 3, 64), weight), torch.zeros(2, 3, 20))
    wide = torch.randn(6, 100)
    want = kernels.quantized_linear(wide[:, 10:74].contiguous(), weight)
    assert torch.equal(kernels.quantized_linear(wide[:, 10:74], weight), want)
    assert kernels.quantized_linear(torch.empty(0, 64), weight).shape == (0, 20)


def test_torchs_own_products_stay_what_they_are_beside_ours(kernels: Kernels) -> None:
    """Both may set up the CPU's matrix tiles, on the same thread."""
    weights = [draw_weight(64, 512, 4, 128, symmetric=True), draw_weight(64, 96, 8, None, symmetric=False)]
    x, dense = torch.randn(40, 512).bfloat16(), torch.randn(64, 512).bfloat16()

    def products() -> list[torch.Tensor]:
        ours = [
            kernels.quantized_linear(x[:, : weight.num_inputs].contiguous(), weight) for weight in weights
        ]
        return [*ours, torch.nn.functional.linear(x, dense)]

    first = products()
    for _ in range(5):
        assert all(torch.equal(*pair) for pair in zip(products(), first, strict=True))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 17, 67])
def test_what_is_not_finite_spoils_its_own_row_only(kernels: Kernels, bad: float, place: int) -> None:
    weight = draw_weight(20, 68, 8, None, symmetric=True)
    x = torch.randn(3, 68)
    good = kernels.quantized_linear(x, weight)
    x[1, place] = bad
    got = kernels.quantized_linear(x, weight)
    assert not torch.isfinite(got[1]).any()
    assert torch.equal(got[0], good[0]) and torch.equal(got[2], good[2])


def test_what_does_not_fit_is_refused(kernels: Kernels) -> None:
    weight = draw_weight(20, 64, 4, 32, symmetric=True)
    with pytest.raises(ValueError, match=r"x \[..., 64\], got float32 \[2, 63\]"):
        kernels.quantized_linear(torch.zeros(2, 63), weight)
    with pytest.raises(ValueError, match=r"bias \[20\] of torch.float32"):
        kernels.quantized_linear(torch.zeros(2, 64), weight, torch.zeros(19))
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        kernels.quantized_linear(torch.zeros(2, 64).half(), weight)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_packing_loses_nothing(case: tuple[int, int, int, int | None, bool]) -> None:
    n, k, bits, group, symmetric = case
    source = torch.Generator().manual_seed(0)
    groups = -(-k // group) if group else 1
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8, generator=source)
    scales = torch.rand(n, groups, generator=source).half()
    offsets = None if symmetric else torch.rand(n, groups, generator=source).half()
    again = unpack(pack(codes, scales, offsets, 1.0, bits=bits, group_size=group))
    assert torch.equal(again[0], codes) and torch.equal(again[1], scales)
    assert (again[2] is None) if offsets is None else torch.equal(again[2], offsets)  # type: ignore[arg-type]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_stored_codes_are_packed_alike(
    kernels: Kernels, case: tuple[int, int, int, int | None, bool]
) -> None:
    n, k, bits, group, _ = case
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scales = torch.rand(n, -(-k // group) if group else 1).half()
    stored = pack_nibbles(codes) if bits == 4 else codes
    want = pack(codes, scales, None, 1.0, bits=bits, group_size=group)
    got = pack_stored(kernels, stored, scales, None, 1.0, num_inputs=k, bits=bits, group_size=group)
    assert torch.equal(got.codes, want.codes) and torch.equal(got.scales, want.scales)
    assert (got.span, got.per_group) == (want.span, want.per_group)


def test_rows_looked_up_are_rows_of_the_weight() -> None:
    weight = draw_weight(50, 100, 4, 32, symmetric=False)
    rows = torch.tensor([49, 0, 16, 16, 31])
    whole = dequantize_rows(weight, torch.arange(50), torch.bfloat16)
    assert torch.equal(dequantize_rows(weight, rows, torch.bfloat16), whole[rows])

"""The kernels against torch: every instruction set, odd sizes, and bit for bit where that is promised."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, get_args

import pytest
import torch
from torch.nn import functional

from memory_efficient_gpt.native.build import Isa, Unavailable
from memory_efficient_gpt.native.ops import Activation, Kernels, load_kernels

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 2, 5, 6, 7, 13, 32, 67]


ISAS = [isa for isa in get_args(Isa) if isa != "amx"]  # whose own kernels multiply quantized weights only


@pytest.fixture(scope="module", params=ISAS)
def kernels(request: pytest.FixtureRequest) -> Kernels:
    loaded = load_kernels(request.param)
    if isinstance(loaded, Unavailable):
        pytest.skip(loaded.reason)
    assert loaded.isa == request.param
    return loaded


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def linear_tolerance(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """float32 sums of K products: 2^-24 of the sum of magnitudes for each of about log2 K + 8 roundings.

    bfloat16 outputs add half a unit of theirs, 2^-9.
    """
    magnitude = x.abs().double() @ weight.abs().double().T
    bound = magnitude * 2.0**-20
    if x.dtype is torch.bfloat16:
        bound = bound + (x.double() @ weight.double().T).abs() * 2.0**-8
    return bound + 1e-30


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (4, 31), (33, 64), (50, 100), (16, 7000)], ids=str)
def test_linear_equals_float64(
    kernels: Kernels, shape: tuple[int, int], with_bias: bool, dtype: torch.dtype
) -> None:
    n, k = shape
    weight = draw(n, k, dtype=dtype, seed=1)
    bias = draw(n, dtype=dtype, seed=2) if with_bias else None
    for m in ROWS:
        x = draw(m, k, dtype=dtype, seed=m)
        want = x.double() @ weight.double().T + (bias.double() if bias is not None else 0)
        got = kernels.linear(x, weight, bias)
        assert got.dtype is dtype
        limit = linear_tolerance(x, weight)
        if bias is not None:
            limit = limit + want.abs() * (2.0**-8 if dtype is torch.bfloat16 else 2.0**-22)
        assert bool(((got.double() - want).abs() <= limit).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(50, 100), (70, 4100)], ids=str)
def test_a_linear_row_is_the_same_in_any_batch_and_on_any_threads(
    kernels: Kernels, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    n, k = shape
    weight, bias = draw(n, k, dtype=dtype, seed=1), draw(n, dtype=dtype, seed=2)
    x = draw(131, k, dtype=dtype)
    alone = torch.cat([kernels.linear(row, weight, bias) for row in torch.split(x, 1)])
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            for m in (2, 3, 8, 17, 64, 131):
                assert torch.equal(kernels.linear(x[:m], weight, bias), alone[:m])
    finally:
        torch.set_num_threads(before)


def test_linear_takes_any_leading_shape_and_strided_rows(kernels: Kernels) -> None:
    weight = draw(10, 24)
    x = draw(2, 3, 48)[:, :, ::1]
    assert kernels.linear(x[..., :24].contiguous(), weight).shape == (2, 3, 10)
    wide = draw(5, 48)
    assert torch.equal(
        kernels.linear(wide[:, :24], weight), kernels.linear(wide[:, :24].contiguous(), weight)
    )
    assert torch.equal(
        kernels.linear(wide[:, ::2], weight), kernels.linear(wide[:, ::2].contiguous(), weight)
    )
    assert kernels.linear(draw(24), weight).shape == (10,)


def test_empty_work_is_done(kernels: Kernels) -> None:
    weight, bias = draw(10, 24), draw(10)
    assert kernels.linear(draw(0, 24), weight).shape == (0, 10)
    assert kernels.linear(draw(3, 24), draw(0, 24)).shape == (3, 0)
    assert torch.equal(kernels.linear(draw(3, 0), draw(10, 0), bias), bias.expand(3, 10))
    assert kernels.rms_norm(draw(0, 24), None, 1e-6).shape == (0, 24)
    assert kernels.gated(draw(0, 24), draw(0, 24), "silu").shape == (0, 24)


def test_linear_keeps_nan_in_its_row_and_overflow_infinite(kernels: Kernels) -> None:
    weight = torch.ones(3, 40, dtype=torch.bfloat16)
    x = torch.ones(4, 40, dtype=torch.bfloat16)
    x[1, 7] = torch.nan
    x[2] = 3e38
    got = kernels.linear(x, weight)
    assert torch.equal(got[[0, 3]], torch.full((2, 3), 40.0, dtype=torch.bfloat16))
    assert bool(got[1].isnan().all())
    assert bool(got[2].isinf().all())


def llama_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def gemma_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (wide * (1 + weight.float())).type_as(x)


def olmo_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (weight.float() * wide).to(x.dtype)


NORMS: dict[Any, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "round_then_scale": llama_norm,
    "one_plus_weight": gemma_norm,
    "scale_then_round": olmo_norm,
}


def assert_rounds_alike(got: torch.Tensor, want: torch.Tensor, *, share: float) -> None:
    """float32: 2e-6. bfloat16: one unit apart at most, and that in at most `share` of the elements."""
    if want.dtype is torch.float32:
        torch.testing.assert_close(got, want, rtol=2e-6, atol=2e-6)
        return
    torch.testing.assert_close(got, want, rtol=2**-7, atol=1e-6)
    assert float((got != want).float().mean()) <= share


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("style", NORMS)
@pytest.mark.parametrize("size", [1, 20, 64, 2048])
def test_rms_norm_rounds_as_the_models_do(
    kernels: Kernels, size: int, style: Any, dtype: torch.dtype
) -> None:
    x, weight = draw(3, 5, size, dtype=dtype), draw(size, dtype=dtype, seed=1)
    for scale in (1.0, 1e-3):
        # A sum in another order moves float32's last bit, which a bfloat16 rounding seldom shows.
        assert_rounds_alike(
            kernels.rms_norm(x * scale, weight, 1e-6, style),
            NORMS[style](x * scale, weight, 1e-6),
            share=0.01,
        )


def test_rms_norm_without_weight_and_in_any_batch(kernels: Kernels) -> None:
    x = draw(9, 100)
    got = kernels.rms_norm(x, None, 1e-5)
    torch.testing.assert_close(got, llama_norm(x, torch.ones(100), 1e-5))
    for row in range(9):
        assert torch.equal(kernels.rms_norm(x[row], None, 1e-5), got[row])


ACTIVATIONS: dict[Activation, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "gelu": functional.gelu,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", get_args(Activation))
@pytest.mark.parametrize("size", [1, 37, 256])
def test_gated_activations_equal_torch(
    kernels: Kernels, size: int, name: Activation, dtype: torch.dtype
) -> None:
    merged = draw(4, 2 * size, dtype=dtype) * 4
    gate, up = merged.chunk(2, dim=-1)
    got, want = kernels.gated(gate, up, name), ACTIVATIONS[name](gate.double()) * up.double()
    # float32: 1.5e-7 of the approximated erf and a few roundings. bfloat16: two roundings of 2^-9.
    limit = 4e-7 * (gate * up).double().abs() + (2e-6 if dtype is torch.float32 else 2**-7) * want.abs()
    assert bool(((got.double() - want).abs() <= limit).all())


@pytest.mark.parametrize("name", get_args(Activation))
def test_activations_of_extreme_values_stay_finite(kernels: Kernels, name: Activation) -> None:
    gate = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30]])
    got = kernels.gated(gate, torch.ones_like(gate), name)
    torch.testing.assert_close(got.double(), ACTIVATIONS[name](gate.double()), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(16, 16), (20, 20), (64, 32), (128, 128)], ids=str)
def test_rope_rounds_as_transformers_does(
    kernels: Kernels, sizes: tuple[int, int], dtype: torch.dtype
) -> None:
    d, p = sizes
    x = draw(4, 7, d, dtype=dtype).transpose(0, 1)
    cos, sin = draw(7, p, dtype=dtype, seed=1), draw(7, p, dtype=dtype, seed=2)
    head, half = x[..., :p], p // 2
    turned = torch.cat((-head[..., half:], head[..., :half]), dim=-1)
    want = torch.cat((head * cos.unsqueeze(1) + turned * sin.unsqueeze(1), x[..., p:]), dim=-1)
    kernels.apply_rope(x, cos, sin)
    if dtype is torch.float32:
        torch.testing.assert_close(x, want, rtol=0, atol=1e-6)
    else:
        assert torch.equal(x, want)


def test_what_does_not_fit_is_refused_by_name(kernels: Kernels) -> None:
    x, weight = draw(2, 8), draw(4, 8)
    with pytest.raises(ValueError, match=r"x \[..., 8\].*float32 \[2, 7\]"):
        kernels.linear(x[:, :7], weight)
    with pytest.raises(ValueError, match="one dtype"):
        kernels.linear(x.bfloat16(), weight)
    with pytest.raises(ValueError, match="float32 or bfloat16 on the CPU, got float16"):
        kernels.linear(x.half(), weight.half())
    with pytest.raises(ValueError, match="contiguous weight"):
        kernels.linear(draw(2, 4), weight.t())
    with pytest.raises(ValueError, match=r"bias \[4\]"):
        kernels.linear(x, weight, draw(5))
    with pytest.raises(ValueError, match="two tensors alike"):
        kernels.gated(x, weight, "silu")
    with pytest.raises(ValueError, match="even"):
        kernels.apply_rope(draw(2, 1, 8), draw(2, 7), draw(2, 7))
    with pytest.raises(ValueError, match=r"weight \[8\]"):
        kernels.rms_norm(x, draw(7), 1e-6)


def test_calls_from_many_threads_at_once_are_right(kernels: Kernels) -> None:
    """One call has the helper threads, the others compute alone."""
    weight, x = draw(600, 1100), draw(40, 1100)
    want = kernels.linear(x, weight)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(4) as pool:
            results = list(pool.map(lambda _: kernels.linear(x, weight), range(40)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(result, want) for result in results)


def test_a_forked_process_has_helper_threads_of_its_own(kernels: Kernels) -> None:
    script = f"""
        import os, sys, warnings
        import torch
        from memory_efficient_gpt.native.ops import load_kernels
        kernels = load_kernels({kernels.isa!r})
        kernels.num_threads = 3
        torch.set_num_threads(1)
        x, weight = torch.ones(40, 1100), torch.ones(600, 1100)
        first = kernels.linear(x, weight)
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
        if child == 0:
            os._exit(0 if torch.equal(kernels.linear(x, weight), first) else 3)
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    assert subprocess.run(command, env=environment, check=False, timeout=100).returncode == 0


def test_a_copy_shares_the_library(kernels: Kernels) -> None:
    assert copy.deepcopy({"kernels": kernels})["kernels"] is kernels

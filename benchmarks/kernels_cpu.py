"""The native CPU kernels against torch, on this machine, in one run.

Purpose: a table of times and ratios for attention, linear layers, row-wise kernels and quantized weights
(these also without matrix tiles, where the CPU has them).
Does not know: models, engines.
Invariant: the two sides of a ratio are timed alternately, so that other load on the machine hits both.

    python -m benchmarks.kernels_cpu [--only linear,attention,rows,quantized] [--threads N] [--seconds S]
        [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch.nn import functional

from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from memory_efficient_gpt.native.packed_weight import PackedWeight, pack

LINEAR_SHAPES = ((5632, 2048), (2048, 5632), (2048, 2048))
LINEAR_ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
QUANTIZED_SHAPES = ((11264, 2048), (2048, 5632), (2048, 2048))
QUANTIZED = {"int4-g128": (4, 128), "int8": (8, None)}
CACHE_BYTES = 160 << 20  # weights in rotation, so that they come from memory and not from a cache
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 32, 8, 64, 16
DECODE = ((1, 512), (8, 512), (32, 512), (1, 8192), (8, 4096))
PREFILL = ((1, 512), (1, 1500), (1, 4096), (4, 256))

Weight = TypeVar("Weight")


@dataclass(frozen=True)
class Result:
    """One line of the table. Times are the least of the run; `ratio` is of medians (other / native).

    The other is torch, unless the case names one.
    """

    group: str
    case: str
    native_us: float
    other_us: float
    ratio: float
    rate: float
    unit: str


def main() -> None:
    """Parse the command line, run, print, and write JSON where asked."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels_cpu", description=__doc__)
    parser.add_argument("--only", default="linear,attention,rows,quantized", help="groups, by commas")
    parser.add_argument("--threads", type=int, help="torch.set_num_threads; default: torch's choice")
    parser.add_argument("--seconds", type=float, default=0.6, help="time for each line (default: 0.6)")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    options = parser.parse_args()
    groups = {
        "linear": linear_cases,
        "attention": attention_cases,
        "rows": row_cases,
        "quantized": quantized_cases,
    }
    unknown = set(options.only.split(",")) - set(groups)
    if unknown:
        parser.error(f"--only knows {', '.join(groups)}; got {', '.join(sorted(unknown))}")
    if options.threads:
        torch.set_num_threads(options.threads)
    kernels = load_kernels()
    if isinstance(kernels, Unavailable):
        sys.exit(f"native kernels are unavailable: {kernels.reason}")
    print(f"{kernels.isa}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"{'case':52} {'native us':>10} {'other us':>10} {'ratio':>6}  native rate")
    results = []
    for name in options.only.split(","):
        for result in groups[name](kernels, options.seconds):
            results.append(result)
            print(
                f"{result.group + ' ' + result.case:52} {result.native_us:10.1f} {result.other_us:10.1f} "
                f"{result.ratio:6.2f}  {result.rate:.1f} {result.unit}",
                flush=True,
            )
    if options.json:
        document = {
            "machine": platform.processor() or platform.machine(),
            "isa": kernels.isa,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "results": [asdict(result) for result in results],
        }
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def linear_cases(kernels: Kernels, seconds: float) -> Iterator[Result]:
    """x [M, K] times w [N, K], against torch.nn.functional.linear."""
    for dtype in (torch.bfloat16, torch.float32):
        for n, k in LINEAR_SHAPES:
            weight_bytes = n * k * dtype.itemsize
            weights = [torch.randn(n, k).mul_(0.02).to(dtype) for _ in range(1 + CACHE_BYTES // weight_bytes)]
            for m in LINEAR_ROWS:
                x = torch.randn(m, k).to(dtype)
                native, torch_time, ratio = compare(
                    partial(apply_in_rotation, kernels.linear, x, weights),
                    partial(apply_in_rotation, functional.linear, x, weights),
                    seconds,
                )
                bandwidth, speed = weight_bytes / native / 1e3, 2e-3 * m * n * k / native
                rate = (bandwidth, "GB/s") if m <= 16 else (speed, "GFLOP/s")
                case = f"{short(dtype)} M={m} N={n} K={k}"
                yield Result("linear", case, native, torch_time, ratio, *rate)


def apply_in_rotation(
    linear: Callable[[torch.Tensor, Weight], torch.Tensor], x: torch.Tensor, weights: list[Weight], turn: int
) -> torch.Tensor:
    """One layer's output, with another weight each turn."""
    return linear(x, weights[turn % len(weights)])


def quantized_cases(kernels: Kernels, seconds: float) -> Iterator[Result]:
    """The same with quantized w, against torch with bfloat16 w, and against AVX-512 on a CPU with AMX."""
    without = load_kernels("avx512") if kernels.isa == "amx" else None
    for name, (bits, group) in QUANTIZED.items():
        for n, k in QUANTIZED_SHAPES:
            count = 1 + CACHE_BYTES // (n * k * bits // 8)
            weights = [quantized_weight(n, k, bits, group) for _ in range(count)]
            again = [replace(weight, codes=weight.codes.clone()) for weight in weights]  # not in a cache yet
            dense = [torch.randn(n, k).bfloat16() for _ in range(1 + CACHE_BYTES // (2 * n * k))]
            for m in LINEAR_ROWS:
                x = torch.randn(m, k).bfloat16()
                own = partial(apply_in_rotation, kernels.quantized_linear, x, weights)
                others = {"": partial(apply_in_rotation, functional.linear, x, dense)}
                if isinstance(without, Kernels):
                    others[" by avx512"] = partial(apply_in_rotation, without.quantized_linear, x, again)
                for other, call in others.items():
                    native, other_time, ratio = compare(own, call, seconds)
                    case = f"{name} M={m} N={n} K={k}{other}"
                    yield Result(
                        "quantized", case, native, other_time, ratio, 2e-3 * m * n * k / native, "GOP/s"
                    )


def quantized_weight(n: int, k: int, bits: int, group: int | None) -> PackedWeight:
    """Random codes and scales, symmetric."""
    codes = torch.randint(0, 2**bits, (n, k), dtype=torch.uint8)
    scales = (torch.rand(n, k // group if group else 1) * 0.01).half()
    return pack(codes, scales, None, 1.0, bits=bits, group_size=group)


def attention_cases(kernels: Kernels, seconds: float) -> Iterator[Result]:
    """Paged attention, against torch's SDPA over keys and values that need no gathering."""
    for dtype, cache_dtype in (
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.int8),
        (torch.float32, torch.float32),
    ):
        for kind, shapes in (("decode", DECODE), ("prefill", PREFILL)):
            for count, length in shapes:
                yield attention_case(kernels, kind, count, length, dtype, cache_dtype, seconds)


def attention_case(
    kernels: Kernels,
    kind: str,
    count: int,
    length: int,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    seconds: float,
) -> Result:
    """`count` sequences with `length` keys each; one query token each (decode) or all of them (prefill)."""
    new = 1 if kind == "decode" else length
    blocks = -(-length // BLOCK_SIZE)
    pages = (1 + count * blocks, BLOCK_SIZE, NUM_KV_HEADS)
    keys, values = (torch.randn(count, NUM_KV_HEADS, length, HEAD_DIM).to(dtype) for _ in range(2))
    query = torch.randn(count * new, NUM_HEADS, HEAD_DIM).to(dtype)
    key, value = (torch.zeros((*pages, HEAD_DIM), dtype=cache_dtype) for _ in range(2))
    key_scale, value_scale = (torch.zeros(pages) if cache_dtype == torch.int8 else None for _ in range(2))
    tables = (torch.randperm(count * blocks) + 1).view(count, blocks).int()
    positions = torch.arange(length)
    slots = (tables.long()[:, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE).flatten()
    tokens = [dense.transpose(1, 2).reshape(-1, NUM_KV_HEADS, HEAD_DIM) for dense in (keys, values)]
    kernels.write_kv(tokens[0], tokens[1], key, value, key_scale, value_scale, slots)
    starts = torch.arange(0, count * new + 1, new, dtype=torch.int32)
    lengths = torch.full((count,), length, dtype=torch.int32)
    heads_first = query.view(count, new, NUM_HEADS, HEAD_DIM).transpose(1, 2)

    def native(_: int) -> torch.Tensor:
        return kernels.paged_attention(
            query, key, value, key_scale, value_scale, tables, starts, lengths, scale=HEAD_DIM**-0.5
        )

    def by_torch(_: int) -> torch.Tensor:
        return functional.scaled_dot_product_attention(
            heads_first, keys, values, is_causal=kind == "prefill", enable_gqa=True
        )

    native_us, torch_us, ratio = compare(native, by_torch, seconds)
    case = f"{kind} {short(dtype)}/{short(cache_dtype)} {count} x {length}"
    if kind == "decode":
        read = 2 * count * length * NUM_KV_HEADS * HEAD_DIM * cache_dtype.itemsize
        return Result("attention", case, native_us, torch_us, ratio, read / native_us / 1e3, "GB/s")
    operations = 2 * count * length * (length + 1) * NUM_HEADS * HEAD_DIM
    return Result("attention", case, native_us, torch_us, ratio, operations / native_us / 1e3, "GFLOP/s")


def row_cases(kernels: Kernels, seconds: float) -> Iterator[Result]:
    """Norms, gated activations, rotary positions: against the torch code of transformers models."""
    dtype = torch.bfloat16
    for rows in (1, 8, 128):
        x, weight = torch.randn(rows, 2048).to(dtype), torch.randn(2048).to(dtype)
        gate, up = torch.randn(2, rows, 5632).to(dtype)
        heads = torch.randn(rows, NUM_HEADS, HEAD_DIM).to(dtype)
        cos, sin = torch.randn(2, rows, HEAD_DIM).to(dtype)
        pairs: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
            "rms_norm 2048": (
                partial(kernels.rms_norm, x, weight, 1e-6),
                partial(torch_rms_norm, x, weight),
            ),
            "silu_mul 5632": (
                partial(kernels.gated, gate, up, "silu"),
                partial(torch_silu_mul, gate, up),
            ),
            "rope 32 x 64": (
                partial(kernels.apply_rope, heads, cos, sin),
                partial(torch_rope, heads, cos, sin),
            ),
        }
        for name, (native, by_torch) in pairs.items():
            native_us, torch_us, ratio = compare(every_turn(native), every_turn(by_torch), seconds)
            case = f"{name}, {rows} rows"
            yield Result("rows", case, native_us, torch_us, ratio, rows / native_us, "rows/us")


def every_turn(function: Callable[[], object]) -> Callable[[int], object]:
    """The function, whatever the turn."""
    return lambda _: function()


def torch_silu_mul(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As transformers' Llama does it."""
    return functional.silu(gate) * up


def torch_rms_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """As transformers' Llama does it."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    return weight * wide.to(x.dtype)


def torch_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """As transformers' Llama does it; x [T, H, D]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


def compare(
    native: Callable[[int], object], by_torch: Callable[[int], object], seconds: float
) -> tuple[float, float, float]:
    """Least time of each in microseconds, and the ratio of medians (torch / native)."""
    times: tuple[list[float], list[float]] = ([], [])
    turn = 0
    for function in (native, by_torch):
        function(0)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or turn < 5:
        turn += 1
        for function, taken in zip((native, by_torch), times, strict=True):
            started = time.perf_counter()
            function(turn)
            taken.append(time.perf_counter() - started)
    medians = [statistics.median(taken) for taken in times]
    return min(times[0]) * 1e6, min(times[1]) * 1e6, medians[1] / medians[0]


def short(dtype: torch.dtype) -> str:
    """One of bf16, fp32 and int8."""
    return {torch.bfloat16: "bf16", torch.float32: "fp32", torch.int8: "int8"}[dtype]


if __name__ == "__main__":
    with torch.inference_mode():
        main()

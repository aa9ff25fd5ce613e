"""Paged attention alone on a GPU: decoding against the memory, prompts against torch's flash attention.

Purpose: microseconds of one layer's attention, for rows that decode and for whole prompts.
Does not know: models, the engine.
Invariant: keys and values are random and lie in shuffled blocks; times are inside a CUDA graph.

    python -m benchmarks.attention_gpu --out attention.json        needs a CUDA device; about a minute
    python -m benchmarks.attention_gpu --out sweep.json --sweep    other sizes of launches, too
    python -m benchmarks.attention_gpu --out splits.json --splits  lengths of splits when decoding; a minute
    python -m benchmarks.attention_gpu --out fixed.json --deterministic    what fixed orders of sums cost
    python -m benchmarks.attention_gpu --out prompts.json --prompts    by every kernel that works here

8 KV heads of 4 query heads each, heads of 128, blocks of 64 tokens: a layer of an 8B Llama.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.gpu_timing import copy_bandwidth, graph_us, require_triton
from benchmarks.machine import accelerator_facts, versions
from memory_efficient_gpt.attention.context import AttentionOptions, LayerCache, StepContext
from memory_efficient_gpt.attention.flash_packages import TorchFlash, installed_packages
from memory_efficient_gpt.attention.prompt_choice import Trial, seconds_by_kernel, usable_package
from memory_efficient_gpt.attention.prompt_kernels import PromptKernel
from memory_efficient_gpt.attention.triton import TritonBackend
from memory_efficient_gpt.attention.whole_prompts import CudnnPrompts
from memory_efficient_gpt.kv_cache.geometry import LayerKV

if TYPE_CHECKING:
    from memory_efficient_gpt.triton_kernels.attention_launch import LaunchSizes

KV_HEADS, GROUP, DIM, BLOCK = 8, 4, 128, 64
DECODE: Final = [(b, c) for b in (1, 16, 128) for c in (1024, 8192, 65536) if b * c <= 16 * 65536]
SPLITS: Final = (128, 256, 512, 1024)
SPLIT_ROWS: Final = (1, 16, 32, 64, 128, 256)
SPLIT_CONTEXTS: Final = (512, 1024, 2048, 8192, 0)
"""0: lengths of 100 to 2,000, evenly spread."""
SPLIT_MOST_TOKENS: Final = 256 * 2048
Sizes = tuple[int, int, int, int]
"""Of a launch, as LaunchSizes has them."""
PROMPTS: Final = [(1, 512), (8, 512), (1, 2048), (1, 8192)]
DECODE_SIZES: Final[list[Sizes]] = [
    (16, tile, warps, stages) for tile in (32, 64, 128) for warps in (2, 4, 8) for stages in (2, 3, 4)
]
PROMPT_SIZES: Final[list[Sizes]] = [
    (rows, tile, warps, stages)
    for rows in (64, 128)
    for tile in (32, 64, 128)
    for warps in (4, 8)
    for stages in (2, 3, 4)
]


def make_cache(tokens: int, dtype: torch.dtype, group: int = GROUP) -> LayerCache:
    """Random keys and values of so many tokens, with scales where the dtype has them."""
    shape = (tokens // BLOCK + 1, BLOCK, KV_HEADS, DIM)
    spec = LayerKV("layer", KV_HEADS, DIM, DIM, KV_HEADS * group)
    if dtype is torch.bfloat16:
        key, value = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(2))
        return LayerCache(spec, key, value)
    key, value = (torch.randint(-100, 100, shape, device="cuda").to(dtype) for _ in range(2))
    scales = torch.full(shape[:3], 0.01, device="cuda")
    return LayerCache(spec, key, value, scales, scales.clone())


def make_step(query_lens: list[int], context_lens: list[int], blocks: int) -> StepContext:
    """Rows over shuffled blocks; rows share blocks where there are not enough."""
    width = -(-max(context_lens) // BLOCK)
    order = torch.randperm(max(blocks, 1), device="cuda").int() + 1
    places = torch.arange(len(query_lens) * width, device="cuda") % blocks
    starts = torch.tensor([0, *query_lens]).cumsum(0).int().cuda()
    tokens = sum(query_lens)
    return StepContext(
        TritonBackend(), torch.arange(tokens, device="cuda"), order[places].view(-1, width).contiguous(),
        starts,
        torch.tensor(context_lens, dtype=torch.int32, device="cuda"), max(query_lens), max(context_lens),
        query_lens, context_lens,
    )  # fmt: skip


def decode_us(
    batch: int, context: int, dtype: torch.dtype, sizes: LaunchSizes | None = None, *, fixed: bool = False
) -> float:
    """One layer's decoding attention; several caches in turn, so that none stays in the L2 cache."""
    from memory_efficient_gpt.triton_kernels import attention_launch

    tokens = batch * context
    copies = max(1, min(8, (1 << 28) // (tokens * 2 * KV_HEADS * DIM)))
    caches = [make_cache(tokens, dtype) for _ in range(copies)]
    step = make_step([1] * batch, [context] * batch, tokens // BLOCK)
    query = torch.randn((batch, KV_HEADS * GROUP, DIM), dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(query)
    options = AttentionOptions(DIM**-0.5)

    def call(cache: LayerCache) -> Callable[[], None]:
        return lambda: attention_launch.decode_rows(
            query, cache, step, options, out, batch, context, "ieee", sizes, fixed=fixed
        )

    return graph_us([call(cache) for cache in caches])


def split_times(rows: int, context: int, dtype: torch.dtype, group: int) -> dict[int, float]:
    """Microseconds of one layer's decoding attention by the least length of splits."""
    from memory_efficient_gpt.triton_kernels import attention_launch

    lens = [context] * rows if context else [100 + 1900 * n // max(1, rows - 1) for n in range(rows)]
    tokens = -(-max(lens) // BLOCK) * BLOCK * rows
    copies = max(1, min(4, (1 << 28) // (tokens * 2 * KV_HEADS * DIM)))
    caches = [make_cache(tokens, dtype, group) for _ in range(copies)]
    step = make_step([1] * rows, lens, tokens // BLOCK)
    query = torch.randn((rows, KV_HEADS * group, DIM), dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(query)
    options = AttentionOptions(DIM**-0.5)

    def call(cache: LayerCache, least: int) -> Callable[[], None]:
        return lambda: attention_launch.decode_rows(
            query, cache, step, options, out, rows, max(lens), "ieee", least=least
        )

    return {least: graph_us([call(cache, least) for cache in caches], replays=5) for least in SPLITS}


def sweep_splits(save: Callable[[dict[str, Any]], None]) -> None:
    """Which least length of splits suits a step: for `attention_launch.least_split`."""
    results: dict[str, Any] = {}
    for dtype in (torch.bfloat16, torch.int8):
        for group in (2, 4):
            for rows in SPLIT_ROWS:
                for context in SPLIT_CONTEXTS:
                    if rows * context > SPLIT_MOST_TOKENS:
                        continue
                    times = split_times(rows, context, dtype, group)
                    best = min(times, key=lambda least: times[least])
                    name = f"{dtype} group {group}, {rows} x {context or '100..2000'}"
                    results[name] = {"us": times, "best": best}
                    line = " ".join(f"{least}: {time_us:.1f}" for least, time_us in times.items())
                    Console().print(f"{name:44} {line} us; best {best}")
            save(results)


def compare_deterministic(save: Callable[[dict[str, Any]], None]) -> None:
    """Attention and one product of an 8B Llama, as they are and with sums in one order."""
    from memory_efficient_gpt.triton_kernels.layers import TritonKernels

    results: dict[str, Any] = {}

    def note(name: str, usual: float, fixed: float) -> None:
        results[name] = {"us": usual, "deterministic_us": fixed}
        Console().print(f"{name:28} {usual:9.1f} us, deterministic {fixed:9.1f} ({fixed / usual:.2f} times)")
        save(results)

    for batch, length in PROMPTS:
        usual = prompt_us(batch, length, torch.bfloat16)
        note(f"prompt {batch} x {length}", usual, prompt_us(batch, length, torch.bfloat16, fixed=True))
    for rows, context in ((1, 1024), (16, 1024), (128, 1024), (16, 8192)):
        usual = decode_us(rows, context, torch.bfloat16)
        note(f"decode {rows} x {context}", usual, decode_us(rows, context, torch.bfloat16, fixed=True))
    for outputs, inputs in ((6144, 4096), (4096, 14336)):
        weights = [torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda") for _ in range(4)]
        for rows in (1, 2, 8, 16, 32, 64, 128, 512, 2048, 8192):
            x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
            times = [
                graph_us([partial(kernels.linear, x, weight) for weight in weights], replays=5)
                for kernels in (TritonKernels(), TritonKernels(deterministic=True))
            ]
            note(f"{outputs} x {inputs}, {rows} rows", *times)


def compare_prompts(save: Callable[[dict[str, Any]], None]) -> None:
    """One prompt, whole or behind twice as many tokens, by own kernels and by all others that work here."""
    layer = LayerKV("", KV_HEADS, DIM, DIM, KV_HEADS * GROUP)
    trial = Trial(TritonBackend(), [layer], BLOCK, torch.bfloat16, torch.device("cuda"))
    packages, obstacles = installed_packages()
    kernels: list[PromptKernel] = [CudnnPrompts(DIM, least=1)]
    for package in (*packages, TorchFlash()):
        found = usable_package(package, trial)
        if isinstance(found, str):
            obstacles.append(f"{package.name}: {found}")
        else:
            kernels.append(found)
    for obstacle in obstacles:
        Console().print(obstacle)
    results: dict[str, Any] = {"obstacles": obstacles}
    for later in (False, True):
        for tokens in (256, 512, 1024, 2048, 4096, 8192):
            times = seconds_by_kernel(trial, kernels, tokens, later=later)
            pairs = tokens * (4 * tokens if later else 0) / 2 + tokens * tokens / 2
            flops = 4 * DIM * KV_HEADS * GROUP * pairs
            name = f"{'later' if later else 'whole'} {tokens}"
            results[name] = {kind: {"us": s * 1e6, "tflops": flops / s / 1e12} for kind, s in times.items()}
            words = [f"{kind} {s * 1e6:.0f} us {flops / s / 1e12:.0f} TFLOP/s" for kind, s in times.items()]
            Console().print(f"{name:12} {', '.join(words)}")
            save(results)


def prompt_us(
    batch: int, length: int, dtype: torch.dtype, sizes: LaunchSizes | None = None, *, fixed: bool = False
) -> float:
    """One layer's attention of whole prompts."""
    from memory_efficient_gpt.triton_kernels import attention_launch

    cache = make_cache(batch * length, dtype)
    step = make_step([length] * batch, [length] * batch, batch * length // BLOCK)
    query = torch.randn((batch * length, KV_HEADS * GROUP, DIM), dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(query)
    options = AttentionOptions(DIM**-0.5)
    if fixed:
        launch = attention_launch.fixed_prompt_chunks
        return graph_us([lambda: launch(query, cache, step, options, out, batch, "ieee")])
    return graph_us(
        [lambda: attention_launch.prompt_chunks(query, cache, step, options, out, batch, "ieee", sizes)]
    )


def flash_us(batch: int, length: int) -> float:
    """torch's flash attention over contiguous keys and values."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    query = torch.randn((batch, KV_HEADS * GROUP, length, DIM), dtype=torch.bfloat16, device="cuda")
    key, value = (
        torch.randn((batch, KV_HEADS, length, DIM), dtype=torch.bfloat16, device="cuda") for _ in range(2)
    )
    attend = torch.nn.functional.scaled_dot_product_attention
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return graph_us([lambda: attend(query, key, value, is_causal=True, enable_gqa=True)])


def measure(save: Callable[[dict[str, Any]], None]) -> None:
    """The table."""
    bandwidth = copy_bandwidth()
    results: dict[str, Any] = {"bandwidth_bytes_per_s": bandwidth, "decode": [], "prompts": []}
    for dtype in (torch.bfloat16, torch.int8):
        for batch, context in DECODE:
            time_us = decode_us(batch, context, dtype)
            read = (
                batch
                * context
                * KV_HEADS
                * 2
                * (DIM * dtype.itemsize + (0 if dtype is torch.bfloat16 else 4))
            )
            share = read / bandwidth / (time_us * 1e-6)
            results["decode"].append(
                {"dtype": str(dtype), "batch": batch, "context": context, "us": time_us, "share": share}
            )
            Console().print(
                f"decode {dtype} {batch:4} x {context:6}: {time_us:8.1f} us, {share:.0%} of bandwidth"
            )
            save(results)
    for batch, length in PROMPTS:
        own, flash = prompt_us(batch, length, torch.bfloat16), flash_us(batch, length)
        operations = 2 * batch * length * length * KV_HEADS * GROUP * DIM
        results["prompts"].append({"batch": batch, "length": length, "us": own, "flash_us": flash})
        tera = operations / own / 1e6
        Console().print(
            f"prompt {batch} x {length}: {own:.1f} us ({tera:.0f} TFLOP/s), torch's flash {flash:.1f}"
        )
        save(results)


def sweep(save: Callable[[dict[str, Any]], None]) -> None:
    """Sizes of launches, best first."""
    cases: list[tuple[str, Callable[..., float], tuple[Any, ...], list[Sizes]]] = [
        *[(f"decode {b}x{c}", decode_us, (b, c, torch.bfloat16), DECODE_SIZES)
          for b, c in ((1, 1024), (32, 1024), (128, 1024), (16, 8192))],
        ("decode int8 16x8192", decode_us, (16, 8192, torch.int8), DECODE_SIZES),
        *[(f"prompt {b}x{n}", prompt_us, (b, n, torch.bfloat16), PROMPT_SIZES)
          for b, n in ((1, 512), (1, 8192))],
    ]  # fmt: skip
    results: dict[str, Any] = {}
    for name, function, arguments, all_sizes in cases:
        times = sorted(_tried(function, arguments, all_sizes), key=lambda pair: pair[0])
        results[name] = [(time_us, str(sizes)) for time_us, sizes in times[:8]]
        Console().print(name, *[f"{t:.1f} {s.rows}/{s.tile}/{s.warps}/{s.stages}" for t, s in times[:5]])
        save(results)


def _tried(
    function: Callable[..., float], arguments: tuple[Any, ...], all_sizes: Iterable[Sizes]
) -> list[tuple[float, LaunchSizes]]:
    from memory_efficient_gpt.triton_kernels.attention_launch import LaunchSizes

    times = []
    for sizes in track([LaunchSizes(*sizes) for sizes in all_sizes], "sizes"):
        try:
            times.append((function(*arguments, sizes), sizes))
        except Exception as error:  # noqa: BLE001  # sizes that do not fit
            Console().print(f"{sizes}: {type(error).__name__}")
    return times


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the record to write")
    parser.add_argument("--sweep", action="store_true", help="try other sizes of launches")
    parser.add_argument("--splits", action="store_true", help="try other lengths of splits")
    parser.add_argument("--deterministic", action="store_true", help="compare with sums in one order")
    parser.add_argument("--prompts", action="store_true", help="prompts by every kernel that is installed")
    parser.add_argument("--commit", default="unknown", help="what is measured, where git can't say")
    arguments = parser.parse_args()
    require_triton()

    def save(results: dict[str, Any]) -> None:
        record = {"machine": accelerator_facts("cuda"), "versions": versions(), "commit": arguments.commit,
                  "results": results}  # fmt: skip
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    what = measure
    for wanted, other in (
        (arguments.sweep, sweep),
        (arguments.splits, sweep_splits),
        (arguments.deterministic, compare_deterministic),
        (arguments.prompts, compare_prompts),
    ):
        what = other if wanted else what
    what(save)


if __name__ == "__main__":
    main()

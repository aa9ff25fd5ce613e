"""Linear layers on a GPU: our kernels beside bfloat16, bitsandbytes' 4-bit product and torch's own int4 one.

Purpose: microseconds of each arm for the shapes of an 8B model, and their share of the memory's speed.
Does not know: the engine.
Invariant: every arm reads weights that no cache holds, inside one CUDA graph; results were compared with a
dense product first.

    python -m benchmarks.linears_gpu --out linears.json          needs a CUDA device; about a minute
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch.nn import functional

from benchmarks.gpu_timing import copies_needed, copy_bandwidth, graph_us, require_triton
from benchmarks.machine import accelerator_facts, versions
from memory_efficient_gpt.quantization.fp8 import fp8_linear
from memory_efficient_gpt.quantization.rounding import quantize_weight
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.quantization.triton_weights import pack_for_triton

SHAPES = ((4096, 14336), (14336, 4096), (4096, 4096), (6144, 4096))
"""Outputs and inputs."""
ROWS = (1, 8, 32, 128, 512, 2048, 4096)
OURS = ("int4-g128", "int4", "int8", "fp8")
Product = Callable[[torch.Tensor], torch.Tensor]


def arms_of(weight: torch.Tensor) -> dict[str, tuple[int, Product]]:
    """Bytes and product of every arm for one bfloat16 weight `[N, K]`; an arm that can't run is left out."""
    from memory_efficient_gpt.triton_kernels.linear import quantized_linear

    arms: dict[str, tuple[int, Product]] = {"bf16": (weight.nbytes, lambda x: functional.linear(x, weight))}
    for name in OURS:
        packed = pack_for_triton(quantize_weight(weight, parse_scheme(name), rounding="nearest"))
        arms[name] = packed.num_bytes, partial(quantized_linear, weight=packed)
    dynamic = quantize_weight(weight, parse_scheme("fp8-dynamic"), rounding="nearest")
    arms["fp8-dynamic"] = dynamic.num_bytes, lambda x: fp8_linear(x, dynamic, None)
    for name, make in (("bitsandbytes nf4", bitsandbytes_arm), ("torch tinygemm g128", tinygemm_arm)):
        try:
            arms[name] = make(weight)
        except Exception as error:  # noqa: BLE001  # a peer that can't run here is reported, not fatal
            Console().print(f"left out: {name}: {type(error).__name__}: {str(error)[:160]}")
    return arms


def bitsandbytes_arm(weight: torch.Tensor) -> tuple[int, Product]:
    """What users of Linear4bit get: its fused product where it has one for the shape."""
    from bitsandbytes.autograd._functions import matmul_4bit
    from bitsandbytes.functional import quantize_4bit

    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    size = codes.nbytes + state.absmax.nbytes
    return size, lambda x: matmul_4bit(x, codes.t(), quant_state=state)


def tinygemm_arm(weight: torch.Tensor) -> tuple[int, Product]:
    """torch's own int4 product, groups of 128."""
    n, k = weight.shape
    codes = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8, device=weight.device)
    packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
    scales = torch.rand(k // 128, n, 2, dtype=torch.bfloat16, device=weight.device)
    product = torch.ops.aten._weight_int4pack_mm
    return packed.nbytes + scales.nbytes, lambda x: product(x, packed, 128, scales)


def measure(outputs: int, inputs: int) -> dict[str, Any]:
    """Microseconds by arm and rows."""
    arms: dict[str, list[tuple[int, Product]]] = {}
    for _ in range(copies_needed(outputs * inputs // 2)):
        weight = torch.randn(outputs, inputs, dtype=torch.bfloat16, device="cuda")
        for name, arm in arms_of(weight).items():
            arms.setdefault(name, []).append(arm)
    found: dict[str, Any] = {}
    for name, copies in arms.items():
        needed = copies[: copies_needed(copies[0][0])]
        found[name] = {"bytes": copies[0][0], "us": {}}
        for rows in ROWS:
            x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
            calls = [partial(product, x) for _, product in needed]
            try:
                found[name]["us"][str(rows)] = round(graph_us(calls), 2)
            except Exception as error:  # noqa: BLE001  # as above
                found[name]["us"][str(rows)] = None
                found[name]["error"] = f"{rows} rows: {type(error).__name__}: {str(error)[:160]}"
                torch.cuda.synchronize()
    return found


def table(results: dict[str, Any], bandwidth: float) -> str:
    """Markdown: bfloat16's time, and how many times as fast each arm is."""
    lines = [
        "| N x K | rows | bf16 us | "
        + " | ".join(name for name in next(iter(results.values())) if name != "bf16")
        + " |"
    ]
    lines.append("|" + "---|" * (lines[0].count("|") - 1))
    for shape, arms in results.items():
        for rows in map(str, ROWS):
            base = arms["bf16"]["us"][rows]
            cells = []
            for name, arm in arms.items():
                if name == "bf16":
                    continue
                us = arm["us"][rows]
                share = f" ({arm['bytes'] / us * 1e6 / bandwidth:.0%})" if us and rows == "1" else ""
                cells.append(f"{base / us:.2f}x{share}" if us else "-")
            lines.append(f"| {shape} | {rows} | {base:.1f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@torch.inference_mode()
def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the record to write")
    parser.add_argument("--commit", default="unknown", help="what is measured, where git can't say")
    arguments = parser.parse_args()
    require_triton()
    bandwidth = copy_bandwidth()
    results: dict[str, Any] = {}
    for outputs, inputs in track(SHAPES, "measuring"):
        results[f"{outputs}x{inputs}"] = measure(outputs, inputs)
        record = {"bandwidth_bytes_per_s": bandwidth, "versions": versions(), "commit": arguments.commit,
                  **accelerator_facts("cuda"), "results": results}  # fmt: skip
        arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"share in brackets: of {bandwidth / 1e12:.2f} TB/s, weights' bytes only")
    print(table(results, bandwidth))


if __name__ == "__main__":
    main()

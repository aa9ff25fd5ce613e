"""Measure which tile is fastest for each shape, kind of code and number of rows: the tables of tiles.py.

Purpose: check every tile against a dense product, time it in a graph, write the winners.
Does not know: the engine.
Invariant: a tile enters a table only if its results were right, and twice the same bits.

    python -m benchmarks.triton_tiles --out hopper.json      needs a CUDA device; about three minutes
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch.nn import functional

from benchmarks.gpu_timing import copies_needed, graph_us, require_triton
from memory_efficient_gpt.triton_kernels.packing import Code, TritonWeight, pack
from memory_efficient_gpt.triton_kernels.tiles import ROW_LIMITS, Tile, group_class

SHAPES = (
    (4096, 4096), (4096, 14336), (28672, 4096), (6144, 4096), (14336, 4096), (1024, 2048), (128256, 4096)
)  # fmt: skip
"""Outputs and inputs: the linears of an 8B model, its head, and a small one of a 0.6B model."""
WEIGHTS: tuple[tuple[Code, int | None], ...] = (("int4", 128), ("int4", 32), ("int8", None))
FewRows = tuple[int, int, int, tuple[int, ...]]
Wide = tuple[int, int, int, int, tuple[int, ...]]
_CANDIDATES: dict[int, tuple[tuple[FewRows, ...], tuple[Wide, ...]]] = {
    8: (
        ((16, 8, 4, (1, 2)), (16, 8, 3, (1,)), (32, 8, 3, (1, 2)), (32, 8, 4, (1, 2)), (32, 8, 6, (1,)),
         (32, 4, 3, (1,)), (32, 4, 4, (1, 2, 4)), (32, 4, 6, (1,)), (32, 2, 3, (2,)), (64, 4, 2, (1,)),
         (64, 4, 3, (1, 2, 4)), (64, 4, 6, (1,))),
        ((64, 16, 4, 4, (8, 16)),),
    ),
    16: (
        ((16, 8, 3, (1,)), (32, 8, 3, (1, 2)), (32, 4, 3, (1, 2, 4)), (64, 4, 3, (1, 2, 4)),
         (64, 8, 2, (1, 2))),
        ((64, 16, 4, 4, (4, 8, 16)), (128, 16, 8, 4, (4, 8))),
    ),
    32: (
        ((64, 4, 2, (1, 2, 4)), (64, 4, 3, (1, 2))),
        ((64, 32, 4, 3, (4, 8)), (64, 32, 4, 4, (4, 8, 16)), (128, 32, 8, 3, (1, 2, 4, 8)),
         (128, 32, 8, 4, (1, 2, 4, 8)), (128, 32, 4, 4, (4, 8))),
    ),
    64: ((), ((64, 64, 4, 4, (2, 4, 8)), (128, 64, 8, 3, (1, 2, 4, 8)), (128, 64, 8, 4, (1, 2, 4, 8)),
              (128, 64, 4, 4, (2, 4)))),
    128: ((), ((128, 128, 8, 2, (1, 2, 4)), (128, 128, 8, 3, (1, 2, 4)), (128, 64, 8, 4, (1, 2)),
               (64, 128, 4, 3, (2, 4)))),
    256: ((), ((128, 128, 8, 2, (1, 2)), (128, 128, 8, 3, (1, 2)), (128, 256, 8, 2, (1,)))),
    512: ((), ((128, 128, 8, 3, (1,)), (128, 256, 8, 2, (1,)))),
}  # fmt: skip
"""By rows: (outputs, warps, stages, splits) of few_rows.py, (outputs, rows, warps, ...) of matmul.py."""
TOLERANCE = 6e-3
"""Of the norm: one rounding of the result to bfloat16 is 2e-3."""


def random_weight(code: Code, group: int | None, outputs: int, inputs: int) -> TritonWeight:
    """Random codes, scales such that results are of size 1, no offsets."""
    device = torch.device("cuda")
    if code == "fp8":
        numbers = torch.randn(outputs, inputs, device=device) * 100
        codes = numbers.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    else:
        codes = torch.randint(
            0, 16 if code == "int4" else 256, (outputs, inputs), dtype=torch.uint8, device=device
        )
    groups = 1 if group is None else -(-inputs // group)
    scales = (torch.rand(outputs, groups, device=device) + 0.5).half()
    unit = 2.0 ** -(6 if code == "int4" else 10)
    return pack(code, codes, scales, None, unit, group_size=group)


def tiles_for(rows: int) -> Iterator[Tile]:
    """What may be worth a try for that many rows (see docs/decisions.md for what was not)."""
    few, wide = _CANDIDATES[rows]
    for outputs, warps, stages, splits in few:
        for split in splits:
            yield Tile(outputs, max(8, rows), split, warps, stages, few_rows=True)
    for outputs, height, warps, stages, splits in wide:
        for split in splits:
            yield Tile(outputs, height, split, warps, stages)


def compile_part(part: int, parts: int) -> None:
    """Compile (into Triton's disk cache) and check a share of all tiles."""
    seen: set[tuple[Any, ...]] = set()
    cases = []
    for code, group in WEIGHTS:
        for rows in ROW_LIMITS:
            for tile in tiles_for(rows):
                key = (code, group, tile)
                if key not in seen:
                    seen.add(key)
                    cases.append((code, group, tile))
    weights: dict[Any, TritonWeight] = {}
    for code, group, tile in cases[part::parts]:
        if (code, group) not in weights:
            weights[code, group] = random_weight(code, group, 208, 1024)
        problem = check(weights[code, group], tile)
        if problem is not None:
            print(
                json.dumps({"code": code, "group": group, "tile": asdict(tile), "problem": problem}),
                flush=True,
            )


def check(weight: TritonWeight, tile: Tile) -> str | None:
    """What is wrong with a tile's results, or None."""
    from memory_efficient_gpt.triton_kernels.linear import dequantize, quantized_linear

    x = torch.randn(tile.rows + 5, weight.num_inputs, dtype=torch.bfloat16, device="cuda")
    want = x.double() @ dequantize(weight, torch.float32).double().t()
    try:
        got, again = (quantized_linear(x, weight, tile=tile) for _ in range(2))
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001  # whatever a compiler may say
        return f"{type(error).__name__}: {str(error)[:200]}"
    difference = float((got.double() - want).norm() / want.norm())
    if not difference < TOLERANCE:
        return f"differs by {difference:.2g}"
    return None if torch.equal(got, again) else "differs from run to run"


def measure(
    code: Code, group: int | None, outputs: int, inputs: int, bad: set[Any], advance: Callable[[], object]
) -> list[Any]:
    """Entries of one shape: for each number of rows, every tile's time, and the dense product's."""
    from memory_efficient_gpt.triton_kernels.linear import quantized_linear

    one = random_weight(code, group, outputs, inputs)
    copies = [
        one,
        *(random_weight(code, group, outputs, inputs) for _ in range(copies_needed(one.num_bytes) - 1)),
    ]
    entries = []
    for rows in ROW_LIMITS:
        x = torch.randn(rows, inputs, dtype=torch.bfloat16, device="cuda")
        dense = step_us([partial(dense_product, x, weight) for weight in copies[:4]], x)
        timed: list[tuple[float, Tile]] = []
        for tile in tiles_for(rows):
            if tile.splits > inputs // 256 or (code, group, replace(tile, splits=1)) in bad:
                continue
            if rows >= 256 and outputs * inputs > 2e8:
                continue
            calls = [partial(quantized_linear, x, weight, tile=tile) for weight in copies]
            timed.append((step_us(calls, x, replays=4), tile))
        timed.sort(key=lambda pair: pair[0])
        best = timed[0] if timed else (float("inf"), None)
        entries.append({
            "weights": group_class(code, group), "outputs": outputs, "inputs": inputs, "rows": rows,
            "tile": asdict(best[1]) if best[1] is not None and best[0] < dense else None,
            "in_step": True, "us": round(min(best[0], dense), 2), "dense_us": round(dense, 2),
            "others": [[round(us, 2), *asdict(tile).values()] for us, tile in timed[:6]],
        })  # fmt: skip
        advance()
    return entries


def step_us(calls: Sequence[Callable[[], object]], x: torch.Tensor, replays: int = 10) -> float:
    """Microseconds of a call among small kernels that begin early, as a step has them, less theirs.

    Products in a row would each begin while the memory is still busy with the one before.
    """
    from memory_efficient_gpt.triton_kernels.layers import TritonKernels

    kernels, weight = TritonKernels(), torch.ones(x.shape[1], dtype=x.dtype, device=x.device)

    def small() -> None:
        for _ in range(4):
            kernels.rms_norm(x, weight, 1e-6)

    def both(call: Callable[[], object]) -> None:
        small()
        call()

    alone = graph_us([small] * len(calls), replays=replays)
    return graph_us([partial(both, call) for call in calls], replays=replays) - alone


def dense_product(x: torch.Tensor, weight: TritonWeight) -> torch.Tensor:
    """The other way: a dense weight for this product only."""
    from memory_efficient_gpt.triton_kernels.linear import dequantize

    return functional.linear(x, dequantize(weight, x.dtype))


def write(path: Path, entries: list[Any], problems: list[Any], began: float) -> None:
    """The table as far as it is."""
    table = {
        "device": torch.cuda.get_device_name(), "seconds": round(time.monotonic() - began),
        "entries": entries, "problems": problems,
    }  # fmt: skip
    path.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the table to write")
    parser.add_argument("--jobs", type=int, default=8, help="processes that compile")
    parser.add_argument("--seconds", type=float, default=240.0, help="stop measuring after so long")
    parser.add_argument(
        "--shapes", type=int, default=len(SHAPES), help="only the first so many weight shapes"
    )
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    require_triton()
    if arguments.part is not None:
        compile_part(arguments.part, arguments.jobs)
        return
    began = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "benchmarks.triton_tiles",
        "--out",
        str(arguments.out),
        "--jobs",
        str(arguments.jobs),
    ]
    workers = [
        subprocess.Popen([*command, "--part", str(part)], stdout=subprocess.PIPE, text=True)
        for part in range(arguments.jobs)
    ]
    problems = [json.loads(line) for worker in workers for line in worker.communicate()[0].splitlines()]
    console = Console()
    console.print(f"compiled and checked in {time.monotonic() - began:.0f} s; {len(problems)} tiles fail")
    for problem in problems[:12]:
        console.print(problem)
    bad = {(p["code"], p["group"], replace(Tile(**p["tile"]), splits=1)) for p in problems}
    entries: list[Any] = []
    with Progress(console=console) as bar:
        task = bar.add_task("measuring", total=len(WEIGHTS) * arguments.shapes * len(ROW_LIMITS))
        for outputs, inputs in SHAPES[: arguments.shapes]:
            for code, group in WEIGHTS:
                if time.monotonic() - began < arguments.seconds and (code == "int8" or outputs < 1 << 16):
                    entries += measure(code, group, outputs, inputs, bad, lambda: bar.advance(task))
                    write(arguments.out, entries, problems, began)
    console.print(f"{len(entries)} entries in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

"""Choosing tokens on a GPU: the kernel beside torch's sorts and scans.

Purpose: microseconds of each way to choose tokens, by rows and filters.
Does not know: models, engines.
Invariant: both arms get the same logits, are captured in a graph, and their tokens were compared first.

    python -m benchmarks.sampling_gpu --out sampling.json          needs a CUDA device; about a minute
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console

from benchmarks.gpu_timing import graph_us, require_triton
from benchmarks.machine import accelerator_facts, versions
from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt.sampling import SampleRow, SamplingBatch, sample

VOCABULARY: Final = 151936
ROWS: Final = (1, 8, 64, 160, 256)
FILTERS: Final[dict[str, dict[str, Any]]] = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.6},
    "top_p": {"top_p": 0.95},
    "top_k": {"top_k": 50},
    "top_k, top_p, min_p": {"top_k": 50, "top_p": 0.9, "min_p": 0.01},
}
TILES: Final = ((8192, 2048, 16), (4096, 2048, 16), (4096, 1024, 16), (4096, 1024, 8))
"""Tokens of a tile, of one with seven sums, warps."""


def call(logits: torch.Tensor, options: dict[str, Any], *, kernel: bool) -> Callable[[], torch.Tensor]:
    """One choice of a token for every row, its parameters uploaded before."""
    rows = [SampleRow(SamplingParams(**options), 1, number) for number in range(len(logits))]
    batch = SamplingBatch(rows, logits.device, kernel=kernel)
    return lambda: sample(logits, batch).token_ids


def measure(rows: int, options: dict[str, Any]) -> dict[str, float | str]:
    """Microseconds of torch's arm and of the kernel's with each size of tiles."""
    from memory_efficient_gpt.triton_kernels import token_choice

    logits = (torch.randn(rows, VOCABULARY, device="cuda") * 3).bfloat16()
    result: dict[str, float | str] = {}
    reference = call(logits, options, kernel=False)
    expected = reference()
    try:
        result["torch"] = graph_us([reference] * 3)
    except RuntimeError as error:  # a sort may not be capturable or have no room
        result["torch"] = str(error).splitlines()[0][:80]
    usual = token_choice._BLOCK, token_choice._CUT_BLOCK, token_choice._WARPS
    for tile in TILES:
        token_choice._BLOCK, token_choice._CUT_BLOCK, token_choice._WARPS = tile  # type: ignore[misc]
        ours = call(logits, options, kernel=True)
        assert int((ours() != expected).sum()) <= 1 + rows // 100, "other tokens"
        result["x".join(map(str, tile))] = graph_us([ours] * 10)
    token_choice._BLOCK, token_choice._CUT_BLOCK, token_choice._WARPS = usual  # type: ignore[misc]
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="the record to write")
    arguments = parser.parse_args()
    require_triton()
    console, results = Console(), {}
    for name, options in FILTERS.items():
        for rows in ROWS:
            results[f"{name}, {rows} rows"] = figures = measure(rows, options)
            shown = {arm: round(us, 1) if isinstance(us, float) else us for arm, us in figures.items()}
            console.print(name, rows, shown)
    record = {"machine": accelerator_facts("cuda"), "versions": versions(), "vocabulary": VOCABULARY,
              "unit": "microseconds", "results": results}  # fmt: skip
    arguments.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""Which tile a product uses: from a table measured ahead, never by trying on a user's request.

Purpose: look up (or, for GPUs without a table, compute) how a product of given sizes is cut into programs.
Does not know: Triton, tensors.
Invariant: the same sizes on the same kind of GPU always get the same tile.

A table's entry says what was fastest for one weight shape, kind of code and number of rows; `tile: null`
means that dequantizing the weight and multiplying densely was. Other shapes take the entry of the shape
nearest to theirs, by ratio. `python -m benchmarks.triton_tiles` measures a table.

Letters: M rows, N outputs, K inputs.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from memory_efficient_gpt.triton_kernels.packing import SPAN, Code

ROW_LIMITS: Final = (8, 16, 32, 64, 128, 256, 512)
"""A table has entries for up to so many rows; beyond the last, products are dense."""
_TABLES: Final = {9: "hopper.json"}  # by compute capability's major number
_DENSE_FROM: Final = 129  # without a table
_PROGRAMS_WANTED: Final = 3  # a multiprocessor, without a table
_FIXED_ROWS: Final = (8, 16, 32)
_FEW_OUTPUTS: Final = 4096
_LARGE_MEMORY: Final = 9
"""Since Hopper a program's shared memory has room for eight warps' spans."""


@dataclass(frozen=True, slots=True)
class Tile:
    """How a product is cut: outputs and rows of a program's tile, parts of the inputs, warps, stages.

    few_rows: by few_rows.py, whose warps have inputs of their own, not by matmul.py.
    """

    outputs: int
    rows: int
    splits: int
    warps: int
    stages: int
    few_rows: bool = False


@dataclass(frozen=True, slots=True)
class _Entry:
    outputs: int
    inputs: int
    rows: int
    tile: Tile | None

    def distance(self, outputs: int, inputs: int) -> float:
        return abs(math.log(self.outputs / outputs)) + abs(math.log(self.inputs / inputs))


def group_class(code: Code, group_size: int | None) -> str:
    """What entries are filed under: int4-g32 (64, too), int4-g128 (and more), int8 (fp8, too)."""
    if code != "int4":
        return "int8"
    return "int4-g32" if group_size is not None and group_size < SPAN else "int4-g128"


@functools.lru_cache(maxsize=4096)
def choose_tile(
    code: Code, group_size: int | None, outputs: int, inputs: int, rows: int, *, major: int, processors: int
) -> Tile | None:
    """The tile for `rows` rows, or None: dequantize the weight and multiply densely.

    major: of the GPU's compute capability; processors: its multiprocessors.
    """
    limit = next((limit for limit in ROW_LIMITS if rows <= limit), None)
    if limit is None:
        return None
    entries = _table(major).get((group_class(code, group_size), limit), ())
    if entries:
        return min(entries, key=lambda entry: entry.distance(outputs, inputs)).tile
    return _computed(outputs, inputs, rows, processors) if rows < _DENSE_FROM else None


def fixed_tile(outputs: int, rows: int, *, major: int) -> Tile:
    """The tile for `rows` rows where a row's sums must not depend on how many there are.

    Their order follows from the warps, each with spans of its own, and these from the weight and the GPU.
    """
    wide = outputs <= _FEW_OUTPUTS and major >= _LARGE_MEMORY
    tile_rows = next((limit for limit in _FIXED_ROWS if rows <= limit), _FIXED_ROWS[-1])
    stages = 4 if tile_rows == _FIXED_ROWS[0] else 3
    if major < _LARGE_MEMORY or (wide and tile_rows == _FIXED_ROWS[-1]):
        stages = 2
    return Tile(32, tile_rows, 1, warps=8 if wide else 4, stages=stages, few_rows=True)


def _computed(outputs: int, inputs: int, rows: int, processors: int) -> Tile:
    """Enough programs to fill the GPU, in tiles that fit the shared memory of every one since Ampere."""
    if rows <= 16:
        return Tile(16, 8 if rows <= 8 else 16, 1, warps=8, stages=2 if rows > 8 else 3, few_rows=True)
    tile_rows = max(16, min(64, 1 << (rows - 1).bit_length()))
    tiles = math.ceil(outputs / 64) * math.ceil(rows / tile_rows)
    wanted = _PROGRAMS_WANTED * processors / tiles
    spans = math.ceil(inputs / SPAN)
    splits = max(1, min(16, spans // 2, 1 << round(math.log2(max(1.0, wanted)))))
    return Tile(64, tile_rows, splits, warps=4, stages=3)


@functools.cache
def _table(major: int) -> dict[tuple[str, int], tuple[_Entry, ...]]:
    name = _TABLES.get(major)
    path = Path(__file__).with_name(name) if name is not None else None
    if path is None or not path.is_file():
        return {}
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    found: dict[tuple[str, int], list[_Entry]] = {}
    for item in data["entries"]:
        tile = Tile(**item["tile"]) if item["tile"] is not None else None
        entry = _Entry(item["outputs"], item["inputs"], item["rows"], tile)
        found.setdefault((item["weights"], entry.rows), []).append(entry)
    return {key: tuple(entries) for key, entries in found.items()}

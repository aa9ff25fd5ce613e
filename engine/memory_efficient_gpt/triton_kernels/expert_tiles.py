"""How the products of routed experts are cut into programs.

Purpose: sizes of tiles from the sizes of a layer and the number of tokens.
Does not know: Triton, tensors, which expert a token goes to.
Invariant: the same numbers of tokens, choices and experts always give the same tiles: what is chosen never
depends on where tokens go, so a step's shape alone decides, and a launch can be captured.

Letters: T tokens, k experts of a token, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

ROW_CLASSES: Final = (8, 16, 32, 64, 128)
_SPREAD: Final = 2
"""Rows of a tile, by the mean number of rows of an expert: most experts then need one tile."""


@dataclass(frozen=True, slots=True)
class ExpertTile:
    """outputs, rows: of a program's tile. inputs: of a step through the inputs (float weights).

    spans: 128 inputs each that a program multiplies at once, a warp each (quantized weights); 1: all warps
    share a span.
    """

    outputs: int
    rows: int
    inputs: int
    spans: int
    warps: int
    stages: int


FLOAT_TILES: Final = {
    8: ExpertTile(32, 16, 128, 1, warps=4, stages=5),
    16: ExpertTile(32, 16, 128, 1, warps=4, stages=5),
    32: ExpertTile(64, 32, 128, 1, warps=4, stages=3),
    64: ExpertTile(128, 64, 64, 1, warps=4, stages=4),
    128: ExpertTile(128, 128, 64, 1, warps=8, stages=3),
}
FULL_TILES: Final = {
    8: ExpertTile(32, 16, 64, 1, warps=4, stages=3),
    16: ExpertTile(32, 16, 64, 1, warps=4, stages=3),
    32: ExpertTile(32, 32, 32, 1, warps=4, stages=3),
    64: ExpertTile(64, 64, 32, 1, warps=8, stages=2),
    128: ExpertTile(64, 64, 32, 1, warps=8, stages=2),
}
"""float32: tensor cores would round the inputs."""
QUANTIZED_TILES: Final = {
    8: ExpertTile(32, 8, 128, 4, warps=4, stages=4),
    16: ExpertTile(64, 16, 128, 1, warps=4, stages=4),
    32: ExpertTile(64, 32, 128, 1, warps=4, stages=4),
    64: ExpertTile(64, 64, 128, 1, warps=4, stages=4),
    128: ExpertTile(128, 128, 128, 1, warps=8, stages=3),
}
ASYMMETRIC_TILES: Final = QUANTIZED_TILES | {128: ExpertTile(64, 128, 128, 1, warps=8, stages=3)}
"""They sum inputs, too: a larger tile's sums would not fit the registers."""


def row_class(tokens: int, choices: int, experts: int) -> int:
    """Which tiles suit T tokens that choose k of E experts each: 8, 16, 32, 64 or 128 rows."""
    wanted = _SPREAD * tokens * choices / experts
    return next((rows for rows in ROW_CLASSES if wanted <= rows), ROW_CLASSES[-1])


def least_tokens(rows: int, choices: int, experts: int) -> int:
    """The smallest T of a class other than the first."""
    before = ROW_CLASSES[ROW_CLASSES.index(rows) - 1]
    return before * experts // (_SPREAD * choices) + 1


def most_tiles(pairs: int, experts: int, rows: int) -> int:
    """Tiles of so many rows that suffice however the pairs are spread over experts."""
    used = min(pairs, experts)
    return used + (pairs - used) // rows

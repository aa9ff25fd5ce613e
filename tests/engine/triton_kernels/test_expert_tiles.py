"""Tiles of routed experts: enough of them for every way to spread tokens, chosen by sizes alone."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest

from memory_efficient_gpt.triton_kernels.expert_tiles import (
    ASYMMETRIC_TILES,
    FLOAT_TILES,
    FULL_TILES,
    QUANTIZED_TILES,
    ROW_CLASSES,
    least_tokens,
    most_tiles,
    row_class,
)


@pytest.mark.parametrize("rows", ROW_CLASSES)
def test_tiles_suffice_however_pairs_are_spread_and_sometimes_all_are_needed(rows: int) -> None:
    rng = random.Random(rows)
    for _ in range(300):
        experts, pairs = rng.randint(1, 40), rng.randint(1, 600)
        counts = [0] * experts
        for _ in range(pairs):
            counts[min(int(rng.expovariate(0.3)), experts - 1)] += 1
        assert sum(-(-count // rows) for count in counts) <= most_tiles(pairs, experts, rows)
        used = min(pairs, experts)
        worst = [1] * (used - 1) + [pairs - used + 1]
        assert sum(-(-count // rows) for count in worst) == most_tiles(pairs, experts, rows)


@pytest.mark.parametrize(("choices", "experts"), [(2, 8), (8, 128), (1, 4), (8, 8), (4, 64)])
def test_classes_begin_where_they_are_said_to(choices: int, experts: int) -> None:
    assert row_class(1, choices, experts) == ROW_CLASSES[0]
    assert row_class(1 << 20, choices, experts) == ROW_CLASSES[-1]
    for before, rows in pairwise(ROW_CLASSES):
        tokens = least_tokens(rows, choices, experts)
        assert row_class(tokens, choices, experts) == rows
        assert tokens == 1 or row_class(tokens - 1, choices, experts) == before


def test_every_class_has_tiles_with_at_least_its_rows_or_the_most_there_are() -> None:
    for table in (FLOAT_TILES, FULL_TILES, QUANTIZED_TILES, ASYMMETRIC_TILES):
        assert tuple(table) == ROW_CLASSES
        assert all(tile.rows in (8, *ROW_CLASSES) and tile.outputs % 32 == 0 for tile in table.values())
        assert all(tile.spans in (1, tile.warps) for tile in table.values())

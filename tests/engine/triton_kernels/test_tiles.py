"""Which tile a product gets."""

from __future__ import annotations

import pytest

from memory_efficient_gpt.triton_kernels.tiles import ROW_LIMITS, Tile, choose_tile, fixed_tile, group_class

HOPPER = dict(major=9, processors=132)
AMPERE = dict(major=8, processors=108)


def test_a_measured_shape_gets_what_was_measured() -> None:
    assert choose_tile("int4", 128, 14336, 4096, 5, **HOPPER) == Tile(32, 8, 1, 4, 4, few_rows=True)
    assert choose_tile("int4", 128, 14336, 4096, 128, **HOPPER) == Tile(128, 128, 1, 8, 3)


def test_the_dense_product_is_chosen_where_it_was_faster_and_beyond_the_table() -> None:
    assert choose_tile("int4", 128, 14336, 4096, 512, **HOPPER) is None
    assert choose_tile("int4", 128, 14336, 4096, ROW_LIMITS[-1] + 1, **HOPPER) is None
    assert choose_tile("int4", 128, 14336, 4096, 2000, **AMPERE) is None


def test_another_shape_gets_the_tile_of_the_nearest_one() -> None:
    near = choose_tile("int8", None, 4000, 4200, 8, **HOPPER)
    assert near == choose_tile("int8", None, 4096, 4096, 8, **HOPPER)
    assert near != choose_tile("int8", None, 128256, 4096, 8, **HOPPER)


@pytest.mark.parametrize("rows", [1, 8, 9, 16, 17, 64, 100, 128])
@pytest.mark.parametrize("shape", [(4096, 4096), (64, 128), (151936, 1024), (96, 80)])
def test_without_a_table_a_tile_covers_the_rows_in_few_programs(rows: int, shape: tuple[int, int]) -> None:
    tile = choose_tile("int4", 32, *shape, rows, **AMPERE)
    assert tile is not None and tile.rows >= min(rows, 64) and tile.splits >= 1
    assert tile.few_rows is (rows <= 16)
    assert tile.rows <= 64 and tile.stages <= 3, "must fit 99 KiB of shared memory"


def test_groups_share_entries_with_those_that_compute_alike() -> None:
    assert group_class("int4", 32) == group_class("int4", 64) == "int4-g32"
    assert group_class("int4", 128) == group_class("int4", None) == group_class("int4", 256) == "int4-g128"
    assert group_class("fp8", None) == group_class("int8", None) == group_class("int8", 64) == "int8"


@pytest.mark.parametrize("major", [8, 9])
@pytest.mark.parametrize("outputs", [128, 4096, 28672])
def test_fixed_tiles_of_a_weight_share_what_decides_the_order_of_a_sum(outputs: int, major: int) -> None:
    tiles = [fixed_tile(outputs, rows, major=major) for rows in (1, 8, 9, 16, 17, 32, 33, 8192)]
    assert {(tile.warps, tile.splits, tile.few_rows) for tile in tiles} == {(tiles[0].warps, 1, True)}
    assert [tile.rows for tile in tiles] == [8, 8, 16, 16, 32, 32, 32, 32]

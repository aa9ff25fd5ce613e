"""The pool's tensors: shapes, zeros, and memory that is taken only where it is used."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from memory_efficient_gpt.kv_cache.block_sizes import block_bytes
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from memory_efficient_gpt.kv_cache.pool import KVPool
from memory_efficient_gpt.kv_cache.pool_memory import FixedMemory

CPU = torch.device("cpu")


def layers(count: int, *, key_dim: int = 64, value_dim: int = 32) -> list[LayerKV]:
    return [
        LayerKV(module=f"layers.{i}", num_kv_heads=4, key_dim=key_dim, value_dim=value_dim, num_query_heads=4)
        for i in range(count)
    ]


def test_a_pool_that_was_released_can_be_restored_and_is_zero() -> None:
    pool = KVPool(layers(2), 8, 4, torch.int8, CPU, memory=FixedMemory(CPU))  # as on a GPU
    for tensor in pool.tensors():
        tensor.fill_(3)
    assert pool.held_bytes(()) == pool.release() == pool.num_bytes
    assert all(tensor.untyped_storage().nbytes() == 0 for tensor in pool.tensors())
    pool.restore()
    assert all(tensor.shape[:2] == (8, 4) and not tensor.any() for tensor in pool.tensors())


def resident_bytes() -> int:
    """Of this process, as the system counts it."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS"))
    return int(line.split()[1]) * 1024


def tensors_of(pool: KVPool) -> list[torch.Tensor]:
    held = (t for c in pool.caches for t in (c.key, c.value, c.key_scale, c.value_scale))
    return [tensor for tensor in held if tensor is not None]


def present_bytes(pool: KVPool) -> int:
    """Of all tensors' pages, those in memory, as the system's page table has it."""
    total = 0
    with Path("/proc/self/pagemap").open("rb") as table:
        for tensor in tensors_of(pool):
            first = tensor.data_ptr() // mmap.PAGESIZE
            last = (tensor.data_ptr() + tensor.numel() * tensor.element_size() - 1) // mmap.PAGESIZE
            table.seek(8 * first)
            entries = np.frombuffer(table.read(8 * (last + 1 - first)), dtype=np.uint64)
            total += int((entries >> np.uint64(63)).sum()) * mmap.PAGESIZE
    return total


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_caches_are_zeros_of_the_right_shape_and_size(dtype: torch.dtype) -> None:
    pool = KVPool(layers(2), 5, 16, dtype, CPU)
    for cache in pool.caches:
        assert cache.key.shape == (5, 16, 4, 64) and cache.value.shape == (5, 16, 4, 32)
        assert cache.key.dtype is cache.value.dtype is dtype
        assert not cache.key.any() and not cache.value.any() and cache.key.is_contiguous()
        assert (cache.key_scale is not None) == (dtype in (torch.int8, torch.float8_e4m3fn))
    held = [t for c in pool.caches for t in (c.key, c.value, c.key_scale, c.value_scale) if t is not None]
    assert sum(t.numel() * t.element_size() for t in held) == pool.num_bytes
    assert pool.num_bytes == 5 * block_bytes(layers(2), 16, dtype)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's /proc")
def test_blocks_that_nobody_wrote_take_no_memory() -> None:
    before = resident_bytes()
    pool = KVPool(layers(4), 4096, 16, torch.bfloat16, CPU)
    assert pool.num_bytes > 150_000_000
    assert resident_bytes() - before < 0.1 * pool.num_bytes
    for cache in pool.caches:
        cache.key[:2048] = 1.0
        cache.value[:2048] = 1.0
    assert resident_bytes() - before > 0.4 * pool.num_bytes


def test_copies_move_whole_blocks_in_every_layer() -> None:
    pool = KVPool(layers(2), 4, 2, torch.float32, CPU)
    for cache in pool.caches:
        cache.key[1] = 3.0
    pool.copy_blocks([(1, 3)])
    for cache in pool.caches:
        assert (cache.key[3] == 3.0).all() and not cache.key[2].any()


@pytest.mark.skipif(sys.platform != "linux", reason="gives pages back as Linux does")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8], ids=str)
def test_blocks_given_back_leave_memory_and_read_as_zeros(dtype: torch.dtype) -> None:
    pool = KVPool(layers(4), 2048, 16, dtype, CPU)
    for tensor in tensors_of(pool):
        tensor.fill_(1)
    full = present_bytes(pool)
    given = pool.keep_all_but([*range(512, 1024), *range(1030, 2048)])
    share = given / pool.num_bytes
    assert 0.6 < share < (512 + 1018) / 2048
    assert present_bytes(pool) == full - given
    for cache in pool.caches:
        assert not cache.key[514:1022].any() and not cache.value[1034:2044].any()
        assert (cache.key[:512] == 1).all() and (cache.key[1024:1030] == 1).all()
        cache.key[600] = 2
        assert (cache.key[600] == 2).all()


def test_nothing_smaller_than_a_page_is_given_back() -> None:
    pool = KVPool(layers(1), 8, 1, torch.int8, CPU)
    for cache in pool.caches:
        cache.key.fill_(3)
    assert pool.keep_all_but([2]) == 0 and pool.keep_all_but([]) == 0
    assert all((cache.key == 3).all() for cache in pool.caches)

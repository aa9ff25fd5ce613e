"""Memory that comes and goes in granules, against a fake driver that refuses what the real one does."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from memory_efficient_gpt.kv_cache.blocks import BlockAllocator
from memory_efficient_gpt.kv_cache.limit import KVLimit
from memory_efficient_gpt.kv_cache.pool import KVPool
from memory_efficient_gpt.kv_cache.pool_memory import PoolMemoryError
from tests.engine.kv_cache.fake_cuda import FakeCuda, fake_driver, fake_memory
from tests.engine.kv_cache.test_pool import CPU, layers

BLOCK = 8 * 4 * 16 * 4
"""Bytes of a block in each tensor below: half a granule."""


def make_pool(cuda: FakeCuda, num_blocks: int = 64, dtype: torch.dtype = torch.float32) -> KVPool:
    """Two layers: four tensors, or eight with scales."""
    return KVPool(layers(2, key_dim=16, value_dim=16), num_blocks, 8, dtype, CPU, memory=fake_memory(cuda))


def wanted_granules(pool: KVPool, cuda: FakeCuda, gone: Sequence[int]) -> set[int]:
    """The addresses that must be mapped, block by block."""
    wanted: set[int] = set()
    for tensor in pool.tensors():
        size = tensor[0].numel() * tensor.element_size()
        for block in set(range(pool.num_blocks)) - set(gone):
            first, last = block * size // cuda.granule, ((block + 1) * size - 1) // cuda.granule
            wanted |= {tensor.data_ptr() + granule * cuda.granule for granule in range(first, last + 1)}
    return wanted


def test_a_new_tensor_has_its_first_granule_and_nothing_else() -> None:
    cuda = FakeCuda()
    pool = make_pool(cuda)
    assert len(cuda.mapped) == len(cuda.created) == 4
    assert all(not tensor[:2].any() and tensor[2:].isnan().all() for tensor in pool.tensors())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8, torch.float8_e4m3fn], ids=str)
@pytest.mark.parametrize("granule", [4096, 3 * 4096])
def test_what_kept_blocks_touch_is_mapped_and_nothing_else_whatever_the_order(
    dtype: torch.dtype, granule: int
) -> None:
    rng = np.random.default_rng(0)
    cuda = FakeCuda(granule=granule)
    pool = make_pool(cuda, 61, dtype)
    gone: list[int] = list(range(1, 61))
    held: dict[int, int] = {}
    for turn in range(1, 60):
        gone = [b for b in range(61) if rng.random() < rng.choice([0.0, 0.3, 0.95, 1.0])]
        before = len(cuda.created)
        given = pool.keep_all_but(gone)
        assert set(cuda.mapped) == wanted_granules(pool, cuda, gone)
        assert len(cuda.created) * granule == pool.held_bytes(gone) == len(cuda.mapped) * granule
        assert given == max(0, before - len(cuda.created)) * granule
        cuda.check()
        held = {block: number for block, number in held.items() if block not in gone}
        for block, number in held.items():
            assert all((tensor.view(torch.uint8)[block] == number).all() for tensor in pool.tensors())
        for block in set(range(61)) - set(gone):
            held[block] = turn
            for tensor in pool.tensors():
                tensor.view(torch.uint8)[block] = turn


def test_granules_that_become_free_are_mapped_where_some_are_missing_without_the_device_having_more() -> None:
    cuda = FakeCuda()
    pool = make_pool(cuda)
    pool.keep_all_but(range(20, 64))
    cuda.capacity, made = len(cuda.created), cuda.calls.count("cuMemCreate")
    assert pool.keep_all_but([*range(20), *range(40, 64)]) == 0
    assert cuda.calls.count("cuMemCreate") == made
    assert all(not tensor[20:40].any() for tensor in pool.tensors())


def test_the_device_is_waited_for_before_memory_goes_and_not_when_it_comes() -> None:
    cuda = FakeCuda()
    pool = make_pool(cuda)
    pool.keep_all_but(())
    assert "wait" not in cuda.calls
    pool.keep_all_but(range(32, 64))
    assert cuda.calls.index("wait") < cuda.calls.index("cuMemUnmap")
    count = len(cuda.calls)
    assert pool.keep_all_but(range(32, 64)) == 0 and len(cuda.calls) == count, "nothing is to be done"


@pytest.mark.parametrize("call", ["cuMemCreate", "cuMemMap", "cuMemSetAccess", "cuMemsetD8Async"])
@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_what_can_not_be_had_changes_nothing(call: str, after: int) -> None:
    cuda = FakeCuda()
    pool = make_pool(cuda)
    pool.keep_all_but(range(16, 64))
    for tensor in pool.tensors():
        tensor[:16] = 5.0
    mapped, created = dict(cuda.mapped), set(cuda.created)
    cuda.fails[call] = after
    with pytest.raises(PoolMemoryError, match=f"{call} failed: CUDA_ERROR_OUT_OF_MEMORY"):
        pool.keep_all_but(())
    assert (cuda.mapped, cuda.created) == (mapped, created)
    cuda.check()
    assert all((tensor[:16] == 5.0).all() for tensor in pool.tensors())
    cuda.fails.clear()
    pool.keep_all_but(())
    assert all((t[:16] == 5.0).all() and not t[16:].any() for t in pool.tensors())


def test_a_refusal_says_how_much_was_wanted() -> None:
    cuda = FakeCuda(capacity=4)
    pool = make_pool(cuda)
    with pytest.raises(PoolMemoryError, match="507,904 bytes more of the GPU's memory can't be had"):
        pool.keep_all_but(())
    assert len(cuda.created) == 4


def test_nothing_is_left_when_the_last_tensor_is_gone() -> None:
    cuda = FakeCuda()
    pool = make_pool(cuda, dtype=torch.int8)
    pool.keep_all_but(range(5, 9))
    tensor = pool.caches[0].key
    del pool
    gc.collect()
    assert len(cuda.ranges) == 1, "the other tensors are gone"
    tensor[9] = 3
    del tensor
    gc.collect()
    assert cuda.is_empty


def test_a_pool_that_is_collected_while_a_graph_is_captured_goes_with_the_next_move() -> None:
    cuda, other = FakeCuda(), FakeCuda()
    pool, gone = make_pool(other), make_pool(cuda)
    cuda.capturing = True
    del gone
    gc.collect()
    assert len(cuda.ranges) == 4 and "wait" not in cuda.calls
    cuda.capturing = False
    pool.keep_all_but(())
    assert cuda.is_empty and len(other.ranges) == 4


@pytest.mark.parametrize("call", ["cuMemAddressReserve", "cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_nothing_is_left_of_a_pool_that_could_not_be_made(call: str) -> None:
    cuda = FakeCuda(fails={call: 2})
    with pytest.raises(PoolMemoryError, match=call):
        make_pool(cuda)
    gc.collect()
    assert cuda.is_empty


def test_a_released_pool_has_no_memory_until_it_is_restored() -> None:
    cuda = FakeCuda()
    pool = make_pool(cuda)
    pool.keep_all_but(range(32, 64))
    addresses = [tensor.data_ptr() for tensor in pool.tensors()]
    assert pool.release() == 4 * 32 * BLOCK and not cuda.created
    assert pool.keep_all_but(()) == 0 and not cuda.created, "it takes memory in its sleep"
    pool.restore(range(16, 64))
    assert len(cuda.created) * cuda.granule == 4 * 16 * BLOCK
    assert [tensor.data_ptr() for tensor in pool.tensors()] == addresses
    assert all(not tensor[:16].any() for tensor in pool.tensors())


def test_a_device_without_virtual_memory_is_refused() -> None:
    with pytest.raises(PoolMemoryError, match="has no virtual memory management"):
        fake_driver(FakeCuda(supported=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_free_blocks_have_memory_and_what_is_told_is_what_is_held(dtype: torch.dtype) -> None:
    """Blocks taken, cached and released at random, limits that move, memory that is short now and then."""
    rng = np.random.default_rng(1)
    cuda = FakeCuda()
    pool = make_pool(cuda, 201, dtype)
    allocator = BlockAllocator(201, 8)
    limit = KVLimit(pool, allocator, 101, max_len=64)
    owned: list[int] = []
    refused = grown = 0
    for turn in range(150):
        while allocator.num_free and rng.random() < 0.9:
            owned.append(allocator.allocate())
            for tensor in pool.tensors():
                tensor[owned[-1]] = 1
            if rng.random() < 0.5:
                allocator.register(owned[-1], allocator.root_key(), [turn] * 7 + [len(owned)])
        rng.shuffle(owned)
        count = int(rng.integers(0, len(owned) + 1))
        allocator.release(owned[:count])
        del owned[:count]
        cuda.capacity = len(cuda.created) + int(rng.choice([0, 3, 1000]))
        before, wanted = limit.held_bytes, int(rng.integers(0, pool.num_bytes + 100_000))
        told = limit.set(wanted)
        assert told == limit.held_bytes == len(cuda.created) * cuda.granule
        assert set(cuda.mapped) == wanted_granules(pool, cuda, allocator.withheld())
        assert told <= max(wanted, before) or allocator.limit == max(8, len(owned))
        refused += told == before < wanted
        grown += told > before
        cuda.check()
        allocator.check_integrity([owned])
        for block in owned:
            assert all((tensor[block] == 1).all() for tensor in pool.tensors())
    assert refused > 5 and grown > 5


def test_blocks_are_not_packed_together_where_that_would_take_more() -> None:
    """In use is one block in each of four granules; two of their neighbours are free, lower ones are not."""
    cuda = FakeCuda()
    pool = make_pool(cuda)
    allocator = BlockAllocator(64, 8)
    limit = KVLimit(pool, allocator, 64, max_len=48)
    blocks = [allocator.allocate() for _ in range(63)]
    allocator.set_limit(6)
    allocator.release([block for block in blocks if block not in (8, 9, 10, 11, 13, 15)])
    allocator.release([8, 10])
    pool.keep_all_but(allocator.withheld())
    held = limit.held_bytes
    assert held == 4 * 5 * cuda.granule
    cuda.capacity = len(cuda.created)
    assert limit.set(0) == held and allocator.num_free == 2
    assert set(cuda.mapped) == wanted_granules(pool, cuda, allocator.withheld())

"""The block allocator and its prefix cache."""

from __future__ import annotations

import random

import pytest

from memory_efficient_gpt.kv_cache.blocks import TRASH_BLOCK, BlockAllocator


def test_every_block_but_the_trash_block_is_handed_out_once() -> None:
    allocator = BlockAllocator(5, 4)
    blocks = [allocator.allocate() for _ in range(4)]
    assert sorted(blocks) == [1, 2, 3, 4]
    assert allocator.num_free == 0
    with pytest.raises(IndexError, match="no KV block is free"):
        allocator.allocate()


def test_shared_block_stays_owned_until_its_last_owner_releases_it() -> None:
    allocator = BlockAllocator(3, 4)
    block = allocator.allocate()
    allocator.share(block)
    allocator.release([block])
    assert allocator.refcount(block) == 1 and allocator.num_free == 1
    allocator.release([block])
    assert allocator.num_free == 2


def _fill_chain(allocator: BlockAllocator, root: bytes, tokens: list[int]) -> list[int]:
    size = allocator.block_size
    blocks, parent = [], root
    for start in range(0, len(tokens), size):
        block = allocator.allocate()
        parent = allocator.register(block, parent, tokens[start : start + size])
        blocks.append(block)
    return blocks


def test_match_finds_the_longest_cached_run_of_full_blocks() -> None:
    allocator = BlockAllocator(10, 4)
    root = allocator.root_key("model")
    blocks = _fill_chain(allocator, root, list(range(12)))
    assert [b for b, _ in allocator.match(root, [*range(12), 99])] == blocks
    assert [b for b, _ in allocator.match(root, [*range(7), 99, 8, 9])] == blocks[:1]
    assert allocator.match(root, [9, 9, 9, 9]) == []
    assert allocator.match(root, [0, 1, 2]) == []


def test_released_cached_blocks_are_found_until_they_are_evicted() -> None:
    allocator = BlockAllocator(4, 4)
    root = allocator.root_key("model")
    blocks = _fill_chain(allocator, root, list(range(12)))
    allocator.release(blocks)
    assert allocator.num_free == 3 and len(allocator.match(root, list(range(12)))) == 3
    allocator.allocate()  # evicts the chain's end first, so its start can still be found
    assert [b for b, _ in allocator.match(root, list(range(12)))] == blocks[:2]


def test_different_roots_never_share() -> None:
    allocator = BlockAllocator(10, 4)
    _fill_chain(allocator, allocator.root_key("model", "", "alice"), list(range(8)))
    assert allocator.match(allocator.root_key("model", "", "bob"), list(range(8))) == []
    assert allocator.root_key("ab", "c") != allocator.root_key("a", "bc")


def test_tokens_are_compared_even_when_the_keys_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BlockAllocator, "_key", lambda self, parent, packed: b"collision")
    allocator = BlockAllocator(10, 4)
    root = allocator.root_key("model")
    _fill_chain(allocator, root, [1, 2, 3, 4])
    assert allocator.match(root, [5, 6, 7, 8]) == []


def test_same_content_twice_keeps_the_older_block() -> None:
    allocator = BlockAllocator(10, 4)
    root = allocator.root_key("model")
    (first,) = _fill_chain(allocator, root, [1, 2, 3, 4])
    (second,) = _fill_chain(allocator, root, [1, 2, 3, 4])
    assert [b for b, _ in allocator.match(root, [1, 2, 3, 4])] == [first]
    allocator.release([first, second])
    allocator.check_integrity([])


def test_without_prefix_cache_nothing_is_found() -> None:
    allocator = BlockAllocator(10, 4, prefix_cache=False)
    root = allocator.root_key("model")
    allocator.release(_fill_chain(allocator, root, list(range(8))))
    assert allocator.match(root, list(range(8))) == [] and allocator.num_cached == 0


@pytest.mark.parametrize("seed", range(20))
def test_random_operations_keep_the_invariants(seed: int) -> None:
    rng = random.Random(seed)
    allocator = BlockAllocator(rng.randint(2, 24), 2)
    root = allocator.root_key("model")
    tables: list[list[int]] = []
    for _ in range(400):
        action = rng.random()
        if action < 0.45:
            tokens = [rng.randint(0, 1) for _ in range(2 * rng.randint(1, 4))]
            found = allocator.match(root, tokens)
            blocks = [block for block, _ in found]
            missing = len(tokens) // 2 - len(blocks)
            if missing <= allocator.num_free - allocator.num_evictable(blocks):
                for block in blocks:
                    allocator.share(block)
                parent = found[-1][1] if found else root
                for start in range(2 * len(blocks), len(tokens), 2):
                    block = allocator.allocate()
                    parent = allocator.register(block, parent, tokens[start : start + 2])
                    blocks.append(block)
                tables.append(blocks)
        elif action < 0.6 and tables:
            copy = list(rng.choice(tables))
            for block in copy:
                if block != TRASH_BLOCK:
                    allocator.share(block)
            tables.append(copy)
        elif action < 0.98 and tables:
            allocator.release(tables.pop(rng.randrange(len(tables))))
        elif action < 0.99:
            allocator.clear_cache()
        else:
            allocator.set_limit(rng.randint(1, allocator.num_blocks - 1))
        allocator.check_integrity(tables)
    for table in tables:
        allocator.release(table)
    allocator.check_integrity([])
    assert allocator.num_free == allocator.limit


def test_a_lower_limit_withholds_free_blocks_from_the_high_end() -> None:
    allocator = BlockAllocator(9, 4)
    owned = [allocator.allocate() for _ in range(2)]
    allocator.set_limit(5)
    assert allocator.num_free == 3 and allocator.num_over_limit == 0
    assert allocator.take_withheld() == [6, 7, 8] and allocator.take_withheld() == []
    assert sorted(owned + [allocator.allocate() for _ in range(3)]) == [1, 2, 3, 4, 5]


def test_cached_blocks_go_after_free_ones_and_the_least_recently_used_first() -> None:
    allocator = BlockAllocator(7, 2)
    root = allocator.root_key("model")
    old, new = _fill_chain(allocator, root, [1, 2]), _fill_chain(allocator, root, [3, 4])
    allocator.release(old)
    allocator.release(new)
    allocator.set_limit(2)
    assert len(allocator.match(root, [1, 2])) == 1 and len(allocator.match(root, [3, 4])) == 1
    allocator.set_limit(1)
    assert allocator.match(root, [1, 2]) == [] and len(allocator.match(root, [3, 4])) == 1


def test_owned_blocks_are_withheld_when_they_are_released_and_found_no_more() -> None:
    allocator = BlockAllocator(5, 2)
    root = allocator.root_key("model")
    blocks = _fill_chain(allocator, root, list(range(8)))
    allocator.set_limit(3)
    assert allocator.num_over_limit == 1 and allocator.num_free == 0
    assert allocator.take_withheld() == []
    allocator.release(blocks)
    assert allocator.take_withheld() == blocks[-1:]
    assert [b for b, _ in allocator.match(root, list(range(8)))] == blocks[:3]


def test_a_higher_limit_returns_blocks_that_were_withheld() -> None:
    allocator = BlockAllocator(9, 4)
    allocator.set_limit(2)
    allocator.set_limit(6)
    assert allocator.num_free == 6 and allocator.take_withheld() == [7, 8]
    allocator.set_limit(8)
    assert sorted(allocator.allocate() for _ in range(8)) == list(range(1, 9))


@pytest.mark.parametrize("limit", [0, -1, 5])
def test_a_limit_outside_of_the_pool_is_refused(limit: int) -> None:
    with pytest.raises(ValueError, match=f"1..4 KV blocks, got {limit}"):
        BlockAllocator(5, 4).set_limit(limit)


def test_the_highest_numbers_go_first_where_that_is_asked_for_cached_or_not() -> None:
    allocator = BlockAllocator(9, 1)
    blocks = [allocator.allocate() for _ in range(8)]
    root = allocator.root_key()
    for block in (2, 7):
        allocator.register(block, root, [block])
    allocator.release([block for block in blocks if block != 8])
    allocator.set_limit(5, highest_first=True)
    assert allocator.withheld() == allocator.take_withheld() == [5, 6, 7]
    assert [block for block, _ in allocator.match(root, [2])] == [2] and not allocator.match(root, [7])
    allocator.check_integrity([[8]])
    allocator.set_limit(1, highest_first=True)
    assert allocator.withheld() == [1, 2, 3, 4, 5, 6, 7] and allocator.num_cached == 0
    assert allocator.returned_by(3) == [1, 2]
    allocator.set_limit(3)
    assert [allocator.allocate(), allocator.allocate()] == [1, 2]


def test_compact_are_the_lowest_numbers_beside_those_in_use() -> None:
    allocator = BlockAllocator(9, 1)
    for _ in range(8):
        allocator.allocate()
    allocator.release([1, 3, 4, 5, 8])
    assert allocator.withheld_if_compact(8) == []
    assert allocator.withheld_if_compact(5) == [4, 5, 8]
    assert allocator.withheld_if_compact(3) == [1, 3, 4, 5, 8]

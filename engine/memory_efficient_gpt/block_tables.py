"""The KV blocks each sequence holds: taken, shared, cached and given back. No torch.

Purpose: everything the scheduler does to a sequence's `blocks` and `block_keys`.
Does not know: budgets, queues, who goes first, token values that are not read yet.
Invariant: a block that a sequence is about to write to has no other owner.
"""

from __future__ import annotations

from memory_efficient_gpt.kv_cache.blocks import TRASH_BLOCK, BlockAllocator
from memory_efficient_gpt.sequence import Sequence

CachedBlocks = list[tuple[int, bytes]]
"""Blocks (id, key) that hold the beginning of a sequence already."""


class BlockTables:
    """Block tables over one allocator.

    variant: whatever else decides a block's content (weights, KV type). window: if set, every layer
    sees only that many tokens back, and blocks before them are given back. `windowed`: whether it is set;
    `caching`: whether full blocks are kept for others.
    """

    def __init__(self, allocator: BlockAllocator, *, variant: str, window: int | None) -> None:
        self._allocator = allocator
        self._variant = variant
        self._window = window
        self._block_size = allocator.block_size
        self.windowed, self.caching = window is not None, allocator.prefix_cache

    @property
    def num_free(self) -> int:
        """Blocks that can be allocated now."""
        return self._allocator.num_free

    def missing(self, seq: Sequence, num_tokens: int) -> int:
        """How many blocks must be allocated before `num_tokens` more positions can be computed."""
        return self._uncovered(seq, num_tokens) + (self._shared_write(seq) is not None)

    def missing_for_admission(self, seq: Sequence, found: CachedBlocks) -> int:
        """How many free blocks too few there are (0 or less: it fits) for `seq`, one token and its forks."""
        blocks = [block for block, _ in found]
        needed = self._num_blocks(seq.total_len + 1) - len(blocks) + len(seq.siblings)
        return needed - (self.num_free - self._allocator.num_evictable(blocks))

    def extend(self, seq: Sequence, num_tokens: int) -> tuple[int, int] | None:
        """Give `seq` the blocks of its next positions; a (source, target) copy if it shared the first."""
        copy = None
        shared = self._shared_write(seq)
        if shared is not None:
            copy = seq.blocks[shared], self._allocate(seq)
            self._release(seq, [copy[0]])
            seq.blocks[shared] = copy[1]
            seq.dirty_from = min(seq.dirty_from, shared)
        for _ in range(self._uncovered(seq, num_tokens)):
            seq.blocks.append(self._allocate(seq))
        return copy

    def reserve_prompt(self, seq: Sequence) -> None:
        """Take all of the prompt's blocks at once, so that prompts never starve each other halfway."""
        for _ in range(self._num_blocks(seq.total_len) - len(seq.blocks)):
            seq.blocks.append(self._allocate(seq))

    def share(self, leader: Sequence, sibling: Sequence) -> None:
        """Let `sibling` begin with all that `leader` has computed."""
        shared = [block for block in leader.blocks if block != TRASH_BLOCK]
        for block in shared:
            self._allocator.share(block)
        if sibling.meter is not None:
            sibling.meter.take(shared)
        sibling.blocks = list(leader.blocks)
        sibling.block_keys = list(leader.block_keys)
        sibling.dirty_from = 0

    def find_cached(self, seq: Sequence) -> CachedBlocks:
        """The cached blocks that `seq` may begin with; nothing is taken yet."""
        request = seq.request
        if not request.use_prefix_cache:
            return []
        if seq.wanted_prompt_logprobs is not None and seq.prompt_logprobs is None:
            return []  # they need the logits of every prompt position
        found = self._allocator.match(self._root(seq), seq.tokens)
        if len(found) * self._allocator.block_size >= seq.total_len:
            found.pop()  # one token at least is computed, or there would be no logits
        return found

    def take_cached(self, seq: Sequence, found: CachedBlocks) -> int:
        """Give `seq` those blocks; returns how many tokens they hold."""
        for block, key in found:
            self._allocator.share(block)
            seq.blocks.append(block)
            seq.block_keys.append(key)
        if seq.meter is not None:
            seq.meter.take([block for block, _ in found])
        return len(found) * self._allocator.block_size

    def committed(self, seq: Sequence) -> None:
        """Positions of `seq` became final: cache its full blocks, give back those no query can see."""
        self._register_full_blocks(seq)
        if self._window is not None:
            self._drop_outside_window(seq, self._window)

    def distrust(self, seq: Sequence) -> None:
        """Let nobody else begin with what `seq` has computed."""
        self._allocator.forget(seq.block_keys)

    def release(self, seq: Sequence) -> None:
        """Take all blocks from `seq`."""
        self._release(seq, seq.blocks)
        seq.drop_kv()

    def _allocate(self, seq: Sequence) -> int:
        block = self._allocator.allocate()
        if seq.meter is not None:
            seq.meter.take((block,))
        return block

    def _release(self, seq: Sequence, blocks: list[int]) -> None:
        self._allocator.release(blocks)
        if seq.meter is not None:
            seq.meter.give([block for block in blocks if block != TRASH_BLOCK])

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._allocator.block_size)

    def _uncovered(self, seq: Sequence, num_tokens: int) -> int:
        """Blocks beyond those of `seq` that its next positions need."""
        return max(0, -(-(seq.num_scheduled + num_tokens) // self._block_size) - len(seq.blocks))

    def _shared_write(self, seq: Sequence) -> int | None:
        """Index of the block that the next position falls into, if another sequence holds it too."""
        index = seq.num_scheduled // self._block_size
        if index < len(seq.blocks) and self._allocator.refcount(seq.blocks[index]) > 1:
            return index
        return None

    def _root(self, seq: Sequence) -> bytes:
        request = seq.request
        return self._allocator.root_key(self._variant, request.adapter or "", request.cache_salt)

    def _register_full_blocks(self, seq: Sequence) -> None:
        size = self._block_size
        if not (self._allocator.prefix_cache and seq.request.use_prefix_cache):
            return
        while (done := len(seq.block_keys)) < seq.num_committed // size:
            parent = seq.block_keys[-1] if done else self._root(seq)
            tokens = seq.tokens[done * size : (done + 1) * size]
            seq.block_keys.append(self._allocator.register(seq.blocks[done], parent, tokens))

    def _drop_outside_window(self, seq: Sequence, window: int) -> None:
        """Release blocks whose last position no later query can see."""
        size = self._allocator.block_size
        for index in range(max(0, (seq.num_committed - window + 1) // size) - 1, -1, -1):
            if seq.blocks[index] == TRASH_BLOCK:
                break
            self._release(seq, [seq.blocks[index]])
            seq.blocks[index] = TRASH_BLOCK
            seq.dirty_from = min(seq.dirty_from, index)

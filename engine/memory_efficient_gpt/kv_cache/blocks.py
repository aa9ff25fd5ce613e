"""Which KV block belongs to whom: allocation, sharing and the prefix cache. No torch.

Purpose: hand out block numbers, count their owners, and find blocks whose content is already there.
Does not know: tensors, requests, when a step runs.
Invariant: used + evictable + free + withheld = num_blocks - 1 (block 0 is the trash block that padding
writes to and that nobody owns); a block is in the prefix cache only when it is full and its content final.

A limit below the number of blocks withholds the rest: nobody gets those, so their memory can be given back.
Owned blocks are never taken away; they are withheld once their owners release them.

A cached block's key is a keyed 128-bit hash of (parent key, tokens); the chain's root covers what
else decides the content (model variant, adapter, cache salt). The key's secret is drawn at random,
so nobody can aim for a collision, and tokens are compared on every hit all the same.
"""

from __future__ import annotations

import hashlib
import secrets
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

TRASH_BLOCK: Final = 0


@dataclass(frozen=True, slots=True)
class _Content:
    key: bytes
    parent: bytes
    tokens: bytes


class BlockAllocator:
    """Numbers 1..num_blocks-1: free, withheld, evictable (cached, unowned) or owned by `refcount` tables."""

    def __init__(
        self, num_blocks: int, block_size: int, *, prefix_cache: bool = True, secret: bytes | None = None
    ) -> None:
        if num_blocks < 2:
            raise ValueError(f"num_blocks must be at least 2 (block 0 is reserved), got {num_blocks}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self._secret = secret or secrets.token_bytes(32)
        self._refcounts = [0] * num_blocks
        self._free = list(range(num_blocks - 1, TRASH_BLOCK, -1))
        self._evictable: OrderedDict[int, None] = OrderedDict()
        self._limit = num_blocks - 1
        self._withheld: set[int] = set()
        self._newly_withheld: list[int] = []
        self._content: dict[int, _Content] = {}
        self._by_key: dict[bytes, int] = {}

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can hand out now, cached but unowned ones included."""
        return len(self._free) + len(self._evictable)

    @property
    def num_used(self) -> int:
        """Blocks that someone owns."""
        return self.num_blocks - 1 - len(self._withheld) - self.num_free

    @property
    def limit(self) -> int:
        """How many blocks may be in use, cached ones included."""
        return self._limit

    @property
    def num_over_limit(self) -> int:
        """Owned blocks that the limit leaves no room for; they go as their owners release them."""
        return self.num_blocks - 1 - len(self._withheld) - self._limit

    def set_limit(self, limit: int, *, highest_first: bool = False) -> None:
        """Let at most `limit` blocks be in use. Free ones go first, then the least recently used cached ones.

        highest_first: those of the highest numbers go, cached or not: what is kept lies close together.
        Raises ValueError unless 1 <= limit <= num_blocks - 1.
        """
        if not 1 <= limit < self.num_blocks:
            raise ValueError(f"the limit must be 1..{self.num_blocks - 1} KV blocks, got {limit}")
        self._limit = limit
        if self.num_over_limit > 0 and highest_first:
            self._withhold_highest(self.num_over_limit)
            return
        if self.num_over_limit > 0:
            self._free.sort(reverse=True)  # high numbers are withheld: whole pages of memory, low ones reused
            going, self._free = self._free[: self.num_over_limit], self._free[self.num_over_limit :]
            for block in going:
                self._withhold(block)
            while self.num_over_limit > 0 and self._evictable:
                block, _ = self._evictable.popitem(last=False)
                self._forget(block)
                self._withhold(block)
            return
        returning = self.returned_by(limit)
        self._withheld.difference_update(returning)
        back = set(returning)
        self._newly_withheld = [block for block in self._newly_withheld if block not in back]
        self._free.extend(reversed(returning))

    def returned_by(self, limit: int) -> list[int]:
        """Withheld blocks that `set_limit(limit)` would let be used again, in ascending order."""
        more = limit - (self.num_blocks - 1 - len(self._withheld))
        return sorted(self._withheld)[: max(0, more)]

    def withheld_if_compact(self, limit: int) -> list[int]:
        """What would be withheld if the cache were cleared and low numbers kept, in ascending order."""
        unowned = [block for block in range(1, self.num_blocks) if self._refcounts[block] == 0]
        return unowned[len(unowned) - max(0, self.num_blocks - 1 - limit) :]

    def take_withheld(self) -> list[int]:
        """Blocks withheld since the last call, in ascending order: nobody reads or writes them any more."""
        taken, self._newly_withheld = sorted(self._newly_withheld), []
        return taken

    def withheld(self) -> list[int]:
        """All withheld blocks, in ascending order."""
        return sorted(self._withheld)

    @property
    def num_cached(self) -> int:
        """Blocks whose content the prefix cache can find, owned or not."""
        return len(self._by_key)

    def refcount(self, block: int) -> int:
        """How many block tables hold `block`."""
        return self._refcounts[block]

    def allocate(self) -> int:
        """Take a block for one owner; the least recently used cached one goes when none is free.

        Raises IndexError when `num_free` is 0: callers check first.
        """
        if self._free:
            block = self._free.pop()
        elif self._evictable:
            block, _ = self._evictable.popitem(last=False)
            self._forget(block)
        else:
            raise IndexError("no KV block is free; check num_free before allocating")
        self._refcounts[block] = 1
        return block

    def share(self, block: int) -> None:
        """Add an owner to a block that is owned or cached."""
        if self._refcounts[block] == 0:
            del self._evictable[block]
        self._refcounts[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """Remove one owner from each block of a table, the trash block skipped.

        The last blocks of a table are released first, so that eviction eats a chain from its end
        and what remains of it can still be found.
        """
        for block in reversed(list(blocks)):
            if block == TRASH_BLOCK:
                continue
            self._refcounts[block] -= 1
            if self._refcounts[block] > 0:
                continue
            assert self._refcounts[block] == 0, f"block {block} was released more often than owned"
            if self.num_over_limit > 0:
                if block in self._content:
                    self._forget(block)
                self._withhold(block)
            elif block in self._content:
                self._evictable[block] = None
            else:
                self._free.append(block)

    def root_key(self, *parts: str) -> bytes:
        """The start of a chain: everything but the tokens that decides a block's content."""
        digest = hashlib.blake2b(key=self._secret, digest_size=16)
        for part in parts:
            data = part.encode("utf-8", "surrogatepass")
            digest.update(len(data).to_bytes(8, "little") + data)
        return digest.digest()

    def register(self, block: int, parent: bytes, tokens: Sequence[int]) -> bytes:
        """Make a full, final block findable; returns its key, the parent of the next block.

        Where the same content is cached already, the older block stays the one that is found.
        """
        packed = array("i", tokens).tobytes()
        key = self._key(parent, packed)
        if self.prefix_cache and key not in self._by_key and block not in self._content:
            self._by_key[key] = block
            self._content[block] = _Content(key, parent, packed)
        return key

    def match(self, root: bytes, tokens: Sequence[int]) -> list[tuple[int, bytes]]:
        """The longest cached run of full blocks at the start of `tokens`: (block, key) each.

        Nothing is taken yet: `share` what is used before the next `allocate`.
        """
        found: list[tuple[int, bytes]] = []
        if not self.prefix_cache:
            return found
        parent = root
        for start in range(0, len(tokens) - self.block_size + 1, self.block_size):
            packed = array("i", tokens[start : start + self.block_size]).tobytes()
            key = self._key(parent, packed)
            block = self._by_key.get(key)
            if block is None:
                break
            content = self._content[block]
            if content.parent != parent or content.tokens != packed:
                break
            found.append((block, key))
            parent = key
        return found

    def num_evictable(self, blocks: Iterable[int]) -> int:
        """How many of `blocks` have no owner: sharing those uses up free room."""
        return sum(1 for block in blocks if self._refcounts[block] == 0)

    def forget(self, keys: Iterable[bytes]) -> None:
        """Make the blocks of these keys unfindable: their content is not to be trusted."""
        for key in keys:
            block = self._by_key.get(key)
            if block is None:
                continue
            self._forget(block)
            if block in self._evictable:
                del self._evictable[block]
                self._free.append(block)

    def clear_cache(self) -> None:
        """Forget all cached content; blocks without an owner become plainly free."""
        self._free.extend(self._evictable)
        self._evictable.clear()
        self._by_key.clear()
        self._content.clear()

    def check_integrity(self, tables: Iterable[Sequence[int]]) -> None:
        """Assert the invariants against all live block tables (tests, debug mode)."""
        owned = [0] * self.num_blocks
        for table in tables:
            for block in table:
                if block != TRASH_BLOCK:
                    owned[block] += 1
        assert owned == self._refcounts, "refcounts differ from block-table occurrences"
        used = sum(1 for count in owned if count)
        withheld = len(self._withheld)
        assert used + self.num_free + withheld == self.num_blocks - 1, "blocks were lost or duplicated"
        assert self.num_over_limit <= used, "a free block exceeds the limit"
        assert not self.num_free or self.num_over_limit <= 0, "a free block exceeds the limit"
        assert len(set(self._free) | set(self._evictable)) == self.num_free, "a block is free twice"
        assert self._withheld.isdisjoint((*self._free, *self._evictable)), "a withheld block is free"
        assert all(owned[block] == 0 for block in (*self._free, *self._evictable, *self._withheld))
        assert {self._by_key[c.key] for c in self._content.values()} == set(self._content)

    def _withhold_highest(self, count: int) -> None:
        """Of the blocks that nobody owns."""
        going = set(sorted((*self._free, *self._evictable), reverse=True)[:count])
        self._free = sorted((block for block in self._free if block not in going), reverse=True)
        for block in going:
            if block in self._evictable:
                del self._evictable[block]
                self._forget(block)
            self._withhold(block)

    def _withhold(self, block: int) -> None:
        self._withheld.add(block)
        self._newly_withheld.append(block)

    def _key(self, parent: bytes, packed_tokens: bytes) -> bytes:
        return hashlib.blake2b(parent + packed_tokens, key=self._secret, digest_size=16).digest()

    def _forget(self, block: int) -> None:
        del self._by_key[self._content.pop(block).key]

"""A decoding step that follows a decoding step of the same sequences, planned without looking at each anew.

Purpose: the cheap plan of what most steps are.
Does not know: budgets, queues, who else could be admitted (the scheduler asks that first).
Invariant: the step is the one that a full plan would give, and leaves sequences and blocks as that would.

A step can be repeated if it is one token of every running sequence. Until a sequence starts, ends or loses
its blocks, the next step differs by one position; blocks are taken where one is full. No write can hit a
shared block: a step that first writes to a block with another owner has copied it, and blocks are shared
later only when they are full, or by sequences that start.
"""

from __future__ import annotations

from memory_efficient_gpt.block_tables import BlockTables
from memory_efficient_gpt.sequence import Sequence, Step


class Repetition:
    """The last planned step, as long as it can be repeated."""

    def __init__(self, tables: BlockTables, block_size: int) -> None:
        self._tables = tables
        self._block_size = block_size
        self._first: Step | None = None
        self._sequences: list[Sequence] = []
        self._ahead = self._left = 0

    def begin(self, step: Step, num_running: int) -> None:
        """A step was planned in full."""
        self.end()
        rows = len(step.chunks)
        if not 0 < rows == step.num_decodes == len(step.samples) == num_running:
            return
        if any(chunk.prompt_logprobs is not None for chunk in step.chunks):
            return
        self._first = step
        self._sequences = [chunk.seq for chunk in step.chunks]
        self._ahead = 0
        self._left = min(seq.max_len - seq.total_len for seq in self._sequences)

    def end(self) -> None:
        """The running sequences are not those of the last step any more."""
        self._first = None
        self._sequences = []

    def next(self) -> Step | None:
        """The last step one position later, its blocks taken; None if that must be planned in full."""
        if self._first is None or self._left <= 0:
            return None
        size = self._block_size
        full = [seq for seq in self._sequences if seq.num_scheduled == len(seq.blocks) * size]
        if len(full) > self._tables.num_free:
            return None
        for seq in full:
            self._tables.extend(seq, 1)
        for seq in self._sequences:
            seq.num_scheduled += 1
            seq.in_flight += 1
        self._ahead += 1
        self._left -= 1
        return Step(self._first, self._ahead)

"""A planned step as host arrays, packed as the model takes them.

Purpose: positions, cache slots, block tables and lengths of a step's tokens; slots' tables between steps.
Does not know: devices, tensors, sampling.
Invariant: `lay_out` reads a plan at once, so the scheduler may go on changing its sequences; a row of the
persistent tables belongs to a slot. A step that repeats another one gets the arrays that it would get alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from memory_efficient_gpt.sequence import Sequence, Step


@dataclass(slots=True)
class StepLayout:
    """T tokens, S chunks, MB blocks of the longest table; names as in attention/context.py.

    unread `[T] int32`: the slot whose last token, still on the device, is this token; -1 for the others.
    """

    input_ids: npt.NDArray[np.int64]
    unread: npt.NDArray[np.int32]
    positions: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    query_starts: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]

    @property
    def num_tokens(self) -> int:
        """T."""
        return len(self.input_ids)

    @property
    def num_rows(self) -> int:
        """S."""
        return len(self.context_lens)


class StepTables:
    """Block tables of all slots, kept from step to step."""

    def __init__(self, max_num_seqs: int, max_blocks: int, block_size: int) -> None:
        self._tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._block_size = block_size
        self._repeated: _Repeated | None = None

    def lay_out(self, step: Step) -> StepLayout:
        """The arrays of a step; takes over blocks that sequences have got since."""
        if step.first is not None:
            if self._repeated is None or self._repeated.first is not step.first:
                self._repeated = _Repeated(step.first)
            return self._lay_out_repeated(self._repeated, step.ahead)
        self._repeated = None
        count = len(step.chunks)
        ids: list[int] = []
        unread: list[tuple[int, int]] = []
        starts, rows = [0], []
        for chunk in step.chunks:
            seq = chunk.seq
            known = seq.tokens[chunk.start : chunk.start + chunk.num_tokens]
            ids.extend(known)
            if len(known) < chunk.num_tokens:  # its last token is in flight
                unread.append((len(ids), slot_of(seq)))
                ids.append(0)
            if seq.dirty_from < len(seq.blocks):
                self._take_blocks(seq)
            starts.append(len(ids))
            rows.append(slot_of(seq))
        query_starts = np.array(starts, dtype=np.int32)
        lens = np.diff(query_starts)
        firsts = np.array([chunk.start for chunk in step.chunks], dtype=np.int64)
        owner = np.repeat(np.arange(count), lens)
        positions = np.arange(len(ids)) - np.repeat(query_starts[:-1] - firsts, lens)
        sources = np.full(len(ids), -1, dtype=np.int32)
        if unread:
            places, slots = zip(*unread, strict=True)
            sources[list(places)] = slots
        context_lens = (firsts + lens).astype(np.int32)
        tables = self._rows_of_tables(np.array(rows), context_lens)
        return StepLayout(
            np.array(ids, dtype=np.int64), sources, positions,
            self._cache_slots(tables, owner, positions), query_starts, context_lens, tables,
        )  # fmt: skip

    def rest(self) -> None:
        """No sequence is running: keep none of the last ones."""
        self._repeated = None

    def _lay_out_repeated(self, repeated: _Repeated, ahead: int) -> StepLayout:
        for seq in repeated.sequences:
            if seq.dirty_from < len(seq.blocks):
                self._take_blocks(seq)
        positions = repeated.positions + ahead
        context_lens = (positions + 1).astype(np.int32)
        tables = self._rows_of_tables(repeated.slots, context_lens)
        ids, unread = repeated.zeros, repeated.slots
        if repeated.sequences[0].in_flight == 1:  # all are alike: nothing but this step is under way
            ids, unread = np.array([seq.tokens[-1] for seq in repeated.sequences]), repeated.nothing
        return StepLayout(
            ids, unread, positions, self._cache_slots(tables, repeated.numbers, positions),
            repeated.query_starts, context_lens, tables,
        )  # fmt: skip

    def _take_blocks(self, seq: Sequence) -> None:
        self._tables[slot_of(seq), seq.dirty_from : len(seq.blocks)] = seq.blocks[seq.dirty_from :]
        seq.dirty_from = len(seq.blocks)

    def _rows_of_tables(
        self, rows: npt.NDArray[np.integer[Any]], context_lens: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.int32]:
        return self._tables[rows, : -(-int(context_lens.max()) // self._block_size)]

    def _cache_slots(
        self, tables: npt.NDArray[np.int32], owner: npt.NDArray[np.int64], positions: npt.NDArray[np.int64]
    ) -> npt.NDArray[np.int64]:
        blocks, offsets = np.divmod(positions, self._block_size)
        return tables[owner, blocks].astype(np.int64) * self._block_size + offsets


class _Repeated:
    """What is the same in all steps that repeat `first`, a decoding step."""

    def __init__(self, first: Step) -> None:
        self.first = first
        self.sequences = [chunk.seq for chunk in first.chunks]
        count = len(self.sequences)
        self.slots = np.array([slot_of(seq) for seq in self.sequences], dtype=np.int32)
        self.positions = np.array([chunk.start for chunk in first.chunks], dtype=np.int64)
        self.numbers = np.arange(count)
        self.query_starts = np.arange(count + 1, dtype=np.int32)
        self.zeros = np.zeros(count, dtype=np.int64)
        self.nothing = np.full(count, -1, dtype=np.int32)


def slot_of(seq: Sequence) -> int:
    """The slot of a running sequence."""
    assert seq.slot is not None
    return seq.slot

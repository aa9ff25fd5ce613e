"""A planned step as host arrays, packed as the model takes them.

Purpose: positions, cache slots, block tables and lengths of a step's tokens; slots' tables between steps.
Does not know: devices, tensors, sampling.
Invariant: `lay_out` reads a plan at once, so the scheduler may go on changing its sequences; a row of the
persistent tables belongs to a slot.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from memory_efficient_gpt.sequence import Step


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

    def lay_out(self, step: Step) -> StepLayout:
        """The arrays of a step; takes over blocks that sequences have got since."""
        size = self._block_size
        count = len(step.chunks)
        ids: list[int] = []
        unread: list[tuple[int, int]] = []
        starts = np.zeros(count + 1, dtype=np.int32)
        firsts = np.empty(count, dtype=np.int64)
        lens = np.empty(count, dtype=np.int64)
        rows = np.empty(count, dtype=np.int64)
        for number, chunk in enumerate(step.chunks):
            seq = chunk.seq
            assert seq.slot is not None
            known = seq.tokens[chunk.start : chunk.start + chunk.num_tokens]
            ids.extend(known)
            if len(known) < chunk.num_tokens:  # its last token is in flight
                unread.append((len(ids), seq.slot))
                ids.append(0)
            if seq.dirty_from < len(seq.blocks):
                self._tables[seq.slot, seq.dirty_from : len(seq.blocks)] = seq.blocks[seq.dirty_from :]
                seq.dirty_from = len(seq.blocks)
            starts[number + 1] = len(ids)
            firsts[number], lens[number], rows[number] = chunk.start, chunk.num_tokens, seq.slot
        owner = np.repeat(np.arange(count), lens)
        positions = np.arange(len(ids)) - np.repeat(starts[:-1] - firsts, lens)
        context_lens = (firsts + lens).astype(np.int32)
        tables = self._tables[rows, : -(-int(context_lens.max()) // size)]
        slots = tables[owner, positions // size].astype(np.int64) * size + positions % size
        sources = np.full(len(ids), -1, dtype=np.int32)
        for where, slot in unread:
            sources[where] = slot
        return StepLayout(
            np.asarray(ids, dtype=np.int64), sources, positions, slots, starts, context_lens, tables
        )

"""From a planned step to sampled tokens: packed tensors in, token ids out.

Purpose: build a step's tensors, run the model once over all its tokens, sample.
Does not know: why these tokens were planned, text, processes.
Invariant: rows of the persistent tables belong to slots; `launch` reads a plan at once, so the
scheduler may go on changing its sequences while the device still computes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from memory_efficient_gpt.attention.context import AttentionBackend, StepContext
from memory_efficient_gpt.attention.interface import forward_packed
from memory_efficient_gpt.kv_cache.pool import KVPool
from memory_efficient_gpt.sequence import Step
from memory_efficient_gpt.step_sampling import PendingStep, draw, num_prompt_targets
from memory_efficient_gpt.uploads import upload


class Runner(Protocol):
    """Computes steps in the order in which they are launched."""

    def launch(self, step: Step) -> PendingStep:
        """Start a step; returns without waiting for the device."""

    def rest(self) -> None:
        """Nothing is running: drop what is kept between steps."""


@dataclass(slots=True)
class _Layout:
    """A step's host arrays. T tokens, S chunks, MB blocks of the longest table."""

    input_ids: npt.NDArray[np.int64]
    positions: npt.NDArray[np.int64]
    slots: npt.NDArray[np.int64]
    query_starts: npt.NDArray[np.int32]
    context_lens: npt.NDArray[np.int32]
    block_tables: npt.NDArray[np.int32]
    unread: list[tuple[int, int]]  # (token index, slot) whose id is still on the device


class PackedRunner:
    """Runs a model whose attention goes through the paged cache (tiers A and B)."""

    def __init__(
        self,
        model: torch.nn.Module,
        pool: KVPool,
        backend: AttentionBackend,
        *,
        device: torch.device,
        max_num_seqs: int,
        max_model_len: int,
        end_ids: tuple[int, ...],
        overlap: bool,
    ) -> None:
        self._model = model
        self._pool = pool
        self._backend = backend
        self._device = device
        self._end_ids = end_ids
        max_blocks = -(-max_model_len // pool.block_size)
        self._tables = np.zeros((max_num_seqs, max_blocks), dtype=np.int32)
        self._last_tokens = torch.zeros(max_num_seqs, dtype=torch.int64, device=device)
        self._keep_last_tokens = overlap

    def launch(self, step: Step) -> PendingStep:
        """Run the step's model call and sampling. On CUDA both only join the stream."""
        with torch.inference_mode():
            if step.copies:
                self._pool.copy_blocks(step.copies)
            layout = self._lay_out(step)
            context = self._context(layout)
            rows = self._logit_rows(step, layout)
            logits = forward_packed(
                self._model, self._input_ids(layout), upload(layout.positions, self._device), context, rows
            )
            pending = draw(step, logits, self._end_ids, self._last_tokens if self._keep_last_tokens else None)
            if pending.token_ids is not None and self._keep_last_tokens:
                slots = np.asarray([s.seq.slot for s in step.samples], dtype=np.int64)
                self._last_tokens[upload(slots, self._device)] = pending.token_ids
        return pending

    def rest(self) -> None:
        """Nothing to drop: a slot's rows are overwritten by its next owner."""

    def _lay_out(self, step: Step) -> _Layout:
        size = self._pool.block_size
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
            end = chunk.start + chunk.num_tokens
            known = seq.tokens[chunk.start : end]
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
        ids_array = np.asarray(ids, dtype=np.int64)
        return _Layout(ids_array, positions, slots, starts, context_lens, tables, unread)

    def _context(self, layout: _Layout) -> StepContext:
        query_lens = np.diff(layout.query_starts)
        return StepContext(
            backend=self._backend,
            slots=upload(layout.slots, self._device),
            block_tables=upload(layout.block_tables, self._device),
            query_starts=upload(layout.query_starts, self._device),
            context_lens=upload(layout.context_lens, self._device),
            max_query_len=int(query_lens.max()),
            max_context_len=int(layout.context_lens.max()),
            host_query_lens=query_lens.tolist(),
            host_context_lens=layout.context_lens.tolist(),
        )

    def _input_ids(self, layout: _Layout) -> torch.Tensor:
        ids = upload(layout.input_ids, self._device)
        if layout.unread:
            where, slots = upload(np.asarray(layout.unread, dtype=np.int64).T, self._device)
            ids[where] = self._last_tokens[slots]
        return ids

    def _logit_rows(self, step: Step, layout: _Layout) -> torch.Tensor:
        """One row for each sampled chunk's last token, then all rows that prompt_logprobs need."""
        sampled = [int(layout.query_starts[s.chunk + 1]) - 1 for s in step.samples]
        prompt_rows = [
            int(layout.query_starts[number]) + offset
            for number, chunk in enumerate(step.chunks)
            if chunk.prompt_logprobs is not None
            for offset in range(num_prompt_targets(chunk))
        ]
        return upload(np.asarray(sampled + prompt_rows, dtype=np.int64), self._device)

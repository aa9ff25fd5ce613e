"""From a planned step to sampled tokens: packed tensors in, token ids out.

Purpose: build a step's tensors, run the model once over all its tokens, sample.
Does not know: why these tokens were planned, text, processes.
Invariant: rows of the persistent tables belong to slots; `launch` reads a plan at once, so the
scheduler may go on changing its sequences while the device still computes.
"""

from __future__ import annotations

from itertools import chain
from typing import Final, Protocol

import numpy as np
import torch

from memory_efficient_gpt.attention.context import AttentionBackend, StepContext
from memory_efficient_gpt.attention.interface import forward_packed
from memory_efficient_gpt.kv_cache.pool import KVPool
from memory_efficient_gpt.native.deferral import DeferredKind, deferring
from memory_efficient_gpt.padded_steps import PaddedSteps
from memory_efficient_gpt.sequence import Step
from memory_efficient_gpt.step_layout import StepLayout, StepTables
from memory_efficient_gpt.step_replays import Replays, StepReplays
from memory_efficient_gpt.step_sampling import Chooser, PendingStep, draw, drawn, num_prompt_targets
from memory_efficient_gpt.uploads import upload

_BUSY: Final = 1.5e12
"""Weights of a layer times tokens of a step that keep a GPU busy for twice as long as its host needs for the
step's calls, so that calls may wait though it costs the host: 6,000 tokens of an 8B Llama, for which an H200
takes 5 ms a layer and its host 2.6."""


class Runner(Protocol):
    """Computes steps in the order in which they are launched."""

    def launch(self, step: Step) -> PendingStep:
        """Start a step; returns without waiting for the device."""

    def rest(self) -> None:
        """Nothing is running: drop what is kept between steps."""

    def forget_addresses(self) -> None:
        """The model's tensors are about to move: drop what knows where they are."""


class PackedRunner:
    """Runs a model whose attention goes through the paged cache (tiers A and B).

    replays: what does steps again; None: all are computed call by call.
    defers: what waits for the next call (native/deferral.py) in those steps and in very large ones.
    """

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
        replays: Replays | None = None,
        defers: frozenset[DeferredKind] = frozenset(),
    ) -> None:
        self._model = model
        self._pool = pool
        self._backend = backend
        self._device = device
        self._end_ids = end_ids
        self._defers = defers
        self._defers_from = _BUSY * len(pool.caches) / _num_weights(model)
        """Tokens of a step."""
        max_blocks = -(-max_model_len // pool.block_size)
        self._tables = StepTables(max_num_seqs, max_blocks, pool.block_size)
        self._last_tokens = torch.zeros(max_num_seqs + 1, dtype=torch.int64, device=device)
        self._keep_last_tokens = overlap
        self._chooser = Chooser()
        self._replays: StepReplays | None = None
        if replays is not None:
            self._replays = replays.make(
                PaddedSteps(
                    model, backend, last_tokens=self._last_tokens, block_size=pool.block_size,
                    max_blocks=max_blocks, defers=defers, decode_rows=replays.decode_rows,
                )
            )  # fmt: skip

    def check_replays(self, vocabulary: int) -> str | None:
        """Why no steps are replayed, or None; tries one token. For an engine that has no work."""
        if self._replays is None:
            return "switched off"
        with torch.inference_mode():
            return self._replays.check(vocabulary, no_slot=len(self._last_tokens) - 1)

    def launch(self, step: Step) -> PendingStep:
        """Run the step's model call and sampling. On CUDA both only join the stream."""
        with torch.inference_mode():
            if step.copies:
                self._pool.copy_blocks(step.copies)
            layout = self._tables.lay_out(step)
            replays = self._replays
            if replays is not None and (pending := self._replay(step, layout, replays)) is not None:
                return pending
            rows = self._logit_rows(step, layout)
            ids, positions = self._input_ids(layout), upload(layout.positions, self._device)
            with deferring(self._defers if layout.num_tokens >= self._defers_from else frozenset()):
                logits = forward_packed(self._model, ids, positions, self._context(layout), rows)
            return self._draw(step, logits)

    def rest(self) -> None:
        """A slot's rows are overwritten by its next owner; what knows the last sequences goes."""
        self._tables.rest()
        self._chooser.rest()

    def forget_addresses(self) -> None:
        """Steps are captured or recorded anew when they repeat."""
        if self._replays is not None:
            self._replays.forget()

    def _replay(self, step: Step, layout: StepLayout, replays: StepReplays) -> PendingStep | None:
        """Do the step again; None if it is not one for that."""
        if step.first is None and any(chunk.prompt_logprobs is not None for chunk in step.chunks):
            return None
        choice, samples = self._chooser.choose(step, layout)
        if len(samples.logit_rows) > layout.num_rows:  # several texts of one prompt begin
            return None
        choice = choice if replays.chooses else None
        result = replays.run(layout, samples, choice)
        if result is None:
            return None
        return self._draw(step, result) if choice is None else drawn(result, len(samples.logit_rows))

    def _draw(self, step: Step, logits: torch.Tensor) -> PendingStep:
        last_tokens = self._last_tokens if self._keep_last_tokens else None
        pending = draw(step, logits, self._end_ids, last_tokens, kernel=self._backend.name == "triton")
        if pending.token_ids is not None and self._keep_last_tokens:
            slots = np.asarray([s.seq.slot for s in step.samples], dtype=np.int64)
            self._last_tokens[upload(slots, self._device)] = pending.token_ids
        return pending

    def _context(self, layout: StepLayout) -> StepContext:
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

    def _input_ids(self, layout: StepLayout) -> torch.Tensor:
        ids = upload(layout.input_ids, self._device)
        (where,) = np.nonzero(layout.unread >= 0)
        if len(where):
            places, slots = upload(np.stack([where, layout.unread[where]]), self._device)
            ids[places] = self._last_tokens[slots]
        return ids

    def _logit_rows(self, step: Step, layout: StepLayout) -> torch.Tensor:
        """One row for each sampled chunk's last token, then all rows that prompt_logprobs need."""
        sampled = [int(layout.query_starts[s.chunk + 1]) - 1 for s in step.samples]
        prompt_rows = [
            int(layout.query_starts[number]) + offset
            for number, chunk in enumerate(step.chunks)
            if chunk.prompt_logprobs is not None
            for offset in range(num_prompt_targets(chunk))
        ]
        return upload(np.asarray(sampled + prompt_rows, dtype=np.int64), self._device)


def _num_weights(model: torch.nn.Module) -> int:
    """Elements of all tensors of two dimensions, as they are stored; at least 1."""
    tensors = chain(model.parameters(), model.buffers())
    return max(1, sum(tensor.numel() for tensor in tensors if tensor.ndim == 2))

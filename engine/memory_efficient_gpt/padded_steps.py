"""A step in fixed places: padded inputs in one buffer, calls that read and write nothing but fixed addresses.

Purpose: what a CUDA graph captures, as a function of its inputs' contents only.
Does not know: graphs, requests, plans, architectures.
Invariant: what rows that count give does not depend on the padding; `compute` never waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from memory_efficient_gpt.attention.context import AttentionBackend, StepContext
from memory_efficient_gpt.attention.interface import forward_packed
from memory_efficient_gpt.native.deferral import DeferredKind, deferring
from memory_efficient_gpt.sampling.batch import RowParameters
from memory_efficient_gpt.sampling.draw import draw_tokens
from memory_efficient_gpt.sampling.ordering import argmax
from memory_efficient_gpt.sampling.sampler import Sampled
from memory_efficient_gpt.step_layout import StepLayout
from memory_efficient_gpt.step_shape import (
    Choice,
    Fields,
    RowsToSample,
    StepShape,
    fields_of,
    largest_shape,
    pack,
)
from memory_efficient_gpt.uploads import Staging

_SAMPLE_BYTES: Final = 9
"""Of a sampled row: the token, and whether its logits were usable."""


@dataclass(frozen=True, slots=True)
class StepKind:
    """A shape, and how tokens are chosen; choice None: logits only."""

    shape: StepShape
    choice: Choice | None


class PaddedSteps:
    """The buffers of one model's padded steps, and their computation.

    last_tokens `[slots + 1] int64`: each slot's newest token, read and (where tokens are chosen here)
    written; the last element is for padding.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        backend: AttentionBackend,
        *,
        last_tokens: torch.Tensor,
        block_size: int,
        max_blocks: int,
        defers: frozenset[DeferredKind] = frozenset(),
        decode_rows: int | None = None,
    ) -> None:
        """defers: kinds of calls that wait for the next one in `compute` (native/deferral.py). decode_rows:
        the most rows, where all steps are decoding ones; None: as `largest_shape` has them."""
        self.device = last_tokens.device
        self._model = model
        self._backend = backend
        self._last_tokens = last_tokens
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._defers = defers
        largest = largest_shape(len(last_tokens) - 1, max_blocks * block_size, decode_rows)
        self._inputs = torch.zeros(self._fields(largest).size, dtype=torch.int32, device=self.device)
        self._staging = Staging(len(self._inputs), self.device)
        self._tokens = torch.zeros(_SAMPLE_BYTES * largest.rows, dtype=torch.uint8, device=self.device)
        self._most_rows = largest.rows
        self._logits: torch.Tensor | None = None

    def load(self, layout: StepLayout, samples: RowsToSample, shape: StepShape) -> None:
        """Enqueue one copy of the step's numbers, padded to `shape`, to the device."""
        fields = self._fields(shape)
        packed = self._staging.take(fields.size)
        pack(layout, samples, shape, fields, len(self._last_tokens) - 1, packed)
        self._staging.send(self._inputs[: fields.size])

    def result(self, kind: StepKind, rows: int) -> torch.Tensor:
        """What the last step of that kind gave, to be read before the next one is computed: the logits
        `[rows, V]`, or with a choice the sampled rows as `sampled_rows` reads them."""
        if kind.choice is not None:
            return self._tokens[: _SAMPLE_BYTES * kind.shape.rows]
        assert self._logits is not None, "nothing was computed"
        return self._logits[:rows]

    def compute(self, kind: StepKind) -> None:
        """The step's calls: from the packed inputs to logits or tokens in their places."""
        shape, packed, fields = kind.shape, self._inputs, self._fields(kind.shape)
        unread = packed[fields.unread]
        kept = self._last_tokens[unread.clamp(min=0)]
        ids = torch.where(unread >= 0, kept, packed[fields.input_ids])
        context = StepContext(
            backend=self._backend,
            slots=packed[fields.slots].long(),
            block_tables=packed[fields.block_tables].view(shape.rows, -1),
            query_starts=packed[fields.query_starts],
            context_lens=packed[fields.context_lens],
            max_query_len=1 if shape.decode else shape.tokens,
            max_context_len=shape.context,
            host_query_lens=[1] * shape.rows if shape.decode else None,
        )
        rows = packed[fields.logit_rows].long()
        positions = packed[fields.positions].long()
        with deferring(self._defers):
            logits = forward_packed(self._model, ids, positions, context, rows)
        if kind.choice is None:
            self._keep_logits(logits)
        else:
            self._choose(logits, kind, fields)

    def drop_logits(self) -> None:
        """Give back the largest buffer; it is made again when it is needed."""
        self._logits = None

    def _keep_logits(self, logits: torch.Tensor) -> None:
        if self._logits is None:
            self._logits = logits.new_empty((self._most_rows, logits.shape[1]))
        self._logits[: len(logits)].copy_(logits)

    def _choose(self, logits: torch.Tensor, kind: StepKind, fields: Fields) -> None:
        rows, packed = kind.shape.rows, self._inputs
        parameters = self._parameters(fields) if kind.choice is Choice.DRAW else None
        slots = packed[fields.token_slots]
        kept_tokens = self._tokens[: 8 * rows].view(torch.int64)
        kept_ok = self._tokens[8 * rows : _SAMPLE_BYTES * rows]
        if self._backend.name == "triton":
            from memory_efficient_gpt.triton_kernels.token_choice import choose

            choose(logits, parameters, kept_tokens, kept_ok, self._last_tokens, slots)
            return
        tokens = best = argmax(logits)
        top = logits.gather(1, best[:, None])
        ok = top.squeeze(1).isfinite()
        if parameters is not None:
            drawn = draw_tokens(logits.float(), top.float(), parameters.as_draw(logits.shape[1]))
            tokens = torch.where(parameters.temperature > 0, drawn.squeeze(1), best)
        tokens = torch.where(ok, tokens, 0)
        self._last_tokens[slots] = tokens
        kept_tokens.copy_(tokens)
        kept_ok.copy_(ok)

    def _parameters(self, fields: Fields) -> RowParameters:
        packed = self._inputs
        return RowParameters(
            temperature=packed[fields.temperatures].view(torch.float32),
            min_p=packed[fields.min_ps].view(torch.float32),
            top_k=packed[fields.top_ks],
            top_p=packed[fields.top_ps].view(torch.float64),
            uniform=packed[fields.uniforms].view(torch.float64),
        )

    def _fields(self, shape: StepShape) -> Fields:
        return fields_of(shape, shape.table_width(self._block_size, self._max_blocks))


def sampled_rows(buffer: torch.Tensor, rows: int) -> Sampled:
    """The first `rows` of what a graph sampled; `buffer` is on any device."""
    padded = len(buffer) // _SAMPLE_BYTES
    return Sampled(
        buffer[: 8 * padded].view(torch.int64)[:rows],
        buffer[8 * padded :].view(torch.bool)[:rows],
    )

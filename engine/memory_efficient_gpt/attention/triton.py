"""Paged attention on a GPU by the Triton kernels.

Purpose: the attention backend "triton": choose launches, hold their workspace.
Does not know: models, the scheduler, the kernels' insides.
Invariant: no host synchronization; a token's output depends on its query and its visible keys and values
only, not on the batch or the chunking of its prompt but for the order of sums of a chunk's tiles, which
"deterministic" fixes, too. Which kernels are launched, and how, depends on the step's sizes only, so a step
can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from memory_efficient_gpt.attention.context import AttentionOptions, LayerCache, StepContext
from memory_efficient_gpt.attention.prompt_kernels import Piece, PromptKernel
from memory_efficient_gpt.native.deferred_calls import DeferredTurn
from memory_efficient_gpt.triton_kernels.availability import triton_obstacle

QUERY_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
CACHE_DTYPES: Final = (*QUERY_DTYPES, torch.int8, torch.float8_e4m3fn)
_FP8_CAPABILITY: Final = (8, 9)
_LARGEST: Final = {torch.int8: 127.0, torch.float8_e4m3fn: 448.0}
_MOST_DIM: Final = 256


class TritonBackend:
    """Implements AttentionBackend. Queries in 16 bits or float32; caches those, int8 or fp8."""

    name = "triton"

    def __init__(
        self,
        *,
        precision: str = "ieee",
        prompt_kernels: Sequence[PromptKernel] = (),
        deterministic: bool = False,
    ) -> None:
        """precision: of products of float32; others have one only. prompt_kernels: others' kernels for rows
        with several tokens, which are asked in this order.

        deterministic: a token's output is the same bits whether it is decoded or part of any chunk; no prompt
        is for other kernels then.
        """
        self._precision = precision
        self._prompt_kernels = () if deterministic else tuple(prompt_kernels)
        self._deterministic = deterministic

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, context: StepContext) -> None:
        """Store key `[T, Hkv, Dk]` and value `[T, Hkv, Dv]` at `context.slots`, as the cache holds it."""
        from memory_efficient_gpt.triton_kernels.attention_launch import write_kv

        write_kv(key, value, cache, context.slots, _LARGEST.get(cache.key.dtype, 1.0))

    def turn_and_write(
        self, turn: DeferredTurn, value: torch.Tensor, cache: LayerCache, context: StepContext
    ) -> None:
        """Fill `turn.outputs`; store its turned key and value `[T, Hkv, Dv]` as `write` would."""
        from memory_efficient_gpt.triton_kernels.turned_write import HeadNorms, turn_and_write

        query, key, norms = turn.query, turn.key, None
        if turn.norms is not None:
            norms = HeadNorms(*turn.norms, kept=(query, key))
            query, key = turn.norms[0].source_of(query), turn.norms[1].source_of(key)
        turn_and_write(
            query, key, value, turn.cos, turn.sin, turn.outputs, cache, context.slots,
            _LARGEST.get(cache.key.dtype, 1.0), norms,
        )  # fmt: skip

    def attend(
        self, query: torch.Tensor, cache: LayerCache, context: StepContext, options: AttentionOptions
    ) -> torch.Tensor:
        """Causal attention of query `[T, Hq, Dk]` over the cache; returns `[T, Hq, Dv]`, query's dtype.

        Tokens that belong to no row come out as zeros.
        """
        from memory_efficient_gpt.triton_kernels.attention_launch import (
            decode_rows,
            fixed_prompt_chunks,
            prompt_chunks,
        )

        pieces = self._by_prompt_kernels(query, cache, context, options)
        if len(pieces) == 1 and pieces[0].start == 0 and pieces[0].end == query.shape[0]:
            return pieces[0].output
        shape = (query.shape[0], query.shape[1], cache.value.shape[3])
        lens, rows = context.host_query_lens, context.block_tables.shape[0]
        covered = lens is not None and sum(lens) == query.shape[0]
        out = query.new_empty(shape) if covered else query.new_zeros(shape)
        if lens is None or context.max_query_len == 1 or 1 in lens:
            longest = context.max_context_len
            decode_rows(
                query, cache, context, options, out, rows, longest, self._precision, fixed=self._deterministic
            )
        for piece in pieces:
            out[piece.start : piece.end] = piece.output
        if context.max_query_len > 1 and not pieces:
            launch = fixed_prompt_chunks if self._deterministic else prompt_chunks
            launch(query, cache, context, options, out, rows, self._precision)
        return out

    def _by_prompt_kernels(
        self, query: torch.Tensor, cache: LayerCache, context: StepContext, options: AttentionOptions
    ) -> list[Piece]:
        """All rows with several tokens by the first kernel that the step is for, or nothing."""
        if context.max_query_len > 1:
            for kernel in self._prompt_kernels:
                pieces = kernel.attend(query, cache, context, options)
                if pieces is not None:
                    return pieces
        return []


def obstacle(
    device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, largest_dim: int
) -> str | None:
    """Why the backend can't serve such a model, or None. largest_dim: of keys and values."""
    if (reason := triton_obstacle(device)) is not None:
        return reason
    if dtype not in QUERY_DTYPES:
        return f"Triton attention takes no {dtype} queries"
    if cache_dtype not in CACHE_DTYPES:
        return f"Triton attention has no {cache_dtype} KV cache"
    if largest_dim > _MOST_DIM:
        return f"Triton attention has heads of at most {_MOST_DIM}, not {largest_dim}"
    if cache_dtype is torch.float8_e4m3fn and torch.cuda.get_device_capability(device) < _FP8_CAPABILITY:
        return "the GPU has no fp8"
    return None

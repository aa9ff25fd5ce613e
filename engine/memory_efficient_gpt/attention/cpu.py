"""Paged attention on the CPU by the native kernels.

Purpose: the attention backend "cpu-native".
Does not know: models, the scheduler, how the kernels were compiled.
Invariant: a token's output depends on its query and its visible keys and values only, bit for bit: not on the
batch, the chunking of its prompt or the thread count.
"""

from __future__ import annotations

import torch

from memory_efficient_gpt.attention.context import AttentionOptions, LayerCache, StepContext
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import Kernels, load_kernels

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.int8)
QUERY_DTYPES = (torch.float32, torch.bfloat16)


class NativeCPUBackend:
    """Implements AttentionBackend. Queries float32 or bfloat16; caches float32, bfloat16 or int8."""

    name = "cpu-native"

    def __init__(self, kernels: Kernels | None = None) -> None:
        """None loads the kernels for this CPU. Raises RuntimeError where there are none; see `create`."""
        loaded = load_kernels() if kernels is None else kernels
        if isinstance(loaded, Unavailable):
            raise RuntimeError(f"native kernels are unavailable: {loaded.reason}")
        self._kernels = loaded

    @property
    def kernels(self) -> Kernels:
        """Those that compute."""
        return self._kernels

    @classmethod
    def create(cls, dtype: torch.dtype, cache_dtype: torch.dtype) -> NativeCPUBackend | Unavailable:
        """The backend for queries of `dtype`, or why there is none (the caller logs it and falls back)."""
        if dtype not in QUERY_DTYPES:
            return Unavailable(f"native CPU attention takes float32 or bfloat16 queries, not {dtype}")
        if cache_dtype not in CACHE_DTYPES:
            return Unavailable(f"native CPU attention has no {cache_dtype} KV cache")
        kernels = load_kernels()
        return kernels if isinstance(kernels, Unavailable) else cls(kernels)

    def write(self, key: torch.Tensor, value: torch.Tensor, cache: LayerCache, context: StepContext) -> None:
        """Store key `[T, Hkv, Dk]` and value `[T, Hkv, Dv]` at `context.slots`, quantizing for int8."""
        self._kernels.write_kv(
            key, value, cache.key, cache.value, cache.key_scale, cache.value_scale, context.slots
        )

    def attend(
        self, query: torch.Tensor, cache: LayerCache, context: StepContext, options: AttentionOptions
    ) -> torch.Tensor:
        """Causal attention of query `[T, Hq, Dk]` over the cache; returns `[T, Hq, Dv]`, query's dtype."""
        return self._kernels.paged_attention(
            query,
            cache.key,
            cache.value,
            cache.key_scale,
            cache.value_scale,
            context.block_tables,
            context.query_starts,
            context.context_lens,
            scale=options.scale,
            window=options.window,
            softcap=options.softcap,
            sinks=options.sinks,
            alibi_slopes=options.alibi_slopes,
        )

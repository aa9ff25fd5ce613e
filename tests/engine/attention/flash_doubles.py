"""Stand-ins for FlashAttention's packages: their documented calls, computed by torch in float32.

They refuse what the packages refuse: sizes, dtypes and layouts of tables, pages of other sizes.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import torch


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, window: tuple[int, int],
    softcap: float,
) -> torch.Tensor:  # fmt: skip
    """query `[n, Hq, D]` at the end of key and value `[m, Hkv, D]`, causal."""
    group = query.shape[1] // key.shape[1]
    key, value = (part.float().repeat_interleave(group, dim=1) for part in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query.float(), key) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    n, m = scores.shape[1:]
    here = torch.arange(m - n, m)[:, None]
    there = torch.arange(m)[None]
    hidden = there > here
    if window[0] >= 0:
        hidden |= there < here - window[0]
    return torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, -math.inf).softmax(-1), value).to(
        query.dtype
    )


class Package(ModuleType):
    """A package by name. pages: whether it reads them; broken: adds this to every result.

    windows, softcaps: whether it was built with them. calls: the names of functions as they are called.
    """

    def __init__(
        self,
        name: str,
        *,
        pages: bool = True,
        windows: bool = True,
        softcaps: bool = True,
        broken: float = 0.0,
    ) -> None:
        super().__init__(name)
        self.pages, self.windows, self.softcaps, self.broken = pages, windows, softcaps, broken
        self.calls: list[str] = []

    def flash_attn_func(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, softmax_scale: float, causal: bool,
        window_size: tuple[int, int], softcap: float,
    ) -> torch.Tensor:  # fmt: skip
        """Both packages': `[B, T, H, D]`."""
        self.calls.append("flash_attn_func")
        self._check(q, window_size, softcap, causal=causal)
        parts = zip(q, k, v, strict=True)
        return torch.stack([attend(*p, softmax_scale, window_size, softcap) for p in parts]) + self.broken

    def flash_attn_with_kvcache(
        self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *, cache_seqlens: torch.Tensor,
        page_table: torch.Tensor, cu_seqlens_q: torch.Tensor, max_seqlen_q: int, softmax_scale: float,
        causal: bool, window_size: tuple[int, int], softcap: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Version 3's, with packed queries `[T, H, D]`; some of its builds return two tensors."""
        self.calls.append("flash_attn_with_kvcache")
        self._check(q, window_size, softcap, causal=causal)
        got = self._paged(
            q, k_cache, v_cache, page_table, cu_seqlens_q, cache_seqlens, max_seqlen_q, softmax_scale,
            window_size, softcap,
        )  # fmt: skip
        return got, got.new_zeros(1)

    def flash_attn_varlen_func(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int, *, block_table: torch.Tensor,
        softmax_scale: float, causal: bool, window_size: tuple[int, int], softcap: float,
    ) -> torch.Tensor:  # fmt: skip
        """Version 2's, with pages of multiples of 256 tokens."""
        self.calls.append("flash_attn_varlen_func")
        self._check(q, window_size, softcap, causal=causal)
        if k.shape[1] % 256:
            raise RuntimeError("Paged KV cache block size must be divisible by 256")
        lens = cu_seqlens_k.diff()
        assert cu_seqlens_k.dtype is torch.int32 and int(cu_seqlens_k[0]) == 0
        assert int(lens.max()) == max_seqlen_k
        return self._paged(
            q, k, v, block_table, cu_seqlens_q, lens, max_seqlen_q, softmax_scale, window_size, softcap
        )

    def _paged(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: torch.Tensor, starts: torch.Tensor,
        lens: torch.Tensor, longest: int, scale: float, window: tuple[int, int], softcap: float,
    ) -> torch.Tensor:  # fmt: skip
        if not self.pages:
            raise RuntimeError("This flash attention build does not support paged KV.\nCheck the build.")
        for numbers in (table, starts, lens):
            assert numbers.dtype is torch.int32 and numbers.stride(-1) == 1
        assert int(starts[0]) == 0 and int(starts[-1]) == len(q) and int(starts.diff().max()) == longest
        found = []
        for row, length in enumerate(lens.tolist()):
            pages = table[row, : -(-length // k.shape[1])].long()
            key, value = (part[pages].flatten(0, 1)[:length] for part in (k, v))
            found.append(attend(q[starts[row] : starts[row + 1]], key, value, scale, window, softcap))
        return torch.cat(found) + self.broken

    def _check(self, q: torch.Tensor, window: Any, softcap: float, *, causal: bool) -> None:
        assert causal
        if q.dtype not in (torch.bfloat16, torch.float16):
            raise RuntimeError("FlashAttention only supports fp16 and bf16 data type")
        if window != (-1, -1) and not self.windows:
            raise RuntimeError("This flash attention build does not support local attention.")
        if softcap and not self.softcaps:
            raise RuntimeError("This flash attention build does not support tanh softcapping.")

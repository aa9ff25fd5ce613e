"""FlashAttention-3 and -2, where their packages are installed, and torch's, for rows of several tokens.

Purpose: one face for all; say what a package can't do here.
Does not know: which kernel is faster.
Invariant: no host synchronization. A package's function is used only after results of small steps were
compared (prompt_choice.py).

FlashAttention-3 reads pages of any size, version 2 pages of multiples of 256 tokens. A package that reads no
pages (some are built without) gets a whole prompt's keys and values in one piece. Neither takes sinks here,
nor 8-bit caches. Sources: the interfaces that Dao-AILab/flash-attention documents, `hopper/` for version 3,
and torch.nn.attention.varlen.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from memory_efficient_gpt.attention.context import AttentionOptions, LayerCache, StepContext
from memory_efficient_gpt.attention.prompt_kernels import Piece, PromptRows, prompt_rows

MODULES: Final = {
    "FlashAttention-3": ("flash_attn_interface", "fa3_fwd_interface"),
    "FlashAttention-2": ("flash_attn",),
}
DTYPES: Final = (torch.bfloat16, torch.float16)
_ANY: Final = -1  # a window without an end


class FlashPackage(Protocol):
    """A package's two ways to attend."""

    name: str

    def paged(
        self, query: torch.Tensor, cache: LayerCache, step: PagedRows, options: AttentionOptions
    ) -> torch.Tensor:
        """Causal attention of query `[T, Hq, D]` over the cache's pages: `[T, Hq, D]`."""

    def whole(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """Causal attention of query `[T, Hq, D]` over key and value `[T, Hkv, D]`: `[T, Hq, D]`."""


@dataclass(frozen=True, slots=True)
class PagedRows:
    """Rows of a step for a package. tables `[S, MB]`, starts and context_starts `[S + 1]`, lens `[S]`: int32.

    starts: of a row's queries; context_starts: likewise, if the contexts lay one behind the other.
    """

    tables: torch.Tensor
    starts: torch.Tensor
    lens: torch.Tensor
    context_starts: torch.Tensor
    longest: int
    longest_context: int


class _Installed:
    """A package as a module; both versions attend a whole prompt by the same function."""

    def __init__(self, module: Any) -> None:
        """module: the package's."""
        self._module = module

    def whole(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """See FlashPackage."""
        batch = (part.unsqueeze(0) for part in (query, key, value))
        return _only(self._module.flash_attn_func(*batch, **_settings(options)))[0]


class FlashAttention3(_Installed):
    """By `flash_attn_interface`, built from the package's `hopper` folder."""

    name = "FlashAttention-3"

    def paged(
        self, query: torch.Tensor, cache: LayerCache, step: PagedRows, options: AttentionOptions
    ) -> torch.Tensor:
        """See FlashPackage."""
        return _only(
            self._module.flash_attn_with_kvcache(
                query, cache.key, cache.value, cache_seqlens=step.lens, page_table=step.tables,
                cu_seqlens_q=step.starts, max_seqlen_q=step.longest, **_settings(options),
            )
        )  # fmt: skip


class FlashAttention2(_Installed):
    """By `flash_attn`."""

    name = "FlashAttention-2"

    def paged(
        self, query: torch.Tensor, cache: LayerCache, step: PagedRows, options: AttentionOptions
    ) -> torch.Tensor:
        """See FlashPackage."""
        return _only(
            self._module.flash_attn_varlen_func(
                query, cache.key, cache.value, step.starts, step.context_starts, step.longest,
                step.longest_context, block_table=step.tables, **_settings(options),
            )
        )  # fmt: skip


class TorchFlash:
    """Torch's own build of FlashAttention-2; reads pages where its `varlen_attn` does."""

    name = "torch's flash attention"

    def paged(
        self, query: torch.Tensor, cache: LayerCache, step: PagedRows, options: AttentionOptions
    ) -> torch.Tensor:
        """See FlashPackage. Raises TypeError before torch 2.12."""
        from torch.nn.attention import varlen

        if options.softcap is not None:
            raise NotImplementedError("no softcap")
        attend: Any = varlen.varlen_attn
        left = options.window - 1 if options.window is not None else _ANY
        output: torch.Tensor = attend(
            query, cache.key, cache.value, step.starts, None, step.longest, step.longest_context,
            scale=options.scale, window_size=(left, 0), enable_gqa=True, seqused_k=step.lens,
            block_table=step.tables,
        )  # fmt: skip
        return output

    def whole(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, options: AttentionOptions
    ) -> torch.Tensor:
        """See FlashPackage."""
        if options.softcap is not None or options.window is not None:
            raise NotImplementedError("no window and no softcap")
        q, k, v = (part.transpose(0, 1).unsqueeze(0) for part in (query, key, value))
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            output = scaled_dot_product_attention(
                q, k, v, is_causal=True, scale=options.scale, enable_gqa=True
            )
        return output[0].transpose(0, 1)


@dataclass
class FlashPrompts:
    """Implements PromptKernel. dim: of keys and values, which layers with others are not for.

    pages, windows, softcaps: whether the package reads the cache's pages and computes those. least_whole,
    least_later: tokens from which on it is used for steps of whole prompts, and of chunks that begin later;
    None: never.
    """

    package: FlashPackage
    dim: int
    pages: bool
    windows: bool = True
    softcaps: bool = True
    least_whole: int | None = 0
    least_later: int | None = 0
    name: str = field(init=False, default="")

    def __post_init__(self) -> None:
        self.name = self.package.name

    @property
    def is_used(self) -> bool:
        """Whether there is a size that it is for."""
        return self.least_whole is not None or self.least_later is not None

    def attend(
        self, query: torch.Tensor, cache: LayerCache, context: StepContext, options: AttentionOptions
    ) -> list[Piece] | None:
        """See PromptKernel."""
        rows = prompt_rows(context)
        if rows is None or cache.key.dtype is not query.dtype:
            return None
        if options.window is not None and options.window >= rows.longest_context:
            options = replace(options, window=None)  # it hides nothing
        if not self._takes(rows, cache, options):
            return None
        if self.pages:
            queries = query[rows.start : rows.start + rows.tokens]
            output = self.package.paged(queries, cache, _paged_rows(context, rows), options)
            return [Piece(rows.start, rows.start + rows.tokens, output)]
        found = []
        for row, start, tokens in rows.prompts:
            key, value = (_in_one_piece(kept, context, row, tokens) for kept in (cache.key, cache.value))
            output = self.package.whole(query[start : start + tokens], key, value, options)
            found.append(Piece(start, start + tokens, output))
        return found

    def _takes(self, rows: PromptRows, cache: LayerCache, options: AttentionOptions) -> bool:
        least = self.least_whole if rows.whole else self.least_later if self.pages else None
        return (
            least is not None
            and (rows.longest if self.pages else rows.shortest) >= least  # one call for all, or one for each
            and cache.key.dtype in DTYPES
            and cache.key.shape[3] == cache.value.shape[3] == self.dim
            and (self.windows or options.window is None)
            and (self.softcaps or options.softcap is None)
            and options.sinks is None
            and options.alibi_slopes is None
        )


def installed_packages() -> tuple[list[FlashPackage], list[str]]:
    """Packages that can be imported, the better first; why an installed one can't be."""
    found: list[FlashPackage] = []
    obstacles = []
    for kind in (FlashAttention3, FlashAttention2):
        for name in MODULES[kind.name]:
            try:
                found.append(kind(importlib.import_module(name)))
                break
            except ModuleNotFoundError as error:
                if error.name != name:
                    obstacles.append(f"{kind.name}: {error}")
            except (ImportError, OSError, RuntimeError) as error:  # another torch's, another CUDA's
                obstacles.append(f"{kind.name}: {str(error).splitlines()[0][:120]}")
    return found, obstacles


def _settings(options: AttentionOptions) -> dict[str, Any]:
    window = (options.window - 1, 0) if options.window is not None else (_ANY, _ANY)
    return {
        "softmax_scale": options.scale, "causal": True, "window_size": window,
        "softcap": options.softcap or 0.0,
    }  # fmt: skip


def _only(result: Any) -> torch.Tensor:
    """Some versions also return the logarithms of the sums."""
    output: torch.Tensor = result[0] if isinstance(result, tuple) else result
    return output


def _paged_rows(context: StepContext, rows: PromptRows) -> PagedRows:
    """Those rows for a package, the single tokens between them included; once for all layers."""
    key = ("flash rows", rows)
    if key not in context.derived:
        lens = context.context_lens[rows.first : rows.end]
        starts = lens.new_zeros(len(lens) + 1)
        torch.cumsum(lens, 0, out=starts[1:])
        queries = context.query_starts[rows.first : rows.end + 1]
        context.derived[key] = PagedRows(
            tables=context.block_tables[rows.first : rows.end],
            starts=queries - rows.start if rows.start else queries,
            lens=lens,
            context_starts=starts,
            longest=rows.longest,
            longest_context=rows.longest_context,
        )
    found: PagedRows = context.derived[key]
    return found


def _in_one_piece(kept: torch.Tensor, context: StepContext, row: int, tokens: int) -> torch.Tensor:
    """A row's pages of a cache `[N, BS, H, D]` as `[tokens, H, D]`."""
    blocks = -(-tokens // kept.shape[1])
    key = ("flash pages", row, blocks)
    if key not in context.derived:
        context.derived[key] = context.block_tables[row, :blocks].long()
    return kept[context.derived[key]].flatten(0, 1)[:tokens]

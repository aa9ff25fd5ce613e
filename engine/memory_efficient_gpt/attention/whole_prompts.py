"""Long prompts that a step computes from their first token on, by cuDNN's attention.

Purpose: say which steps it is for, gather such a prompt's keys and values, attend.
Does not know: the other kernels, graphs.
Invariant: no host synchronization. What a step's rows are is known on the host, or it is not for this: so
captured steps never are.

cuDNN's kernel takes keys and values in one piece; copying them there costs a hundredth of what it saves. It
has no causal mask for a chunk that begins later, and no window, softcap or sinks: such steps stay with the
kernels that read pages. Torch makes a plan for each length that cuDNN has not met before, which holds up the
whole engine, so prompts are padded at their end to few lengths; no token of a prompt sees what comes behind.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import pad, scaled_dot_product_attention

from memory_efficient_gpt.attention.context import AttentionOptions, LayerCache, StepContext
from memory_efficient_gpt.attention.prompt_kernels import Piece

LEAST_TOKENS: Final = 2048
"""Measured on an H200, 32 query heads on 8 of keys, heads of 128: 267 to 550 TFLOP/s from there on, where our
own kernel gives 247 to 382; below, the host's calls cost more than is saved."""
LENGTH_STEP: Final = 512
"""Lengths that cuDNN gets are multiples of this."""
_DTYPES: Final = (torch.bfloat16, torch.float16)
_MOST_DIM: Final = 128
_CAPABILITY: Final = (9, 0)
_TRIAL = (4, 2, 96)
_TOLERANCE: Final = 2e-2


@dataclass(frozen=True, slots=True)
class WholePrompt:
    """Tokens start .. end - 1 of a step: row `row`, from its first token."""

    row: int
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class CudnnPrompts:
    """Implements PromptKernel. dim: of keys and values, for which `whole_prompts_obstacle` had none.

    least: tokens of a prompt. step: each is padded to a multiple of it.
    """

    dim: int
    least: int = LEAST_TOKENS
    step: int = LENGTH_STEP
    kernel: SDPBackend = SDPBackend.CUDNN_ATTENTION
    name: str = "cuDNN"

    def attend(
        self, query: torch.Tensor, cache: LayerCache, context: StepContext, options: AttentionOptions
    ) -> list[Piece] | None:
        """See PromptKernel."""
        prompts = whole_prompts(context, cache, options, self.dim, least=self.least)
        return [self._piece(query, cache, context, options, prompt) for prompt in prompts] or None

    def _piece(
        self, query: torch.Tensor, cache: LayerCache, context: StepContext, options: AttentionOptions,
        prompt: WholePrompt,
    ) -> Piece:  # fmt: skip
        tokens = prompt.end - prompt.start
        length = -(-tokens // self.step) * self.step
        pages = _pages(context, prompt, length, cache.key.shape[1])
        key, value = (_in_one_piece(kept, pages, tokens, length) for kept in (cache.key, cache.value))
        rows = query[prompt.start : prompt.end]
        if tokens < length:
            rows = pad(rows, (0, 0, 0, 0, 0, length - tokens))
        with sdpa_kernel(self.kernel):
            result = scaled_dot_product_attention(
                rows.transpose(0, 1).unsqueeze(0), key, value, is_causal=True, scale=options.scale,
                enable_gqa=True,
            )  # fmt: skip
        return Piece(prompt.start, prompt.end, result[0, :, :tokens].transpose(0, 1))


def whole_prompts(
    context: StepContext, cache: LayerCache, options: AttentionOptions, dim: int, *, least: int = LEAST_TOKENS
) -> list[WholePrompt]:
    """The step's prompts, if all rows with several tokens are whole and long; none if any is not."""
    lens, contexts = context.host_query_lens, context.host_context_lens
    if lens is None or contexts is None or cache.key.dtype not in _DTYPES:
        return []
    if cache.key.shape[3] != dim or cache.value.shape[3] != dim:
        return []
    plain = options.softcap is None and options.sinks is None and options.alibi_slopes is None
    if not plain or (options.window is not None and options.window < max(lens)):
        return []
    found, start = [], 0
    for row, (length, seen) in enumerate(zip(lens, contexts, strict=True)):
        if length > 1:
            if length < least or length != seen:
                return []
            found.append(WholePrompt(row, start, start + length))
        start += length
    return found


def whole_prompts_obstacle(
    device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, dim: int
) -> str | None:
    """Why cuDNN can't take long prompts with keys and values of `dim`, or None: a small one is compared."""
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "not measured before compute capability 9.0"
    if dtype not in _DTYPES or cache_dtype is not dtype:
        return f"not for {dtype} with a {cache_dtype} cache"
    if dim > _MOST_DIM:
        return f"heads of {dim}, at most {_MOST_DIM}"
    try:
        difference = _difference(device, dtype, dim)
    except RuntimeError as error:
        return str(error).splitlines()[0][:120]
    return None if difference <= _TOLERANCE else f"its result differs by {difference:.2g}"


def _difference(device: torch.device, dtype: torch.dtype, dim: int) -> float:
    heads, kv_heads, tokens = _TRIAL
    generator = torch.Generator(device).manual_seed(0)
    q, k, v = (
        torch.randn((1, count, tokens, dim), generator=generator, device=device).to(dtype)
        for count in (heads, kv_heads, kv_heads)
    )
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        got = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    with sdpa_kernel(SDPBackend.MATH):
        want = scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True, enable_gqa=True)
    return float((got.float() - want).abs().max())


def _in_one_piece(kept: torch.Tensor, pages: torch.Tensor, tokens: int, length: int) -> torch.Tensor:
    """Those pages of a cache `[N, BS, H, D]` as `[1, H, length, D]`, zero from `tokens` on."""
    rows = kept[pages].flatten(0, 1)[:length]
    rows[tokens:] = 0  # what nobody owns may be NaN, which is not hidden by a weight of zero
    return rows.transpose(0, 1).unsqueeze(0)


def _pages(context: StepContext, prompt: WholePrompt, length: int, block_size: int) -> torch.Tensor:
    """Blocks for `length` tokens `[n] int64`, the prompt's and then the trash block; once for all layers."""
    key = ("whole prompt", prompt)
    if key not in context.derived:
        owned, wanted = (-(-n // block_size) for n in (prompt.end - prompt.start, length))
        table = context.block_tables[prompt.row, :owned].long()
        context.derived[key] = pad(table, (0, wanted - owned))
    pages: torch.Tensor = context.derived[key]
    return pages

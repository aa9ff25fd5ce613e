"""Long prompts that a step computes from their first token on, by cuDNN's attention.

Purpose: say which steps it is for, gather such a prompt's keys and values, attend.
Does not know: the other kernels, graphs.
Invariant: no host synchronization. What a step's rows are is known on the host, or it is not for this: so
captured steps never are.

cuDNN's kernel takes keys and values in one piece; copying them there costs a hundredth of what it saves. It
has no causal mask for a chunk that begins later, and no window, softcap or sinks: such steps stay with the
kernels that read pages.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from memory_efficient_gpt.attention.context import AttentionOptions, LayerCache, StepContext

LEAST_TOKENS: Final = 2048
"""Measured on an H200, 32 query heads on 8 of keys, heads of 128: 267 to 550 TFLOP/s from there on, where our
own kernel gives 247 to 382; below, the host's calls cost more than is saved."""
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


def whole_prompts(
    context: StepContext, cache: LayerCache, options: AttentionOptions, *, least: int = LEAST_TOKENS
) -> list[WholePrompt]:
    """The step's prompts, if all rows with several tokens are whole and long; none if any is not."""
    lens, contexts = context.host_query_lens, context.host_context_lens
    if lens is None or contexts is None or cache.key.dtype not in _DTYPES:
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


def attend_whole(
    query: torch.Tensor,
    cache: LayerCache,
    context: StepContext,
    options: AttentionOptions,
    out: torch.Tensor,
    prompts: list[WholePrompt],
    *,
    kernel: SDPBackend = SDPBackend.CUDNN_ATTENTION,
) -> None:
    """Write the outputs of those tokens into out `[T, Hq, Dv]`; query `[T, Hq, Dk]`, the cache is written."""
    for prompt in prompts:
        pages = _pages(context, prompt, cache.key.shape[1])
        key, value = (
            kept[pages].flatten(0, 1)[: prompt.end - prompt.start].transpose(0, 1).unsqueeze(0)
            for kept in (cache.key, cache.value)
        )
        rows = query[prompt.start : prompt.end].transpose(0, 1).unsqueeze(0)
        with sdpa_kernel(kernel):
            result = scaled_dot_product_attention(
                rows, key, value, is_causal=True, scale=options.scale, enable_gqa=True
            )
        out[prompt.start : prompt.end] = result[0].transpose(0, 1)


def whole_prompts_obstacle(
    device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, largest_dim: int
) -> str | None:
    """Why cuDNN can't take a model's long prompts, or None: its result on a small one is compared."""
    if torch.cuda.get_device_capability(device) < _CAPABILITY:
        return "not measured before compute capability 9.0"
    if dtype not in _DTYPES or cache_dtype is not dtype:
        return f"not for {dtype} with a {cache_dtype} cache"
    if largest_dim > _MOST_DIM:
        return f"heads of {largest_dim}, at most {_MOST_DIM}"
    try:
        difference = _difference(device, dtype, largest_dim)
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


def _pages(context: StepContext, prompt: WholePrompt, block_size: int) -> torch.Tensor:
    """The prompt's blocks `[n] int64`, once for all layers."""
    key = ("whole prompt", prompt)
    if key not in context.derived:
        count = -(-(prompt.end - prompt.start) // block_size)
        context.derived[key] = context.block_tables[prompt.row, :count].long()
    pages: torch.Tensor = context.derived[key]
    return pages

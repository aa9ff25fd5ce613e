"""Which attention backend a device gets, and why.

Purpose: choose once, at load.
Does not know: models.
Invariant: the choice comes with a reason; a fallback is logged.
"""

from __future__ import annotations

import logging

import torch

from memory_efficient_gpt.attention.context import AttentionBackend

logger = logging.getLogger(__name__)


def choose_backend(
    device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, *, largest_dim: int, native: bool,
    deterministic: bool = False,
) -> tuple[AttentionBackend, str]:  # fmt: skip
    """The best backend that works on `device`, with the reason for it.

    dtype: the queries'; cache_dtype: the KV pool's; largest_dim: of keys and values. native: whether own
    kernels may be used. deterministic: whether a token's output may not depend on how its sequence is cut.
    """
    from memory_efficient_gpt.attention.torch_backend import TorchBackend

    if not native:
        return TorchBackend(), "attention by torch: native kernels are switched off"
    if device.type != "cpu":
        from memory_efficient_gpt.attention.triton import obstacle

        if (reason := obstacle(device, dtype, cache_dtype, largest_dim)) is None:
            return _triton_backend(device, dtype, cache_dtype, largest_dim, deterministic=deterministic)
        logger.warning("attention by torch: %s", reason)
        return TorchBackend(), f"attention by torch: {reason}"
    from memory_efficient_gpt.attention.cpu import NativeCPUBackend
    from memory_efficient_gpt.native.build import Unavailable

    backend = NativeCPUBackend.create(dtype, cache_dtype)
    if isinstance(backend, Unavailable):
        reason = f"attention by torch: {backend.reason}"
        logger.warning(reason)
        return TorchBackend(), reason
    return backend, "attention by native C++ kernels"


def _triton_backend(
    device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, largest_dim: int, *,
    deterministic: bool,
) -> tuple[AttentionBackend, str]:  # fmt: skip
    """With cuDNN for long prompts where it is ahead."""
    from memory_efficient_gpt.attention.triton import TritonBackend
    from memory_efficient_gpt.attention.whole_prompts import LEAST_TOKENS, whole_prompts_obstacle

    if deterministic:
        return TritonBackend(deterministic=True), "attention by Triton kernels, each token as if decoded"
    reason = whole_prompts_obstacle(device, dtype, cache_dtype, largest_dim)
    if reason is not None:
        return TritonBackend(), f"attention by Triton kernels (no long prompts by cuDNN: {reason})"
    who = f"attention by Triton kernels, of whole prompts from {LEAST_TOKENS:,} tokens on by cuDNN"
    return TritonBackend(cudnn_dim=largest_dim), who

"""Which attention backend a device gets, and why.

Purpose: choose once, at load.
Does not know: models.
Invariant: the choice comes with a reason; a fallback is logged.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from memory_efficient_gpt.attention.context import AttentionBackend
from memory_efficient_gpt.kv_cache.geometry import LayerKV

logger = logging.getLogger(__name__)


def choose_backend(
    device: torch.device, dtype: torch.dtype, cache_dtype: torch.dtype, *,
    layers: Sequence[LayerKV], block_size: int, native: bool, deterministic: bool = False,
) -> tuple[AttentionBackend, str]:  # fmt: skip
    """The best backend that works on `device`, with the reason for it.

    dtype: the queries'; cache_dtype: the KV pool's. native: whether own kernels may be used. deterministic:
    whether a token's output may not depend on how its sequence is cut.
    """
    from memory_efficient_gpt.attention.torch_backend import TorchBackend

    largest_dim = max(max(layer.key_dim, layer.value_dim) for layer in layers)
    if not native:
        return TorchBackend(), "attention by torch: native kernels are switched off"
    if device.type != "cpu":
        from memory_efficient_gpt.attention.triton import obstacle

        if (reason := obstacle(device, dtype, cache_dtype, largest_dim)) is None:
            if deterministic:
                who = "attention by Triton kernels, each token as if decoded"
                return _triton_backend(deterministic=True), who
            return _with_prompt_kernels(device, dtype, cache_dtype, layers, block_size)
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


def _with_prompt_kernels(
    device: torch.device,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    layers: Sequence[LayerKV],
    block_size: int,
) -> tuple[AttentionBackend, str]:
    """Triton's kernels, and others for prompts where they are ahead."""
    from memory_efficient_gpt.attention.prompt_choice import Trial, choose_prompt_kernels
    from memory_efficient_gpt.attention.whole_prompts import (
        LEAST_TOKENS,
        CudnnPrompts,
        whole_prompts_obstacle,
    )

    trial = Trial(_triton_backend(), layers, block_size, dtype, device)
    reason = whole_prompts_obstacle(device, dtype, cache_dtype, trial.dim)
    who = "attention by Triton kernels"
    if reason is None:
        cudnn = CudnnPrompts(trial.dim)
        who += f", of whole prompts from {LEAST_TOKENS:,} tokens on by cuDNN"
    else:
        cudnn = None
        who += f" (no long prompts by cuDNN: {reason})"
    if cache_dtype is not dtype:
        return _triton_backend(), who
    kernels, notes = choose_prompt_kernels(trial, cudnn)
    return _triton_backend(prompt_kernels=kernels), "; ".join((who, *notes))


def _triton_backend(**options: Any) -> AttentionBackend:
    from memory_efficient_gpt.attention.triton import TritonBackend

    return TritonBackend(**options)

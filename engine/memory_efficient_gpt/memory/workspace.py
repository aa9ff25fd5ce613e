"""What a model's process takes beside weights and KV cache.

Purpose: an allowance for its private memory, from measured worker processes.
Does not know: weights' schemes, the pool.
Invariant: what workers share with the process that they are forked from is in no model's figure, but once
in SERVER_BYTES: an unloaded model gives back its own part only.

Measured on Linux with torch 2.13 for CPUs, from /proc/PID/smaps_rollup and status:

    an idle worker            313 MB resident; 35 to 38 MB its own (bundled models, a random one of 75M)
    all but the workers       610 MB: a server and its fork server, what they share counted once
    quantized while loading   up to 30 MB more, which the allocator keeps
    a step of 2,048 tokens    34, 107 and 71 MB in bfloat16 for widths (hidden + inner size) of 896, 2,816
                              and 1,920: ten numbers for each token and unit of width are 37, 115 and 79
    sampling 64 sequences     with top_p from 128,256 tokens about 140 MB: logits in float32, sorted, indices

Over a run of 64 requests of 256 tokens all that took 57, 105 and 228 MB; the allowance is 111, 218 and 280.
On CUDA torch alone took 0.31 to 0.37 GB beside weights and cache of an 8B model with 32 sequences, for which
the formula gives 0.82; what the context and libraries take there is assumed, not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch

from memory_efficient_gpt.quantization.layers import Layer

SERVER_BYTES: Final = 610_000_000
"""A server without its workers, on the host."""
WORKER_BYTES: Final = 70_000_000
"""A worker's own host memory before its first step."""
CUDA_CONTEXT_BYTES: Final = 700_000_000
"""Of a process that uses a GPU, on the GPU."""
_NUMBERS_PER_WIDTH: Final = 10
_SAMPLING_BYTES: Final = 16
"""For each logit of a step that is sampled from."""


def workspace_bytes(
    layers: Sequence[Layer],
    *,
    dtype: torch.dtype,
    device: torch.device,
    step_tokens: int,
    num_seqs: int,
    num_experts_per_token: int,
) -> int:
    """An allowance for the process and its largest step, of `step_tokens` tokens and `num_seqs` sequences."""
    widest = max((sum(_sides(layer, num_experts_per_token)) for layer in layers), default=0)
    vocabulary = max((layer.shape[0] for layer in layers if layer.role == "head"), default=0)
    activations = _NUMBERS_PER_WIDTH * widest * step_tokens * dtype.itemsize
    sampling = vocabulary * num_seqs * _SAMPLING_BYTES
    return process_bytes(device) + activations + sampling


def process_bytes(device: torch.device) -> int:
    """What a process takes on `device` before it has a model."""
    return CUDA_CONTEXT_BYTES if device.type == "cuda" else WORKER_BYTES


def _sides(layer: Layer, num_experts_per_token: int) -> tuple[int, int]:
    """Outputs and inputs that a token has in a layer; none in embedding and head."""
    if layer.role == "linear":
        return layer.shape
    if layer.role != "experts":
        return 0, 0
    outputs = layer.holders[0][0].get_parameter(layer.parameter or "weight").shape[1]
    return outputs * num_experts_per_token, layer.shape[1] * num_experts_per_token

"""Which kernels a model's layers may get, by the device they are on.

Purpose: the native C++ kernels on the CPU, Triton's on CUDA, or the reason why there are none.
Does not know: which layers take them.
Invariant: Triton's are imported only where they can run.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from memory_efficient_gpt.fusion.structures import device_of
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.layers import LayerKernels
from memory_efficient_gpt.native.ops import load_kernels
from memory_efficient_gpt.triton_kernels.availability import triton_obstacle


def kernels_for(model: nn.Module, *, deterministic: bool = False) -> LayerKernels | Unavailable:
    """Kernels for the device of the model's first weight.

    deterministic: a row's result may not depend on the number of rows. The CPU's never does.
    """
    device = device_of(model)
    if device.type == "cpu":
        return load_kernels()
    return triton_layer_kernels(device, deterministic=deterministic)


def triton_layer_kernels(device: torch.device, *, deterministic: bool = False) -> LayerKernels | Unavailable:
    """Triton's, if they can run on `device`."""
    reason = triton_obstacle(device)
    return _triton(deterministic) if reason is None else Unavailable(reason)


@functools.cache
def _triton(deterministic: bool) -> LayerKernels:
    """One object of each kind a process: classes of fused layers belong to it."""
    from memory_efficient_gpt.triton_kernels.layers import TritonKernels

    return TritonKernels(deterministic=deterministic)

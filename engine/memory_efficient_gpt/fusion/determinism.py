"""What in a prepared model lets a token's numbers depend on what is computed beside it.

Purpose: name it, by looking at layers and by a trial; refuse `deterministic` where there is any.
Does not know: architectures' names, kernels, the scheduler.
Invariant: the model is not changed.

Layers are looked at because a trial can't try every number of rows; the trial is made because code between
layers is the model's own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from memory_efficient_gpt.attention.context import AttentionBackend
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.fusion.determinism_trial import try_determinism
from memory_efficient_gpt.fusion.kernels import kernels_for
from memory_efficient_gpt.fusion.merged_linear import DenseProduct, MergedLinear
from memory_efficient_gpt.fusion.structures import stack_of
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.deferral import DeferredKind
from memory_efficient_gpt.native.layers import LayerKernels, NativeConv1D, NativeLinear
from memory_efficient_gpt.quantization.bitsandbytes_linear import bitsandbytes_modules
from memory_efficient_gpt.quantization.experts import QuantizedStack
from memory_efficient_gpt.quantization.fp8 import keeps_one_order
from memory_efficient_gpt.quantization.modules import QuantizedEmbedding, QuantizedModule
from memory_efficient_gpt.triton_kernels.packing import TritonWeight

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BACKENDS: Final = ("triton", "cpu-native")
_REMEDIES: Final = {"cuda": "dtype bfloat16 or a quantization", "cpu": "dtype bfloat16, int8 or int4"}
_STACKS: Final = ("gate_up_proj", "down_proj")


def require_determinism(
    name: str,
    model: PreTrainedModel,
    layers: Sequence[LayerKV],
    backend: AttentionBackend,
    device: torch.device,
    kv_dtype: torch.dtype,
    block_size: int,
    defers: frozenset[DeferredKind] = frozenset(),
) -> None:
    """Raises ConfigError with all that stands in the way. name: the model's. See try_determinism."""
    kernels = kernels_for(model, deterministic=True)
    reasons = product_obstacles(model, None if isinstance(kernels, Unavailable) else kernels)
    if backend.name not in _BACKENDS:
        reasons.append("attention is by torch")
    if not reasons:
        changed = try_determinism(model, layers, backend, device, kv_dtype, block_size, defers)
        reasons += [f"the model's logits changed in their last bits, {changed}"] if changed else []
    if reasons:
        raise ConfigError(
            [f"{name} can't be deterministic on {device.type}: {'; '.join(reasons)}. "
             f"Try {_REMEDIES[device.type]}, or switch deterministic off."]
        )  # fmt: skip


def product_obstacles(model: nn.Module, kernels: LayerKernels | None) -> list[str]:
    """What layers take their sums in an order that may depend on the number of rows; empty if none does.

    kernels: those that the model's layers were given; None: none.
    """
    counts = Counter(reason for module in model.modules() if (reason := _obstacle(module, kernels)))
    reasons = [f"{count} {reason}" for reason, count in sorted(counts.items())]
    return [*reasons, "bitsandbytes multiplies some layers"] if bitsandbytes_modules(model) else reasons


def _obstacle(module: nn.Module, kernels: LayerKernels | None) -> str | None:
    if isinstance(module, QuantizedStack) or any(_is_stack(module, name) for name in _STACKS):
        return "layers of routed experts"
    if isinstance(module, QuantizedEmbedding) or type(module).__module__.startswith(
        "torch.nn.modules.sparse"
    ):
        return None
    if isinstance(module, QuantizedModule):
        return _quantized_obstacle(module)
    if isinstance(module, NativeLinear | NativeConv1D):
        return None if module.native_kernels.deterministic else "linear layers were fused for speed only"
    if isinstance(module, MergedLinear) and isinstance(module, nn.Linear):
        product = module.merged_product
        own = isinstance(product, DenseProduct) and product.deterministic and kernels is not None
        if own and kernels is not None and kernels.multiplies(module.weight):
            return None
        if isinstance(product, DenseProduct) and not product.deterministic:
            return "layers were merged for speed before (load anew)"
    if isinstance(module, nn.Embedding):
        return None
    weights = [p for p in module.parameters(recurse=False) if p.dim() > 1]
    if not weights:
        return None
    dtype = str(weights[0].dtype).removeprefix("torch.")
    what = "linear layers" if isinstance(module, nn.Linear) else f"{type(module).__name__} layers"
    return f"{what} are multiplied by other libraries in {dtype}"


def _is_stack(module: nn.Module, name: str) -> bool:
    stack = stack_of(module, name)
    return stack is not None and len(stack.shape) > 2


def _quantized_obstacle(module: QuantizedModule) -> str | None:
    packed = module.packed_weight
    if isinstance(packed, TritonWeight):
        return None if packed.deterministic else "quantized layers were packed for speed before (load anew)"
    fixed = packed is not None and module.native_kernels is not None
    if module.scheme.dynamic:
        fixed = module.deterministic and keeps_one_order(module.quantized_weight)
    return None if fixed else "quantized layers are multiplied by torch"

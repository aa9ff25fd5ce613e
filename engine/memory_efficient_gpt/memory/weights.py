"""Bytes of a model's weights, from its architecture alone.

Purpose: build the model on the meta device, apply schemes layer by layer, count.
Does not know: folders, KV caches, what an engine takes besides.
Invariant: layouts are asked, not imitated: each weight is packed on the meta device by the functions that
pack real ones, so padding is counted as it is there.
"""

from __future__ import annotations

import copy
import functools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from memory_efficient_gpt.device_reads import AHEAD_BYTES
from memory_efficient_gpt.fusion.structures import KINDS
from memory_efficient_gpt.native.layers import NativeExperts
from memory_efficient_gpt.native.packed_weight import BLOCK, pack
from memory_efficient_gpt.quantization.checkpoint import empty_weight
from memory_efficient_gpt.quantization.layers import Layer, find_layers
from memory_efficient_gpt.quantization.naming import inner_schemes, name_of
from memory_efficient_gpt.quantization.rounding import PART_ELEMENTS
from memory_efficient_gpt.quantization.scheme import UNQUANTIZED, Scheme
from memory_efficient_gpt.quantization.triton_weights import code_of
from memory_efficient_gpt.triton_kernels import packing

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

Layout = Literal["stored", "native", "triton"]
"""In which weights are kept: storage.py's, the native CPU kernels', the Triton kernels'."""

_META = torch.device("meta")
_BNB_TABLE_BYTES = 64
"""The 16 float32 values that 4-bit codes stand for."""
_BNB_NESTED_BYTES = 256 * 4 + 4
"""The values that nested scales' codes stand for, and their offset."""
_SEARCH_BYTES = 12
"""For each weight of those that are quantized together by torch: float32 copies, measured on an H100."""


@dataclass(slots=True)
class Architecture:
    """A model without weights: its parameters' sizes, and which of them can be quantized.

    dtype: in which they are computed with. is_converted: whether the checkpoint has them in another one.
    """

    model: PreTrainedModel
    layers: list[Layer]
    float_bytes: int
    dtype: torch.dtype
    is_converted: bool


def build_architecture(config: PreTrainedConfig, dtype: torch.dtype) -> Architecture:
    """The causal language model that `config` describes, as loading would make it in `dtype`.

    Nothing is allocated; `config` is left as it is.
    """
    from transformers import AutoModelForCausalLM

    is_converted = getattr(config, "dtype", None) not in (dtype, str(dtype).removeprefix("torch."))
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    from_config: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model: PreTrainedModel = from_config(config, dtype=dtype)
    wide = _kept_wide(model, dtype)
    num_bytes = sum(
        p.numel() * (4 if wide is not None and wide.search(name) else dtype.itemsize)
        for name, p in model.named_parameters()
    )
    return Architecture(model, find_layers(model), num_bytes, dtype, is_converted)


def quantized_bytes(
    architecture: Architecture, plan: Mapping[str, Scheme], layout: Layout, *, pack_experts: bool = True
) -> int:
    """Bytes of all weights if `plan` (scheme by layer name) is applied and kernels want `layout`.

    pack_experts: whether native kernels take stacks of experts too.
    """
    total = architecture.float_bytes
    for layer in architecture.layers:
        scheme = plan.get(layer.name, UNQUANTIZED)
        if scheme.kind == "none":
            continue
        weight = layer.weight()
        kept = layout == "native" and layer.role == "experts" and not (pack_experts and _packs(layer))
        total += _layer_bytes(scheme, layer.shape, "stored" if kept else layout)
        total -= weight.numel() * weight.element_size()
    return total


def peak_while_quantizing(architecture: Architecture, plan: Mapping[str, Scheme], num_bytes: int) -> int:
    """Bytes on a GPU at the worst moment, which is assumed at the end, when `num_bytes` are there already.

    Besides them: the largest float weight, those that are read ahead, and the search for codes.
    """
    sizes = [n * k for layer in architecture.layers if layer.name in plan for n, k in (layer.shape,)]
    largest = max(sizes, default=0)
    floats = min(architecture.float_bytes, 2 * largest * architecture.dtype.itemsize + AHEAD_BYTES)
    return num_bytes + floats + _SEARCH_BYTES * min(largest, PART_ELEMENTS)


def name_of_plan(layers: Sequence[Layer], plan: Mapping[str, Scheme]) -> str | None:
    """What people will call its storage; embedding and head count only where nothing else is quantized."""
    inner, total = Counter[Scheme](), Counter[Scheme]()
    for layer in layers:
        scheme = plan.get(layer.name, UNQUANTIZED)
        if scheme.kind == "none":
            continue
        size = layer.shape[0] * layer.shape[1]
        total[scheme] += size
        inner[scheme] += size * (layer.role not in ("embedding", "head"))
    return name_of(inner_schemes(inner, total))


def _kept_wide(model: nn.Module, dtype: torch.dtype) -> re.Pattern[str] | None:
    """The names of parameters that transformers keeps in float32 whatever is asked for."""
    plan: dict[str, torch.dtype] = getattr(model, "_get_dtype_plan", lambda _: {})(dtype)
    patterns = [name.replace("*", ".*") for name, kept in plan.items() if kept is torch.float32]
    return re.compile("|".join(patterns)) if patterns else None


def _packs(layer: Layer) -> bool:
    """Whether native kernels take the experts, and every one begins a block of their layout."""
    experts = layer.holders[0][0]
    recognised = any(kind.layer is NativeExperts and kind.recognise(experts) is not None for kind in KINDS)
    return recognised and experts.get_parameter(layer.parameter or "weight").shape[1] % BLOCK == 0


@functools.lru_cache(maxsize=1024)
def _layer_bytes(scheme: Scheme, shape: tuple[int, int], layout: Layout) -> int:
    n, k = shape
    if scheme.by_bitsandbytes:
        return _bitsandbytes_bytes(scheme, n, k)
    stored = empty_weight(scheme, (n, k), _META)
    if layout == "native" and scheme.kind == "int":
        codes = torch.empty(n, k, dtype=torch.uint8, device=_META)
        packed = pack(
            codes, stored.scales, stored.offsets, 1.0, bits=scheme.bits, group_size=scheme.group_size
        )
        tensors = (packed.codes, packed.scales, packed.offsets)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)
    triton = layout == "triton" and scheme.kind in ("int", "fp8") and not scheme.dynamic
    if triton and packing.obstacle(code_of(scheme), scheme.group_size) is None:
        codes = torch.empty(n, k, dtype=torch.uint8, device=_META)
        return packing.pack(
            code_of(scheme), codes, stored.scales, stored.offsets, 1.0, group_size=scheme.group_size
        ).num_bytes
    return stored.num_bytes


def _bitsandbytes_bytes(scheme: Scheme, n: int, k: int) -> int:
    bits = scheme.bits_per_weight(n, k) * n * k
    tables = (_BNB_TABLE_BYTES if scheme.bits == 4 else 0) + (_BNB_NESTED_BYTES if scheme.nested else 0)
    return round(bits / 8) + tables

"""Schemes of checkpoints that are quantized already, from their descriptions and headers.

Purpose: a plan (scheme by layer) for a folder of ours or of another library; bytes where there is no plan.
Does not know: what is planned for float weights, KV caches.
Invariant: headers are read, weights never; what loading refuses by the description is refused here too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from memory_efficient_gpt.memory.weights import Architecture
from memory_efficient_gpt.quantization import bitsandbytes
from memory_efficient_gpt.quantization.checkpoint import prepare_empty
from memory_efficient_gpt.quantization.description import METHOD, read_description
from memory_efficient_gpt.quantization.foreign import format_of
from memory_efficient_gpt.quantization.foreign.conversion import find_quantized
from memory_efficient_gpt.quantization.foreign.placement import ModelNames
from memory_efficient_gpt.quantization.foreign.tensor_files import LayerTensors, TensorFiles
from memory_efficient_gpt.quantization.scheme import FP8, Scheme

_BITS: Final = {
    "I64": 64, "F32": 32, "I32": 32, "U32": 32, "F16": 16, "BF16": 16, "I16": 16, "I8": 8, "U8": 8,
    "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
}  # fmt: skip
_FLOATS: Final = ("F32", "F16", "BF16")
_CODES: Final = ("qweight", "weight_packed", "weight")
_SCALES: Final = ("scales", "weight_scale")
_BNB_STATISTICS: Final = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB")
_MOST_OF_FOUR_BITS: Final = 6
"""Stored bits a weight up to which codes become 4-bit ones: words may be padded."""


def stored_plan(
    settings: Mapping[str, Any], files: Sequence[Path], architecture: Architecture
) -> dict[str, Scheme] | None:
    """Scheme by layer name of a checkpoint with such a `quantization_config`; None for one without a plan.

    Raises CheckpointError or UnsupportedModelError for what cannot be loaded.
    """
    if settings.get("quant_method") == METHOD:
        return _own_plan(settings, architecture)
    layer_format = format_of(settings)
    if layer_format is None:
        return None
    names, plan = ModelNames(architecture.model), dict[str, Scheme]()
    with TensorFiles(files) as opened:
        for tensors in find_quantized(opened, layer_format).values():
            place = names.place(tensors.name)
            if place is not None and place.layer is not None:
                plan[place.layer.name] = _scheme_of(tensors, place.shape, settings)
    return plan


def check_own_description(settings: Mapping[str, Any], architecture: Architecture) -> None:
    """Raises CheckpointError for a folder of ours that does not fit. Quantizes `architecture.model`."""
    if settings.get("quant_method") == METHOD:
        prepare_empty(architecture.model, settings)


def title_of(settings: Mapping[str, Any]) -> str:
    """The name of another library's format, for people."""
    if bitsandbytes.describes(settings):
        return "bitsandbytes"
    return str(settings.get("quant_method"))


def header_bytes(files: Sequence[Path], dtype: torch.dtype) -> int:
    """Bytes of the weights in files of bitsandbytes: codes and their statistics as stored, others in `dtype`.

    Raises CheckpointError for a file that cannot be opened.
    """
    total = 0
    with TensorFiles(files) as opened:
        for name in opened:
            own_name = name.rpartition(".")[2]
            if ".quant_state." in name or own_name == "weight_format":
                continue
            stored = opened.dtype(name)
            plain = stored in _FLOATS and own_name not in _BNB_STATISTICS
            bits = dtype.itemsize * 8 if plain else _BITS.get(stored, 8)
            total += math.prod(opened.shape(name)) * bits // 8
    return total


def _own_plan(settings: Mapping[str, Any], architecture: Architecture) -> dict[str, Scheme]:
    modules = read_description(settings, str(architecture.model.config.name_or_path)).modules
    return {
        layer.name: modules[name] for layer in architecture.layers for name in layer.names if name in modules
    }


def _scheme_of(tensors: LayerTensors, shape: tuple[int, int], settings: Mapping[str, Any]) -> Scheme:
    """What the layer's codes become in our layout, by the shapes of its tensors."""
    n, k = shape
    codes = next((name for name in _CODES if name in tensors), _CODES[-1])
    stored = tensors.dtype(codes)
    if stored == "F8_E4M3":
        return FP8
    stored_bits = math.prod(tensors.shape(codes)) * _BITS.get(stored, 8) / (n * k)
    bits = 4 if stored_bits <= _MOST_OF_FOUR_BITS else 8
    scales = math.prod(tensors.shape(next((name for name in _SCALES if name in tensors), _SCALES[0])))
    symmetric = _is_symmetric(tensors, settings)
    if scales < n:
        return Scheme("int", bits, symmetric, "tensor")
    if (groups := scales // n) == 1:
        return Scheme("int", bits, symmetric, "channel")
    size = settings.get("group_size")
    if not isinstance(size, int) or size <= 0 or -(-k // size) != groups:
        size = -(-k // groups)
    return Scheme("int", bits, symmetric, "group", size)


def _is_symmetric(tensors: LayerTensors, settings: Mapping[str, Any]) -> bool:
    """Whether there will be no offsets: by what the writer says, since zero points are not read."""
    if "qzeros" in tensors:
        return bool(settings.get("sym", not settings.get("zero_point", True)))
    return "weight_zero_point" not in tensors

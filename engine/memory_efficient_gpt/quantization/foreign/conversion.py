"""A checkpoint's tensors as a state dict of our own quantized format.

Purpose: convert quantized layers one at a time, pass all else through, account for every tensor.
Does not know: how a model is built from the result.
Invariant: every tensor is converted, passed through, or dropped for a stated reason; what is left of a
layer whose main tensor is gone is an error that names both.
"""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import torch

from memory_efficient_gpt.errors import CheckpointError, UnsupportedModelError
from memory_efficient_gpt.quantization.foreign.formats import LayerFormat
from memory_efficient_gpt.quantization.foreign.placement import ModelNames, Place
from memory_efficient_gpt.quantization.foreign.raw_weight import RawWeight, concatenate
from memory_efficient_gpt.quantization.foreign.tensor_files import LayerTensors, TensorFiles
from memory_efficient_gpt.quantization.modules import PREFIX
from memory_efficient_gpt.quantization.reordered import ORDER_NAME
from memory_efficient_gpt.quantization.storage import QuantizedWeight

logger = logging.getLogger(__name__)

_BIAS: Final = "bias"
_NOT_FLOAT: Final = ("I8", "U8", "I16", "I32", "F8_E4M3", "F8_E5M2")


@dataclass(slots=True)
class Converted:
    """A state dict, and what `checkpoint.prepare_empty` must know to make modules for it.

    modules: scheme by module; reordered: those with an input order.
    """

    state: dict[str, torch.Tensor] = field(default_factory=dict)
    modules: dict[str, str] = field(default_factory=dict)
    reordered: list[str] = field(default_factory=list)


def find_quantized(files: TensorFiles, layer_format: LayerFormat) -> dict[str, LayerTensors]:
    """The quantized layers of a checkpoint by name.

    Raises CheckpointError for tensors of a quantized layer without its main one, UnsupportedModelError for
    tensors of such a layer that the format does not have.
    """
    found: dict[str, LayerTensors] = {}
    for marker in reversed(layer_format.markers):
        for name in files:
            layer, _, own_name = name.rpartition(".")
            if own_name == marker:
                found[layer] = LayerTensors(files, layer, marker)
    known = layer_format.own_names | {_BIAS}
    telling = layer_format.own_names - {"weight"}
    for name in files:
        layer, _, own_name = name.rpartition(".")
        orphaned = own_name in telling or (own_name == "weight" and files.dtype(name) in _NOT_FLOAT)
        if orphaned and layer not in found:
            expected = " or ".join(f"{layer}.{marker}" for marker in layer_format.markers)
            raise CheckpointError(f"{files.path(name)}: {expected} is missing, {name} is there.")
        if own_name not in known and layer in found:
            raise UnsupportedModelError(
                f"{layer_format.title} checkpoint: {name} in {files.path(name)} is not a tensor of the "
                f"format as supported ({', '.join(sorted(known))})."
            )
    return found


def convert(
    files: TensorFiles,
    layers: Mapping[str, LayerTensors],
    layer_format: LayerFormat,
    names: ModelNames,
    dtype: torch.dtype,
) -> Converted:
    """Convert `layers` and pass all other tensors of `files` through. `dtype`: of layers that stay float."""
    result = Converted()
    stacks: dict[str, dict[tuple[int, int], tuple[LayerTensors, Place]]] = defaultdict(dict)
    unused: dict[str, None] = {}
    for tensors in layers.values():
        place = names.place(tensors.name)
        if place is None:
            unused[tensors.name] = None
        elif place.expert is not None:
            stacks[place.module][place.expert, place.part] = tensors, place
        else:
            _add_layer(result, tensors, place, layer_format, dtype)
    if unused:
        some = ", ".join(list(unused)[:3])
        logger.warning("%d quantized layers are not used by this architecture: %s", len(unused), some)
    for parts in stacks.values():
        _add_stack(result, parts, layer_format)
    for name in files:
        layer, _, own_name = name.rpartition(".")
        if layer not in layers and own_name not in layer_format.ignored:
            result.state[name] = files.read(name)
        elif own_name == _BIAS and layer in layers and layer not in unused:
            _add_bias(result, files, name, names)
    return result


def _add_layer(
    result: Converted, tensors: LayerTensors, place: Place, layer_format: LayerFormat, dtype: torch.dtype
) -> None:
    raw = _read(tensors, place, layer_format)
    weight = raw.quantized()
    if place.layer is None:  # too small to be worth codes, or a router: exact in float
        if place.class_name not in ("Linear", "Embedding"):
            raise UnsupportedModelError(
                f"{layer_format.title} checkpoint: {tensors.name} is a quantized {place.class_name}. "
                "Supported are linear layers, embeddings and experts."
            )
        float_weight = weight.dequantize(dtype)
        if raw.order is not None:
            float_weight = float_weight[:, raw.order.argsort()]
        result.state[f"{place.module}.weight"] = float_weight
        return
    if raw.order is not None:
        if place.class_name != "Linear":
            raise UnsupportedModelError(
                f"{layer_format.title} checkpoint: {tensors.name}, a {place.class_name}, has activation "
                "order (desc_act). Supported is that for linear layers: quantize without it."
            )
        result.reordered.append(place.module)
        result.state[f"{place.module}.{ORDER_NAME}"] = raw.order.int()
    _add_weight(result, place.module, weight)


def _add_weight(result: Converted, module: str, weight: QuantizedWeight) -> None:
    result.modules[module] = str(weight.scheme)
    for name, tensor in weight.tensors().items():
        result.state[f"{module}.{PREFIX}{name}"] = tensor


def _add_stack(
    result: Converted,
    parts: Mapping[tuple[int, int], tuple[LayerTensors, Place]],
    layer_format: LayerFormat,
) -> None:
    """The experts of one module as one weight, an expert's parts below each other."""
    first, place = next(iter(parts.values()))
    assert place.layer is not None, "experts are layers"
    num_experts = place.layer.shape[0] // (place.shape[0] * place.num_parts)
    raws: list[RawWeight] = []
    for expert in range(num_experts):
        for part in range(place.num_parts):
            if (expert, part) not in parts:
                raise CheckpointError(
                    f"{first.path}: {first.name} is quantized, and part {part} of expert {expert} of "
                    f"{place.module} is missing or is not."
                )
            tensors, own_place = parts[expert, part]
            raw = _read(tensors, own_place, layer_format)
            _refuse_unlike(tensors, raw, raws[0] if raws else raw, layer_format)
            raws.append(raw)
    _add_weight(result, place.module, concatenate(raws).quantized())


def _refuse_unlike(
    tensors: LayerTensors, raw: RawWeight, first: RawWeight, layer_format: LayerFormat
) -> None:
    what = None
    if raw.order is not None:
        what = "activation order (desc_act)"
    elif (raw.bits, raw.group_size, raw.zeros is None) != (first.bits, first.group_size, first.zeros is None):
        what = f"{raw.bits} bits in groups of {raw.group_size}, others {first.bits} in {first.group_size}"
    if what is not None:
        raise UnsupportedModelError(
            f"{layer_format.title} checkpoint: expert {tensors.name} has {what}. Supported are experts in "
            "the order of their inputs that are all quantized alike."
        )


def _read(tensors: LayerTensors, place: Place, layer_format: LayerFormat) -> RawWeight:
    raw = layer_format.read(tensors, place.shape, place.class_name)
    if not bool(torch.isfinite(raw.scales).all()):
        raise CheckpointError(f"{tensors.path}: the scales of {tensors.name} hold NaN or infinity.")
    return raw


def _add_bias(result: Converted, files: TensorFiles, name: str, names: ModelNames) -> None:
    """Writers give a zero bias to layers that have none; a real one must have a place."""
    if names.parameter(name) is not None:
        result.state[name] = files.read(name)
    elif bool(files.read(name).any()):
        raise CheckpointError(
            f"{files.path(name)}: {name} is not zero, and the architecture has no such bias."
        )

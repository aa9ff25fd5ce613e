"""bitsandbytes' formats for whole models: nf4, fp4 and int8, an optional extra.

Purpose: quantize a model's plain linear layers with bitsandbytes; take over those that transformers loaded.
Does not know: plans, files, the engine; how a layer is made right (bitsandbytes_linear.py).
Invariant: what bitsandbytes cannot hold, or would compute wrongly, is refused or left alone with a reason.

int8 is quantized with threshold 0, each row of activations by itself: with LLM.int8's outliers (threshold 6)
one sequence's activations choose the columns for all sequences of a step.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, cast

import torch
from torch import nn

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.quantization.bitsandbytes_linear import (
    EightBit,
    bitsandbytes_modules,
    require,
    take_over,
)
from memory_efficient_gpt.quantization.layers import Layer
from memory_efficient_gpt.quantization.modules import QuantizedLinear
from memory_efficient_gpt.quantization.scheme import BNB_INT8, Scheme

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["adopt", "describes", "hold_bitsandbytes", "left_alone", "prepare", "require", "unsuited"]

_WHAT: Final = {"experts": "stacked experts", "embedding": "embeddings", "head": "output heads"}


def describes(settings: Mapping[str, Any] | None) -> bool:
    """Whether a `quantization_config` is of a checkpoint that transformers saved with bitsandbytes."""
    if settings is None:
        return False
    switches = (settings.get("load_in_4bit"), settings.get("load_in_8bit"))  # all that old ones have
    return settings.get("quant_method") == "bitsandbytes" or any(switches)


def unsuited(layer: Layer, scheme: Scheme) -> str | None:
    """Why bitsandbytes cannot hold a layer; None if it can."""
    if layer.role != "linear" or layer.holders[0][1] is not QuantizedLinear:
        return f"bitsandbytes holds plain linear layers, not {_WHAT.get(layer.role, 'transposed ones')}"
    if scheme.group_size is not None and layer.shape[1] % scheme.group_size:
        return f"its 4-bit formats need inputs in multiples of {scheme.group_size}"
    return None


def left_alone(layers: Sequence[Layer], scheme: Scheme) -> tuple[str, ...]:
    """What stays as it is when a whole model is stored as `scheme`, for people."""
    if not scheme.by_bitsandbytes:
        return ()
    inner = (layer for layer in layers if layer.role not in ("embedding", "head"))
    reasons = Counter(reason for layer in inner if (reason := unsuited(layer, scheme)) is not None)
    return tuple(f"{count} weights are not stored as {scheme}: {why}" for why, count in reasons.items())


def hold_bitsandbytes(model: nn.Module, layer: Layer, scheme: Scheme, weight: torch.Tensor) -> None:
    """Put a module of bitsandbytes in place of a linear layer; its float weight is dropped.

    weight: the layer's, on the device where the module is to be.
    Raises ConfigError for a layer that cannot be stored so, ValueError for NaN and infinity.
    """
    if (reason := unsuited(layer, scheme)) is not None:
        raise ConfigError([f"{layer.name} cannot be stored as {scheme}: {reason}."])
    own = layer.holders[0][0]
    if not bool(weight.isfinite().all()):
        raise ValueError("weights hold NaN or infinity")
    module = _quantized(weight, scheme)
    module.bias = cast(nn.Linear, own).bias
    module.train(own.training)
    take_over(module, weight.dtype, layer.name)
    del own.weight
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if child is own:
                setattr(parent, name, module)


def _quantized(weight: torch.Tensor, scheme: Scheme) -> nn.Module:
    bnb = require()
    (n, k), device = weight.shape, weight.device
    module: nn.Module
    if scheme == BNB_INT8:
        with torch.device("meta"):
            module = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=0.0)
        codes = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False)
        module.weight = codes.to(device)  # quantizes what comes from the CPU only
        return module
    options = {"compress_statistics": scheme.nested, "quant_type": scheme.kind.removeprefix("bnb-")}
    with torch.device("meta"):
        module = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=weight.dtype, **options)
    module.weight = bnb.nn.Params4bit(weight, requires_grad=False, **options).to(device)
    return module


def adopt(model: PreTrainedModel, dtype: torch.dtype | None = None) -> None:
    """Take over the layers that transformers loaded with bitsandbytes. Does nothing the second time.

    dtype: to compute in; None: the model's. transformers leaves what is not quantized as the files have it.
    Raises UnsupportedModelError for weights that bitsandbytes would compute wrongly.
    """
    bnb: Any = sys.modules.get("bitsandbytes")
    if bnb is None:
        return
    kinds = (bnb.nn.Linear4bit, bnb.nn.LinearNF4, bnb.nn.LinearFP4, bnb.nn.Linear8bitLt)
    found = [(name, module) for name, module in model.named_modules() if type(module) in kinds]
    stored = model.dtype
    for name, module in found:
        take_over(module, dtype or stored, name)
    if found and dtype is not None and dtype is not stored:
        codes = {id(module.weight) for _, module in found}
        for parameter in model.parameters():
            if parameter.dtype is stored and id(parameter) not in codes:
                parameter.data = parameter.data.to(dtype)
        model.config.dtype = dtype


def prepare(model: PreTrainedModel) -> tuple[str, ...]:
    """Make bitsandbytes' layers fit to run; what users should know of them. `model` is in evaluation mode."""
    adopt(model)
    modules = bitsandbytes_modules(model)
    for module in modules:
        module.prepare()
    if not modules:
        return ()
    note = (
        f"bitsandbytes computes {len(modules)} layers, in {str(model.dtype).removeprefix('torch.')}; its "
        "formats are for compatibility, int4 and int8 are faster on CPUs: see docs/quantization.md"
    )
    thresholds = {m.threshold for m in modules if isinstance(m, EightBit) and m.threshold}
    outliers = (
        f"LLM.int8 treats activations above {value:g} apart, in columns chosen over all sequences of a step: "
        "a seed's text may depend on what else is in the batch"
        for value in sorted(thresholds)
    )
    return (note, *outliers)

"""Models of which every weight is quantized: transformers asks parameters that are not there.

Purpose: `model.dtype` and `model.device` for models without a floating point parameter, such as OLMo, whose
norms have no weights.
Does not know: schemes, files.
Invariant: other models are not touched; the class keeps its name.
"""

from __future__ import annotations

import functools

import torch
from torch import nn

from memory_efficient_gpt.quantization.modules import QuantizedModule


def describe_itself(model: nn.Module) -> None:
    """Let the model answer for dtype and device from its quantized modules, if it has nothing else."""
    if any(parameter.is_floating_point() for parameter in model.parameters()):
        return
    if any(isinstance(module, QuantizedModule) for module in model.modules()):
        model.__class__ = _describing(type(model))  # type: ignore[arg-type]  # classes are hashable


@functools.cache
def _describing(own: type[nn.Module]) -> type[nn.Module]:
    names = {"__module__": own.__module__, "dtype": property(_dtype), "device": property(_device)}
    return type(own.__name__, (own,), names)


def _first(model: nn.Module) -> QuantizedModule:
    return next(module for module in model.modules() if isinstance(module, QuantizedModule))


def _dtype(model: nn.Module) -> torch.dtype:
    return _first(model).compute_dtype


def _device(model: nn.Module) -> torch.device:
    packed = _first(model).packed_weight
    return (packed if packed is not None else _first(model).quantized_weight).codes.device

"""Which weights of a model can be quantized, and what they are to it.

Purpose: find linear layers, the token embedding, the output head and stacked experts, by structure.
Does not know: schemes, how weights are quantized.
Invariant: a weight that two modules share is listed once, with every module that holds it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from memory_efficient_gpt.quantization.experts import stacked_parameters
from memory_efficient_gpt.quantization.modules import (
    QuantizedConv1D,
    QuantizedEmbedding,
    QuantizedLinear,
    QuantizedModule,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Role = Literal["linear", "experts", "embedding", "head"]

LEAST_SIDE: Final = 16
_ROUTER_NAMES: Final = ("gate", "router", "shared_expert_gate")
"""Layers that choose experts: tiny, and a wrong choice costs more than the bytes saved."""


@dataclass(slots=True)
class Layer:
    """One weight. name: of its first module; shape: `(N, K)`, experts `(E * N, K)`.

    holders: every (module, kind to become) that uses it; parameter: its name in an experts module.
    """

    name: str
    role: Role
    shape: tuple[int, int]
    holders: list[tuple[nn.Module, type[QuantizedModule]]]
    parameter: str | None = None
    names: list[str] = field(default_factory=list)

    def weight(self) -> torch.Tensor:
        """The float weight `[N, K]` as it is now."""
        module, kind = self.holders[0]
        weight = module.get_parameter(self.parameter or "weight").detach()
        if kind is QuantizedConv1D:
            return weight.t()
        return weight.reshape(self.shape)


def find_layers(model: PreTrainedModel) -> list[Layer]:
    """The weights that may be quantized, in the order in which the model's modules come."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    found: dict[int, Layer] = {}
    for name, module in model.named_modules():
        for parameter in stacked_parameters(module):
            weight = module.get_parameter(parameter)
            shape = (weight.shape[0] * weight.shape[1], weight.shape[2])
            layer = Layer(f"{name}.{parameter}", "experts", shape, [(module, QuantizedModule)], parameter)
            layer.names.append(layer.name)
            found[id(weight)] = layer
        kind = _kind(module, is_embedding=module is embedding)
        if kind is None:
            continue
        weight = module.get_parameter("weight")
        if id(weight) in found:  # a head tied to the embedding: the head's needs decide
            found[id(weight)].holders.append((module, kind))
            found[id(weight)].names.append(name)
            found[id(weight)].role = "head"
            continue
        role: Role = "embedding" if module is embedding else "head" if module is head else "linear"
        n, k = weight.shape if kind is not QuantizedConv1D else (weight.shape[1], weight.shape[0])
        if role == "linear" and (min(n, k) < LEAST_SIDE or name.rpartition(".")[2] in _ROUTER_NAMES):
            continue
        found[id(weight)] = Layer(name, role, (n, k), [(module, kind)], names=[name])
    return list(found.values())


def _kind(module: nn.Module, *, is_embedding: bool) -> type[QuantizedModule] | None:
    """What the module can become. A layer whose class computes in its own way stays as it is."""
    weight = module._parameters.get("weight")
    if weight is None or weight.dim() != 2 or not weight.is_floating_point() or "forward" in vars(module):
        return None
    if is_embedding:
        return QuantizedEmbedding if isinstance(module, nn.Embedding) else None
    if type(module) is Conv1D:
        return QuantizedConv1D
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return QuantizedLinear if plain else None

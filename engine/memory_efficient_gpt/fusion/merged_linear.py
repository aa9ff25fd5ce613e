"""Linear layers of the same input that are computed in one product.

Purpose: hold their weights as rows of one tensor, multiply once, give each layer its part of the result.
Does not know: which layers of a model belong together, whether the results are right (merge.py).
Invariant: modules keep their names and parameters, whose values stay; the parameters become views of one
tensor, so no second copy of their bytes stays. A part is only given for the very input it was computed from,
and nothing is kept once every layer took its part.

With gradients enabled, or once a parameter was moved or replaced, a layer computes with its own class's
`forward`. Where an input comes that is not the one kept, layers other than the first multiply by their own
rows.

Letters: K inputs, N outputs of all layers together.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import nn
from torch.nn import functional

from memory_efficient_gpt.fusion.structures import own_parameter

Mode = Literal["whole", "parts", "off"]
Multiply = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor]
"""x `[..., K]`, weight `[N, K]`, bias `[N]` or None to `[..., N]`."""


@dataclass(frozen=True, slots=True)
class _Kept:
    """An input, its version, its product, and the layers whose part was not taken yet."""

    x: torch.Tensor
    version: int | None
    out: torch.Tensor
    waiting: frozenset[int]


class MergedProduct(ABC):
    """The product of linear layers that get the same input; the first one called computes it.

    mode: "whole" is one product; "parts" multiplies part by part and joins the results, "off" leaves every
    layer to itself. The latter two are for checks: only rounding tells "whole" from "parts".
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        """sizes: the outputs of each layer, in the order in which they are called."""
        self.mode: Mode = "whole"
        self.layers = len(sizes)
        self._sizes = list(sizes)
        self._kept: _Kept | None = None

    @abstractmethod
    def holds(self, layer: nn.Linear) -> bool:
        """Whether the layer's weight is still part of this product's."""

    @abstractmethod
    def release(self, layer: nn.Linear) -> None:
        """Give the layer a weight of its own."""

    @abstractmethod
    def _multiply(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        """x `[..., K]` by all rows: `[..., N]`. layer: the first one."""

    def part(self, place: int, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor | None:
        """The layer's part of the product with x `[..., K]`: `[..., n]`, a view; None if there is none."""
        kept = self._kept
        if kept is not None and kept.x is x and place in kept.waiting and kept.version == _version(x):
            waiting = kept.waiting - {place}
            self._kept = _Kept(x, kept.version, kept.out, waiting) if waiting else None
            return self._cut(kept.out, place)
        self._kept = None
        if place != 0 or self.mode == "off":
            return None
        out = self._multiply(x, layer)
        self._kept = _Kept(x, _version(x), out, frozenset(range(1, self.layers)))
        return self._cut(out, place)

    def forget(self) -> None:
        """Drop what an interrupted pass left."""
        self._kept = None

    def _cut(self, out: torch.Tensor, place: int) -> torch.Tensor:
        return out.narrow(-1, sum(self._sizes[:place]), self._sizes[place])


class DenseProduct(MergedProduct):
    """Of weights that are tensors."""

    def __init__(
        self, layers: Sequence[nn.Linear], multiply: Multiply | None = None, *, deterministic: bool = False
    ) -> None:
        """layers: in the order in which they are called; with weights `[n, K]` and biases alike, or none.
        multiply: how the product is computed where it is one, if not by torch. deterministic: whether that
        keeps a row's sums whatever the number of rows."""
        super().__init__([layer.weight.shape[0] for layer in layers])
        self._multiply_whole = multiply
        self.deterministic = deterministic
        with torch.no_grad():
            weight = torch.cat([layer.weight.data for layer in layers])
            biases = [bias for layer in layers if (bias := own_parameter(layer, "bias")) is not None]
            bias = torch.cat(biases) if biases else None
            for place, (layer, rows) in enumerate(zip(layers, weight.split(self._sizes), strict=True)):
                layer.weight.data = rows
                become_merged(layer, self, place)
            for own, part in zip(biases, bias.split(self._sizes) if bias is not None else (), strict=True):
                own.data = part
        self._weight_storage = _storage(weight)
        self._bias_storage = None if bias is None else _storage(bias)

    def holds(self, layer: nn.Linear) -> bool:
        """Whether the layer's parameters are still parts of this product's tensors."""
        if _storage(layer.weight) != self._weight_storage:
            return False
        bias = own_parameter(layer, "bias")
        return self._bias_storage == (None if bias is None else _storage(bias))

    def release(self, layer: nn.Linear) -> None:
        """Its own weights in memory."""
        layer.weight.data = layer.weight.data.clone()
        if (bias := own_parameter(layer, "bias")) is not None:
            bias.data = bias.data.clone()

    def _multiply(self, x: torch.Tensor, layer: nn.Linear) -> torch.Tensor:
        """x `[..., K]` by all rows: `[..., N]`."""
        weight, bias = _all_of(layer.weight, sum(self._sizes)), own_parameter(layer, "bias")
        if bias is not None:
            bias = _all_of(bias, sum(self._sizes))
        if self.mode == "whole":
            return (self._multiply_whole or functional.linear)(x, weight, bias)
        weights = weight.split(self._sizes)
        biases = bias.split(self._sizes) if bias is not None else [None] * self.layers
        return torch.cat([functional.linear(x, w, b) for w, b in zip(weights, biases, strict=True)], dim=-1)


class MergedLinear(nn.Module):
    """Mixed into a linear layer's own class by `become_merged`."""

    merged_product: MergedProduct
    merged_place: int

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """input `[..., K]` to `[..., n]`."""
        product, layer = self.merged_product, cast(nn.Linear, self)
        if not torch.is_grad_enabled() and product.holds(layer):
            part = product.part(self.merged_place, input, layer)
            if part is not None:
                return part
        return cast(torch.Tensor, super().forward(input))


def part_ways(layer: MergedLinear) -> None:
    """Undo for one layer: its own class, its own weights in memory."""
    linear = cast(nn.Linear, layer)
    if layer.merged_product.holds(linear):
        layer.merged_product.release(linear)
    layer.__class__ = type(layer).__bases__[-1]
    del layer.merged_product, layer.merged_place


def become_merged(layer: nn.Linear, product: MergedProduct, place: int) -> None:
    """Let the layer take its part of the product from now on; changes it in place."""
    object.__setattr__(layer, "merged_product", product)
    object.__setattr__(layer, "merged_place", place)
    layer.__class__ = _subclass(type(layer))  # type: ignore[arg-type]  # classes are hashable


@functools.cache
def _subclass(own: type[nn.Linear]) -> type[nn.Linear]:
    return type(f"Merged{own.__name__}", (MergedLinear, own), {"__module__": own.__module__})


def _storage(tensor: torch.Tensor) -> tuple[int, int]:
    """What tells one live tensor's memory from another's."""
    storage = tensor.untyped_storage()
    return storage._cdata, storage.nbytes()  # not its address, which changes while a model sleeps


def _all_of(part: torch.Tensor, rows: int) -> torch.Tensor:
    """The tensor `[rows, ...]` of which `part` is some rows. It has no other owner: it is freed with them."""
    shape = (rows, *part.shape[1:])
    return part.as_strided(shape, part.stride(), 0)


def _version(x: torch.Tensor) -> int | None:
    """Changes with every write in place; tensors of inference mode have none."""
    return None if x.is_inference() else x._version

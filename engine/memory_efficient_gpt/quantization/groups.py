"""Layers that get one scheme together, because kernels compute them together.

Purpose: tie queries, keys and values of one attention, gate and up of one MLP; count what a group would take.
Does not know: how much a group's precision matters, how schemes are chosen.
Invariant: every layer is in exactly one group; layers of one group have the same inputs, and one pin or none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from memory_efficient_gpt.quantization.layers import Layer
from memory_efficient_gpt.quantization.scheme import Scheme

_TIED: Final = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("wq", "wk", "wv"),
    ("gate_proj", "up_proj"),
    ("w1", "w3"),
)
"""Names of sibling modules that compute from one input."""


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers with one scheme. name: their parent's and their own; pinned: the only scheme allowed, if any."""

    name: str
    layers: tuple[Layer, ...]
    pinned: Scheme | None = None

    @property
    def num_weights(self) -> int:
        """Weights of all layers."""
        return sum(n * k for n, k in (layer.shape for layer in self.layers))

    def stored_bits(self, scheme: Scheme) -> int:
        """Bits that the layers take in `scheme`, scales and offsets counted."""
        shapes = [layer.shape for layer in self.layers]
        return sum(round(scheme.bits_per_weight(n, k) * n * k) for n, k in shapes)

    def schemes(self, options: Sequence[Scheme]) -> tuple[Scheme, ...]:
        """What may be chosen: `options`, or only the pinned scheme."""
        return (self.pinned,) if self.pinned is not None else tuple(options)


def group_layers(
    layers: Sequence[Layer], pins: Mapping[str, Scheme] | None = None, *, tied: bool = True
) -> list[LayerGroup]:
    """Groups in the order of their first layers. pins: schemes by layer name; tied: False ties nothing.

    A pin goes before a tie: layers with different pins are different groups.
    """
    members: dict[tuple[object, Scheme | None], list[Layer]] = {}
    for layer in layers:
        parent, _, own = layer.name.rpartition(".")
        tie = next((names for names in _TIED if own in names), None)
        together = (parent, tie, layer.shape[1]) if tied and tie and layer.role == "linear" else layer.name
        members.setdefault((together, (pins or {}).get(layer.name)), []).append(layer)
    return [LayerGroup(_name(group), tuple(group), pin) for (_, pin), group in members.items()]


def bits_range(groups: Sequence[LayerGroup], options: Sequence[Scheme]) -> tuple[float, float]:
    """The fewest and the most average bits per weight that `options` allow, pins kept."""
    sizes = [[group.stored_bits(scheme) for scheme in group.schemes(options)] for group in groups]
    num_weights = sum(group.num_weights for group in groups)
    return sum(map(min, sizes)) / num_weights, sum(map(max, sizes)) / num_weights


def _name(layers: Sequence[Layer]) -> str:
    parent, dot, _ = layers[0].name.rpartition(".")
    return parent + dot + "+".join(layer.name.rpartition(".")[2] for layer in layers)

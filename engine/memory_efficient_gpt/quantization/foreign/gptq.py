"""GPTQ checkpoints, as AutoGPTQ and GPTQModel write them.

Purpose: read a layer's qweight, qzeros, scales and g_idx.
Does not know: models, how the codes were found.
Invariant: bits and groups are read off the tensors, so that a checkpoint with rules for single layers
("dynamic") needs no rule here.

    qweight  [ceil(K b / 32), N] int32   b bits of an input after the other down a column, lowest bits first
    qzeros   [G, ceil(N b / 32)] int32   zero points, likewise along a row
    scales   [G, N]              float16
    g_idx    [K]                 int32   the group of each input; absent: k // group_size

    weight[n, k] = scales[g, n] * (code[k, n] - zero[g, n]),   g = g_idx[k]

Format "gptq" stores zero points less 1, "gptq_v2" as they are. Writers subtract 1 from every field by one
subtraction from the whole word (0x11111111 for 4 bits), so a zero point of 0 borrows from its neighbour;
adding the same constant to the word is the exact inverse. Fields of 3 bits are changed one by one.

With activation order ("desc_act") groups are not contiguous: inputs are sorted by group here, and the layer
gathers its activations in that order.

Letters: N outputs, K inputs, G groups, b bits of a code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from memory_efficient_gpt.quantization.foreign.bit_streams import WIDTHS, nibbles_of, unpack_words, words_of
from memory_efficient_gpt.quantization.foreign.formats import (
    Settings,
    check_group_size,
    setting,
    unsupported,
)
from memory_efficient_gpt.quantization.foreign.group_order import order_of_groups
from memory_efficient_gpt.quantization.foreign.raw_weight import RawWeight, pack_codes, widen
from memory_efficient_gpt.quantization.foreign.tensor_files import LayerTensors

_TITLE: Final = "GPTQ"
_ONES: Final = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}
"""A one in each field of a word."""


@dataclass(frozen=True, slots=True)
class GPTQ:
    """The format with a checkpoint's settings. group_size: None is one group a row."""

    group_size: int | None
    minus_one: bool
    title: str = _TITLE
    markers: tuple[str, ...] = ("qweight",)
    own_names: frozenset[str] = frozenset({"qweight", "qzeros", "scales", "g_idx"})
    ignored: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ("weights read from a checkpoint in GPTQ format",)

    def read(self, tensors: LayerTensors, shape: tuple[int, int], class_name: str) -> RawWeight:
        """See `LayerFormat.read`."""
        n, k = shape
        bits = _bits(tensors, shape)
        scales = tensors.read("scales", ("F16", "BF16", "F32")).t()
        groups = scales.shape[-1]
        if tuple(scales.shape) != (n, groups):
            raise tensors.error("scales", f"has shape {list(scales.shape)[::-1]}, must have [groups, {n}]")
        zeros = self._zeros(tensors, bits, n, groups)
        order, size = self._groups(tensors, k, groups)
        check_group_size(_TITLE, tensors.name, size)
        words = tensors.read("qweight", ("I32",), [(words_of(k, bits), n)]).t()
        if bits == 4 and order is None:
            codes = nibbles_of(words, k)
        else:
            unpacked = widen(unpack_words(words, bits, k), bits)
            codes = pack_codes(unpacked if order is None else unpacked[:, order], max(bits, 4))
        return RawWeight(k, max(bits, 4), codes, scales.contiguous(), widen(zeros, bits), size, order)

    def _zeros(self, tensors: LayerTensors, bits: int, n: int, groups: int) -> torch.Tensor:
        """`[N, G] uint8`."""
        words = tensors.read("qzeros", ("I32",), [(groups, words_of(n, bits))])
        if self.minus_one and bits in _ONES:
            words = words + _ONES[bits]
        zeros = unpack_words(words, bits, n)
        if self.minus_one and bits not in _ONES:
            zeros = (zeros + 1) & ((1 << bits) - 1)
        return zeros.t().contiguous()

    def _groups(self, tensors: LayerTensors, k: int, groups: int) -> tuple[torch.Tensor | None, int | None]:
        """Where inputs are not in the order of their groups, that order; and the group size."""
        if "g_idx" not in tensors:
            return None, self._contiguous_size(tensors, k, groups)
        index = tensors.read("g_idx", ("I32", "I64"), [(k,)]).long()
        return order_of_groups(tensors, "g_idx", index, groups)

    def _contiguous_size(self, tensors: LayerTensors, k: int, groups: int) -> int | None:
        if groups == 1:
            return None
        size = self.group_size or k
        if -(-k // size) != groups:
            expected = -(-k // size)
            raise tensors.error("scales", f"has {groups} groups, {k} inputs by {size} are {expected}")
        return size


def read_settings(settings: Settings) -> GPTQ:
    """Raises UnsupportedModelError for layouts other than gptq and gptq_v2."""
    layout = setting(settings, "checkpoint_format", str) or setting(settings, "format", str, "gptq")
    if setting(settings, "is_marlin_format", bool, False):
        layout = "marlin"
    if layout not in ("gptq", "gptq_v2"):
        raise unsupported(
            _TITLE, "checkpoint_format", layout, "Supported are gptq and gptq_v2: export the model to one."
        )
    if (words := setting(settings, "pack_dtype", str, "int32")) != "int32":
        raise unsupported(_TITLE, "pack_dtype", words, "Supported is int32: pack the model again.")
    if adapter := settings.get("adapter"):
        raise unsupported(_TITLE, "adapter", adapter, "Merge it into the model before quantizing.")
    size = setting(settings, "group_size", int, -1)
    return GPTQ(size if size > 0 else None, layout == "gptq")


def _bits(tensors: LayerTensors, shape: tuple[int, int]) -> int:
    """The width whose codes fill qweight."""
    n, k = shape
    found = tensors.shape("qweight")
    fitting = [bits for bits in WIDTHS if found == (words_of(k, bits), n)]
    if not fitting:
        expected = " or ".join(f"{[words_of(k, b), n]} ({b} bits)" for b in WIDTHS)
        raise tensors.error("qweight", f"has shape {list(found)}, a weight of {n} x {k} has {expected}")
    return fitting[-1]

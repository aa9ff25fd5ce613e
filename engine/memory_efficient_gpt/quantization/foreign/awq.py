"""AWQ checkpoints in the "gemm" layout, as AutoAWQ writes them.

Purpose: read a layer's qweight, qzeros and scales.
Does not know: models, how activations were weighed when the codes were found.
Invariant: eight outputs share a word, interleaved as AutoAWQ's kernel wants them.

    qweight  [K, N / 8] int32     qzeros  [G, N / 8] int32     scales  [G, N] float16

    bits of a word   0..3   4..7  8..11 12..15 16..19 20..23 24..27 28..31
    output 8 j +        0      2      4      6      1      3      5      7

    weight[n, k] = scales[g, n] * (code[k, n] - zero[g, n]),   g = k // (K / G)

Letters: N outputs, K inputs, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from memory_efficient_gpt.quantization.foreign.bit_streams import unpack_words
from memory_efficient_gpt.quantization.foreign.formats import (
    Settings,
    check_group_size,
    setting,
    unsupported,
)
from memory_efficient_gpt.quantization.foreign.raw_weight import RawWeight
from memory_efficient_gpt.quantization.foreign.tensor_files import LayerTensors
from memory_efficient_gpt.quantization.storage import pack_nibbles

_TITLE: Final = "AWQ"
_FIELD_OF_OUTPUT: Final = (0, 4, 1, 5, 2, 6, 3, 7)


@dataclass(frozen=True, slots=True)
class AWQ:
    """The format; its settings say nothing that the tensors do not."""

    title: str = _TITLE
    markers: tuple[str, ...] = ("qweight",)
    own_names: frozenset[str] = frozenset({"qweight", "qzeros", "scales"})
    ignored: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ("weights read from a checkpoint in AWQ format",)

    def read(self, tensors: LayerTensors, shape: tuple[int, int], class_name: str) -> RawWeight:
        """See `LayerFormat.read`."""
        n, k = shape
        if n % 8:
            raise tensors.error("qweight", f"has {n} outputs, AWQ stores multiples of 8")
        scales = tensors.read("scales", ("F16", "BF16", "F32")).t()
        groups = scales.shape[-1]
        if tuple(scales.shape) != (n, groups) or not groups or k % groups:
            raise tensors.error("scales", f"has shape {list(scales.shape)[::-1]}, must have [groups, {n}]")
        size = k // groups if groups > 1 else None
        check_group_size(_TITLE, tensors.name, size)
        zeros = _outputs(tensors.read("qzeros", ("I32",), [(groups, n // 8)]), n)
        codes = _outputs(tensors.read("qweight", ("I32",), [(k, n // 8)]), n)
        return RawWeight(k, 4, pack_nibbles(codes.t()), scales.contiguous(), zeros.t().contiguous(), size)


def _outputs(words: torch.Tensor, n: int) -> torch.Tensor:
    """`[R, N / 8] int32` to `[R, N] uint8` in the order of outputs."""
    fields = unpack_words(words, 4, n).view(len(words), -1, 8)
    return fields[:, :, list(_FIELD_OF_OUTPUT)].flatten(1)


def read_settings(settings: Settings) -> AWQ:
    """Raises UnsupportedModelError for layouts other than gemm, and for other than 4 bits."""
    layouts = [setting(settings, name, str) for name in ("version", "checkpoint_format", "format")]
    layout = next((name for name in layouts if name is not None), "gemm").lower()
    if (backend := setting(settings, "backend", str, "autoawq")) not in ("autoawq", "auto"):
        raise unsupported(_TITLE, "backend", backend, "Supported is autoawq: quantize with it.")
    if layout != "gemm":
        raise unsupported(_TITLE, "version", layout, "Supported is gemm: quantize with version gemm.")
    bits = setting(settings, "bits", int) or setting(settings, "w_bit", int, 4)
    if bits != 4:
        raise unsupported(_TITLE, "bits", bits, "Supported is 4, the only width AWQ has kernels for.")
    return AWQ()

"""The layout in which the native kernel reads quantized weights, and the way there and back.

Purpose: pack integer codes, scales and offsets for `Kernels.quantized_linear`, unpack them, look rows up.
Does not know: how codes were chosen, modules, files.
Invariant: `pack` loses nothing: `unpack` gives back the same codes, scales and offsets.

Sixteen outputs form a block; inputs are padded to whole spans (see quantized_linear.cpp for the bytes).
A span is what shares an activation step: a weight group if there are groups, else 128 inputs.

Letters: N outputs, K inputs, G groups, B = ceil(N / 16) blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch
from torch.nn import functional

BLOCK: Final = 16
MAX_SPAN: Final = 128
_SPAN_MULTIPLE: Final = 8


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight `[N, K]` of `bits` bits for the native kernel.

    codes `[B, spans * span * bits / 32, 64] uint8`; scales and offsets (None: symmetric) `[B, G, 16]`
    float16; weight = unit * (scale * code - offset). span: inputs that share an activation step;
    per_group: spans that share a scale.
    """

    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    unit: float
    num_outputs: int
    num_inputs: int
    bits: int
    span: int
    per_group: int

    @property
    def num_spans(self) -> int:
        """Spans of an output, the last one padded."""
        return -(-self.num_inputs // self.span)


def pack(
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    unit: float,
    *,
    bits: int,
    group_size: int | None,
) -> PackedWeight:
    """From codes `[N, K] uint8` and scales and offsets `[N, G]` (or `[1, 1]`) float16."""
    n, k = codes.shape
    span, spans, per_group = spans_of(k, group_size)
    blocks = -(-n // BLOCK)
    padded = functional.pad(codes, (0, spans * span - k, 0, blocks * BLOCK - n))
    if bits == 4:
        parts = padded.view(blocks, BLOCK, -1, 2, 4)
        units = parts[:, :, :, 0] | (parts[:, :, :, 1] << 4)
    else:
        units = padded.view(blocks, BLOCK, -1, 4)
    packed = units.transpose(1, 2).reshape(blocks, -1, 4 * BLOCK).contiguous()
    return PackedWeight(
        packed,
        pack_parameters(scales, n),
        pack_parameters(offsets, n) if offsets is not None else None,
        unit, n, k, bits, span, per_group,
    )  # fmt: skip


def spans_of(num_inputs: int, group_size: int | None) -> tuple[int, int, int]:
    """Inputs of a span, spans of an output, spans of a group."""
    span = min(MAX_SPAN, group_size or MAX_SPAN, -(-num_inputs // _SPAN_MULTIPLE) * _SPAN_MULTIPLE)
    spans = -(-num_inputs // span)
    return span, spans, (group_size or spans * span) // span


def unpack(packed: PackedWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes `[N, K] uint8`, scales `[N, G]` and offsets."""
    n = packed.num_outputs
    offsets = _unpack_parameters(packed.offsets, n) if packed.offsets is not None else None
    rows = torch.arange(n, device=packed.codes.device)
    return _rows_of_codes(packed, rows), _unpack_parameters(packed.scales, n), offsets


def dequantize_rows(packed: PackedWeight, rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Rows `[T] int64` of the weight: `[T, K]`, computed in float32."""
    codes = _rows_of_codes(packed, rows).float()
    block, lane = rows // BLOCK, rows % BLOCK
    scales = packed.scales[block, :, lane].float()
    if packed.offsets is not None:
        offsets = packed.offsets[block, :, lane].float()
    else:
        offsets = scales * (1 << (packed.bits - 1))
    size = packed.span * packed.per_group
    whole = scales.repeat_interleave(size, dim=1)[:, : packed.num_inputs]
    shift = offsets.repeat_interleave(size, dim=1)[:, : packed.num_inputs]
    return ((codes * whole - shift) * packed.unit).to(dtype)


def _rows_of_codes(packed: PackedWeight, rows: torch.Tensor) -> torch.Tensor:
    blocks = packed.codes.shape[0]
    units = packed.codes.view(blocks, -1, BLOCK, 4)[rows // BLOCK, :, rows % BLOCK]  # [T, units, 4]
    if packed.bits == 4:
        units = torch.stack((units & 15, units >> 4), dim=2)
    return units.reshape(len(rows), -1)[:, : packed.num_inputs].contiguous()


def pack_parameters(values: torch.Tensor, num_outputs: int) -> torch.Tensor:
    """Scales or offsets `[N, G]` (or `[1, 1]`) as `[B, G, 16]`, zero beyond the last output."""
    if values.shape[0] != num_outputs:
        values = values.expand(num_outputs, -1)
    blocks = -(-num_outputs // BLOCK)
    padded = functional.pad(values, (0, 0, 0, blocks * BLOCK - num_outputs))
    return padded.view(blocks, BLOCK, -1).transpose(1, 2).contiguous()


def _unpack_parameters(values: torch.Tensor, num_outputs: int) -> torch.Tensor:
    return values.transpose(1, 2).reshape(-1, values.shape[1])[:num_outputs].contiguous()

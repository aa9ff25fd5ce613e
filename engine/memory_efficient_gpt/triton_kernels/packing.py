"""The layout in which the Triton kernels read quantized weights, and the way there and back.

Purpose: arrange codes, scales and offsets for matmul.py and dequantize.py.
Does not know: Triton, how codes were chosen, modules.
Invariant: `pack` loses nothing: `unpack` gives back the same codes, scales and offsets.

Inputs come in spans of 128. Of one span, an output has 32 words of 16 bits (4-bit codes) or 64 (8-bit ones):
bits 4j.. of word i are the code of input 32j + i, bits 8j.. that of input 64j + i. So one register of two
words gives two weights of one output with a shift and a mask, and the inputs that belong to the j-th codes
lie side by side. A span's words of all outputs are contiguous: a tile of outputs is one piece of memory.

Letters: N outputs, K inputs, S = ceil(K / 128) spans, P outputs padded to a multiple of 128, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final, Literal

import torch
from torch.nn import functional

SPAN: Final = 128
OUTPUT_MULTIPLE: Final = 128
"""What the widest tile needs."""

Code = Literal["int4", "int8", "fp8"]
BITS: Final[dict[Code, int]] = {"int4": 4, "int8": 8, "fp8": 8}


@dataclass(frozen=True, slots=True)
class TritonWeight:
    """A weight `[N, K]` for the Triton kernels.

    codes `[S, P, 32 or 64] int16`; scales and offsets (None: symmetric) `[G, P] float16`, G = 1 for one scale
    an output; weight = unit * (scale * code - offset), without offset: unit * scale * (code - middle), for
    fp8: unit * scale * code. group_size: inputs that share a scale, None for all of them. deterministic:
    a row's product with it may not depend on the number of rows.
    """

    code: Code
    codes: torch.Tensor
    scales: torch.Tensor
    offsets: torch.Tensor | None
    unit: float
    num_outputs: int
    num_inputs: int
    group_size: int | None
    deterministic: bool = False

    @property
    def num_bytes(self) -> int:
        """Bytes of all tensors, padding included."""
        tensors = (self.codes, self.scales, self.offsets)
        return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def contiguous(weight: TritonWeight) -> TritonWeight:
    """The weight as kernels take it: one that is part of a merged weight is copied.

    Codes come last: a product may begin while the copy before it ends, and read scales by then (overlap.py).
    """
    offsets = None if weight.offsets is None else weight.offsets.contiguous()
    scales = weight.scales.contiguous()
    return replace(weight, codes=weight.codes.contiguous(), scales=scales, offsets=offsets)


def obstacle(code: Code, group_size: int | None) -> str | None:
    """Why the kernels can't take such weights, or None: a group must not end inside of a slice."""
    if group_size is None or group_size % SPAN == 0:
        return None
    slice_inputs = SPAN * BITS[code] // 16
    if group_size % slice_inputs == 0 and SPAN % group_size == 0:
        return None
    return f"no Triton kernel for {code} with groups of {group_size}"


def pack(
    code: Code,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    unit: float,
    *,
    group_size: int | None,
) -> TritonWeight:
    """From codes `[N, K] uint8` (fp8: its bits), scales and offsets `[N, G]` or `[1, 1]` float16.

    Works on the codes' device. Raises ValueError for what `obstacle` names.
    """
    if (reason := obstacle(code, group_size)) is not None:
        raise ValueError(reason)
    n, k = codes.shape
    outputs = -(-n // OUTPUT_MULTIPLE) * OUTPUT_MULTIPLE
    spans = -(-k // SPAN)
    padded = functional.pad(codes, (0, spans * SPAN - k, 0, outputs - n))
    parts = padded.view(outputs, spans, 16 // BITS[code], -1)
    if code == "int4":
        low, high = parts[:, :, 0] | (parts[:, :, 1] << 4), parts[:, :, 2] | (parts[:, :, 3] << 4)
    else:
        low, high = parts[:, :, 0], parts[:, :, 1]
    words = torch.stack((low, high), dim=-1).view(torch.int16).squeeze(-1)
    groups = 1 if group_size is None else -(-spans * SPAN // group_size)
    return TritonWeight(
        code,
        words.transpose(0, 1).contiguous(),
        _pack_parameters(scales, n, outputs, groups),
        _pack_parameters(offsets, n, outputs, groups) if offsets is not None else None,
        unit, n, k, group_size,
    )  # fmt: skip


def unpack(weight: TritonWeight) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes `[N, K] uint8`, scales `[N, G] float16` and offsets, as `pack` took them (tensors expanded)."""
    groups = 1 if weight.group_size is None else -(-weight.num_inputs // weight.group_size)

    def of(values: torch.Tensor) -> torch.Tensor:
        return values[:groups, : weight.num_outputs].t().contiguous()

    rows = torch.arange(weight.num_outputs, device=weight.codes.device)
    return (
        codes_of(weight, rows),
        of(weight.scales),
        of(weight.offsets) if weight.offsets is not None else None,
    )


def codes_of(weight: TritonWeight, rows: torch.Tensor) -> torch.Tensor:
    """Codes of outputs `rows` `[T] int64`: `[T, K] uint8`."""
    words = weight.codes[:, rows].transpose(0, 1).contiguous()
    halves = words.unsqueeze(-1).view(torch.uint8)
    low, high = halves[..., 0], halves[..., 1]
    parts = (low & 15, low >> 4, high & 15, high >> 4) if weight.code == "int4" else (low, high)
    return torch.stack(parts, dim=2).flatten(1)[:, : weight.num_inputs].contiguous()


def _pack_parameters(values: torch.Tensor, num_outputs: int, outputs: int, groups: int) -> torch.Tensor:
    """`[N, G]` or `[1, 1]` to `[groups, outputs]`, zero where padding is."""
    if values.shape[0] != num_outputs:
        values = values.expand(num_outputs, -1)
    return functional.pad(values, (0, groups - values.shape[1], 0, outputs - num_outputs)).t().contiguous()

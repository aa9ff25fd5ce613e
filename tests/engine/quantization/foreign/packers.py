"""Writers of the formats, from their definitions: slow, plain, and nothing of the engine's own readers.

Codes are packed as Python's integers: a row of codes is one number, code i at bit i * b, cut into 32-bit
words from the low end.

    number of a row   ... code 2 | code 1 | code 0
                                  2b       b        0    <- bit
    word w            bits 32 w .. 32 w + 31

    GPTQ                qweight: a number down each column (one output, all inputs); qzeros: along each row
    compressed-tensors  weight_packed: a number along each row (one output); zero points: down each column
    AWQ                 words of eight outputs along each row, in the order 0 2 4 6 1 3 5 7 from the low end

Letters: N outputs, K inputs, G groups, b bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Grouped:
    """A weight by its definition: codes and zeros from 0 up, scales `[N, G]`; index: each input's group."""

    codes: torch.Tensor
    scales: torch.Tensor
    zeros: torch.Tensor
    index: torch.Tensor
    bits: int

    def dequantize(self) -> torch.Tensor:
        """`[N, K] float64`."""
        scales, zeros = self.scales.double()[:, self.index], self.zeros.double()[:, self.index]
        return scales * (self.codes.double() - zeros)


def quantize(
    weight: torch.Tensor,
    *,
    bits: int = 4,
    group: int | None = None,
    symmetric: bool = True,
    scale_dtype: torch.dtype = torch.float16,
    index: torch.Tensor | None = None,
) -> Grouped:
    """Round to nearest. index: the group of each input where that is not k // group."""
    k = weight.shape[1]
    index = index if index is not None else torch.arange(k) // (group or k)
    top, middle = 2**bits - 1, 2 ** (bits - 1)
    groups = range(int(index.max()) + 1)
    high = torch.stack([weight[:, index == g].amax(1) for g in groups], 1).clamp(min=1e-3)
    low = torch.stack([weight[:, index == g].amin(1) for g in groups], 1).clamp(max=-1e-3)
    if symmetric:
        scales = (torch.maximum(high, -low) / (middle - 0.5)).to(scale_dtype)
        zeros = torch.full_like(scales, middle).int()
    else:
        scales = ((high - low) / top).to(scale_dtype)
        zeros = torch.round(-low / scales.float()).clamp(0, top).int()
    wide = scales.float()[:, index], zeros[:, index]
    codes = (torch.round(weight / wide[0]) + wide[1]).clamp(0, top).int()
    return Grouped(codes, scales, zeros, index, bits)


def words(rows: torch.Tensor, bits: int) -> torch.Tensor:
    """`[R, count]` codes to `[R, ceil(count * bits / 32)] int32`."""
    packed = []
    for row in rows.tolist():
        number = sum(code << bits * place for place, code in enumerate(row))
        count = -(-len(row) * bits // 32)
        packed.append([(number >> 32 * w) & 0xFFFFFFFF for w in range(count)])
    return _as_int32(packed)


def gptq(weight: Grouped, *, minus_one: bool = True, with_index: bool = True) -> dict[str, torch.Tensor]:
    """A layer's tensors. minus_one: checkpoint format "gptq", else "gptq_v2".

    The writers of "gptq" subtract one from every field by subtracting a word of ones, borrows and all.
    """
    zeros = words(weight.zeros.t(), weight.bits)
    if minus_one and weight.bits != 3:
        ones = sum(1 << weight.bits * field for field in range(32 // weight.bits))
        less = [[(word - ones) & 0xFFFFFFFF for word in row] for row in _unsigned(zeros)]
        zeros = _as_int32(less)
    elif minus_one:
        zeros = words((weight.zeros.t() - 1) % 8, 3)
    tensors = {"qweight": words(weight.codes, weight.bits).t(), "qzeros": zeros, "scales": weight.scales.t()}
    if with_index:
        tensors["g_idx"] = weight.index.int()
    return _contiguous(tensors)


def awq(weight: Grouped) -> dict[str, torch.Tensor]:
    """A layer's tensors in the "gemm" layout."""
    return _contiguous(
        {
            "qweight": _awq_words(weight.codes.t()),
            "qzeros": _awq_words(weight.zeros.t()),
            "scales": weight.scales.t(),
        }
    )


def compressed_tensors(
    weight: Grouped, *, packed: bool = True, symmetric: bool = True, packed_zeros: bool = True
) -> dict[str, torch.Tensor]:
    """A layer's tensors, "pack-quantized" or with plain int8 codes."""
    middle = 2 ** (weight.bits - 1)
    tensors = {"weight_scale": weight.scales}
    if packed:
        tensors["weight_packed"] = words(weight.codes, weight.bits)
        tensors["weight_shape"] = torch.tensor(weight.codes.shape)
    else:
        tensors["weight"] = (weight.codes - middle).to(torch.int8)
    if not symmetric and packed and packed_zeros:
        tensors["weight_zero_point"] = words(weight.zeros.t(), weight.bits).t()
    elif not symmetric:
        tensors["weight_zero_point"] = (weight.zeros - middle).to(torch.int8)
    return _contiguous(tensors)


def per_tensor(weight: Grouped) -> Grouped:
    """The same codes with one scale and one zero point for all, `[1, 1]`."""
    return replace(weight, scales=weight.scales[:1, :1], zeros=weight.zeros[:1, :1])


def _awq_words(rows: torch.Tensor) -> torch.Tensor:
    packed = []
    for row in rows.tolist():
        eights = [row[start : start + 8] for start in range(0, len(row), 8)]
        packed.append([sum(eight[o] << 4 * f for f, o in enumerate(AWQ_ORDER)) for eight in eights])
    return _as_int32(packed)


def _as_int32(unsigned: list[list[int]]) -> torch.Tensor:
    return torch.tensor(unsigned, dtype=torch.int64).to(torch.int32)


def _unsigned(packed: torch.Tensor) -> list[list[int]]:
    result: list[list[int]] = (packed.long() & 0xFFFFFFFF).tolist()
    return result


def _contiguous(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in tensors.items()}

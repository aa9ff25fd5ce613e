"""Choosing codes, scales and offsets for a weight: to nearest, by search, by half-quadratic splitting.

Purpose: float weights in, `QuantizedWeight` out, on any device, in plain torch.
Does not know: modules, files, where importances come from.
Invariant: codes are chosen last, against the scales and offsets as they are stored, so rounding those to
float16 costs no more than it must.

`importance` `[K]` (mean square of each input, from calibration) weighs squared errors; None counts all alike.

    nearest   the range of a group, divided evenly
    search    many scales around that range, each refitted by least squares to the codes it gives (what
              llama.cpp's quantizers do with an importance matrix); the best by weighted error
    gptq      scales as by search; each input's code makes up for the errors of those before (feedback.py)
    hqq       asymmetric only: zero points by half-quadratic splitting with an l_0.7 norm, 20 steps
              (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023)

Letters: N outputs, K inputs, G groups, S inputs of a group.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, cast, get_args

import torch
from torch.nn import functional

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.native.ops import Kernels
from memory_efficient_gpt.native.quantize import choose_codes, search_scales
from memory_efficient_gpt.quantization.feedback import with_feedback
from memory_efficient_gpt.quantization.fp8 import FP8_MAX
from memory_efficient_gpt.quantization.scheme import Scheme
from memory_efficient_gpt.quantization.storage import QuantizedWeight, choose_unit, pack_nibbles
from memory_efficient_gpt.triton_kernels.availability import triton_obstacle

Rounding = Literal["nearest", "search", "hqq", "gptq"]

_SHRINKS: Final = tuple(1.0 - 0.025 * i for i in range(-6, 19))  # of a group's range: 1.15 down to 0.55
_HQQ_STEPS: Final = 20
_HQQ_NORM: Final = 0.7
_HQQ_BETA: Final = 10.0
_HQQ_KAPPA: Final = 1.01
_TINY: Final = 1e-30
_LEAST: Final = 1e-9
PART_ELEMENTS: Final = 1 << 25
"""That are looked at together, in whole rows: their float32 copies take half a gigabyte at most."""


@dataclass(slots=True)
class _Groups:
    """A weight `[N, G, S] float32` and what its elements count, `[1, G, S]` (0 for padding)."""

    weight: torch.Tensor
    importance: torch.Tensor


def quantize_weight(
    weight: torch.Tensor,
    scheme: Scheme,
    *,
    rounding: Rounding = "search",
    importance: torch.Tensor | None = None,
    products: torch.Tensor | None = None,
    kernels: Kernels | None = None,
) -> QuantizedWeight:
    """Quantize a float weight `[N, K]`; the result is on the weight's device.

    products: what gptq needs, the mean of x^T x `[K, K] float32` of the layer's inputs x; their squares are
    the importance then.
    kernels: search and choose codes natively, for a weight on the CPU: 100 times as fast, and the same but
    for ties and float32's rounding.
    Raises ConfigError for a rounding that the scheme does not have, ValueError for NaN and infinity, and for
    gptq without products.
    """
    check_rounding(scheme, rounding)
    weight = weight.detach()
    if rounding == "gptq":
        if products is None:
            raise ValueError("gptq needs products of the layer's inputs")
        squares = products.diagonal().float()
        found = quantize_weight(weight, scheme, importance=squares, kernels=kernels)
        return with_feedback(weight, found, products)
    largest = float(torch.stack(torch.aminmax(weight)).abs().max())
    if not math.isfinite(largest):
        raise ValueError("weights hold NaN or infinity")
    if largest > 0.0 and not _LEAST < largest < 1.0 / _LEAST:  # squares would leave float32's range
        shift = 2.0 ** -math.frexp(largest)[1]
        scaled = quantize_weight(
            (weight.double() * shift).float(),
            scheme,
            rounding=rounding,
            importance=importance,
            kernels=kernels,
        )
        return replace(scaled, unit=scaled.unit / shift)
    native = kernels is not None and weight.is_cpu and rounding == "search" and scheme.granularity != "tensor"
    if native and scheme.kind == "int":
        return _native_search(cast(Kernels, kernels), weight, scheme, importance)
    parts = (
        [weight] if scheme.granularity == "tensor" else weight.split(max(1, PART_ELEMENTS // weight.shape[1]))
    )
    if scheme.kind == "fp8":
        return _to_fp8(weight.shape[1], parts, scheme)
    fits = [_fit(part.float(), scheme, rounding, importance) for part in parts]
    scales = torch.cat([scale for scale, _ in fits])
    offsets = None if scheme.symmetric else torch.cat([cast(torch.Tensor, offset) for _, offset in fits])
    return _store(weight.shape[1], parts, scheme, scales, offsets)


def check_rounding(scheme: Scheme, rounding: str) -> None:
    """Raises ConfigError unless the scheme can be rounded so."""
    if scheme.by_bitsandbytes:
        raise ConfigError(
            [f"{scheme} is for linear layers that bitsandbytes holds, quantized when a model is loaded. "
             "Use a scheme such as int4 or int8 here."]
        )  # fmt: skip
    if rounding not in get_args(Rounding):
        raise ConfigError([f"rounding {rounding!r} is unknown. Use one of {', '.join(get_args(Rounding))}."])
    if rounding == "hqq" and (scheme.kind != "int" or scheme.symmetric):
        raise ConfigError([f"hqq finds zero points, and {scheme} has none. Use search, or int4-asym-g64."])
    if rounding == "gptq" and scheme.kind != "int":
        raise ConfigError([f"gptq chooses integers, and {scheme} has none. Use search, or int4-g128."])


def rounding_of(scheme: Scheme, wanted: Rounding) -> Rounding:
    """How a scheme is rounded where `wanted` was asked for: hqq holds for schemes with zero points only, gptq
    for those with integers.

    Raises ConfigError for a rounding that there is not.
    """
    check_rounding(scheme, wanted if wanted not in ("hqq", "gptq") else "search")
    has = {"hqq": not scheme.symmetric, "gptq": scheme.kind == "int"}
    return wanted if has.get(wanted, True) else "search"


def _split(weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None) -> _Groups:
    n, k = weight.shape
    counts = (
        torch.ones(k, device=weight.device) if importance is None else importance.to(weight.device).float()
    )
    if scheme.granularity == "tensor":
        flat = counts.expand(n, k).reshape(1, 1, -1)
        return _Groups(weight.reshape(1, 1, -1), flat)
    size = scheme.group_size or k
    groups = scheme.num_groups(k)
    padding = groups * size - k
    if padding:
        weight, counts = functional.pad(weight, (0, padding)), functional.pad(counts, (0, padding))
    return _Groups(weight.view(n, groups, size), counts.view(1, groups, size))


def _fit(
    weight: torch.Tensor, scheme: Scheme, rounding: Rounding, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales `[N, G, 1]` and offsets (likewise, None for a symmetric scheme), in float32 as the weight is."""
    if rounding == "search":
        found = _search_by_kernel(weight, scheme, importance)
        if found is not None:
            return found
    groups = _split(weight, scheme, importance)
    if scheme.symmetric:
        if rounding == "nearest":
            return _largest(groups.weight) / (scheme.middle - 1), None
        return _search_symmetric(groups, scheme), None
    scales, offsets = _range(groups, scheme)
    if rounding == "search":
        return _search_asymmetric(groups, scheme, scales, offsets)
    if rounding == "hqq":
        return scales, _half_quadratic(groups, scheme, scales, offsets)
    return scales, offsets


def _largest(weight: torch.Tensor) -> torch.Tensor:
    return weight.abs().amax(-1, keepdim=True).clamp_min(_TINY)


def _search_symmetric(groups: _Groups, scheme: Scheme) -> torch.Tensor:
    """Codes reach one further below zero than above: the element of largest magnitude goes below."""
    weight = groups.weight
    place = weight.abs().argmax(-1, keepdim=True)
    extreme = weight.gather(-1, place)
    base = torch.where(extreme.abs() < _TINY, _TINY, -extreme / scheme.middle)
    best = torch.full_like(base, torch.inf)
    scales = base
    for shrink in _SHRINKS:
        codes = _signed_codes(weight, base * shrink, scheme)
        refitted = (groups.importance * weight * codes).sum(-1, keepdim=True)
        norm = (groups.importance * codes * codes).sum(-1, keepdim=True)
        scale = torch.where(norm > 0, refitted / norm.clamp_min(_TINY), base * shrink)
        error = (groups.importance * (weight - scale * codes).square()).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        scales = torch.where(better, scale, scales)
    return scales


def _search_by_kernel(
    weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """As the searches above, in one pass; None where there is no such kernel: it finds the same."""
    if scheme.granularity == "tensor" or triton_obstacle(weight.device) is not None:
        return None
    from memory_efficient_gpt.triton_kernels.search import can_search, search_scales

    if not can_search(scheme.group_size, weight.shape[1]):
        return None
    scales, offsets = search_scales(
        weight,
        bits=scheme.bits,
        group_size=scheme.group_size,
        symmetric=scheme.symmetric,
        importance=importance,
    )
    return scales.unsqueeze(-1), offsets.unsqueeze(-1) if offsets is not None else None


def _signed_codes(weight: torch.Tensor, scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return torch.round(weight / scale).clamp(-scheme.middle, scheme.middle - 1)


def _range(groups: _Groups, scheme: Scheme) -> tuple[torch.Tensor, torch.Tensor]:
    """The range of each group, zero included, divided evenly."""
    low = groups.weight.amin(-1, keepdim=True).clamp_max(0.0)
    high = groups.weight.amax(-1, keepdim=True).clamp_min(0.0)
    return ((high - low) / (2**scheme.bits - 1)).clamp_min(_TINY), -low


def _search_asymmetric(
    groups: _Groups, scheme: Scheme, scales: torch.Tensor, offsets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    weight, counts = groups.weight, groups.importance
    total = counts.sum(-1, keepdim=True).clamp_min(_TINY)
    mean_weight = (counts * weight).sum(-1, keepdim=True) / total
    middle = (2**scheme.bits - 1) / 2 * scales - offsets
    best = torch.full_like(scales, torch.inf)
    found = (scales, offsets)
    for shrink in _SHRINKS:
        trial = scales * shrink
        start = (2**scheme.bits - 1) / 2 * trial - middle
        codes = _codes(weight, trial, start, scheme)
        mean_code = (counts * codes).sum(-1, keepdim=True) / total
        spread = (counts * (codes - mean_code).square()).sum(-1, keepdim=True)
        common = (counts * (codes - mean_code) * (weight - mean_weight)).sum(-1, keepdim=True)
        usable = (spread > 0) & (common > 0)
        scale = torch.where(usable, common / spread.clamp_min(_TINY), trial)
        offset = torch.where(usable, scale * mean_code - mean_weight, start)
        error = (counts * (weight - (scale * codes - offset)).square()).sum(-1, keepdim=True)
        better = error < best
        best = torch.where(better, error, best)
        found = torch.where(better, scale, found[0]), torch.where(better, offset, found[1])
    return found


def _half_quadratic(
    groups: _Groups, scheme: Scheme, scales: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """Offsets that lessen the l_p norm of the errors: equations 4 to 8 of the paper, in units of a scale."""
    weight, beta = groups.weight, _HQQ_BETA
    present = (groups.importance > 0).float()
    count = present.sum(-1, keepdim=True).clamp_min(1.0)
    zero = offsets / scales
    best, found = torch.full_like(scales, torch.inf), zero
    for _ in range(_HQQ_STEPS):
        codes = torch.round(weight / scales + zero).clamp(0, 2**scheme.bits - 1)
        error = weight - scales * (codes - zero)
        size = (present * error.abs()).sum(-1, keepdim=True)
        better = size < best
        best, found = torch.where(better, size, best), torch.where(better, zero, found)
        magnitude = error.abs()
        kept = (magnitude - magnitude.clamp_min(1e-8).pow(_HQQ_NORM - 1) / beta).clamp_min(0) * error.sign()
        zero = (present * (codes - (weight - kept) / scales)).sum(-1, keepdim=True) / count
        beta *= _HQQ_KAPPA
    return found * scales


def _codes(weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    return torch.round((weight + offset) / scale).clamp(0, 2**scheme.bits - 1)


def _native_search(
    kernels: Kernels, weight: torch.Tensor, scheme: Scheme, importance: torch.Tensor | None
) -> QuantizedWeight:
    weight = weight.contiguous() if weight.dtype in (torch.float32, torch.bfloat16) else weight.float()
    scales, offsets = search_scales(
        kernels, weight, bits=scheme.bits, group_size=scheme.group_size, symmetric=scheme.symmetric,
        importance=importance,
    )  # fmt: skip
    unit, stored, stored_offsets = _as_stored(scales, offsets)
    codes = choose_codes(
        kernels, weight, stored.float() * unit,
        stored_offsets.float() * unit if stored_offsets is not None else None,
        bits=scheme.bits, group_size=scheme.group_size,
    )  # fmt: skip
    return QuantizedWeight(scheme, weight.shape[1], codes, stored, stored_offsets, torch.tensor(unit))


def _as_stored(
    scales: torch.Tensor, offsets: torch.Tensor | None
) -> tuple[float, torch.Tensor, torch.Tensor | None]:
    """The unit, and scales and offsets `[N, G]` over it in float16; a scale is never zero."""
    unit = choose_unit(float(scales.abs().max()))
    stored = (scales / unit).half()
    stored = torch.where(stored == 0, torch.finfo(torch.float16).smallest_normal, stored.float()).half()
    return unit, stored, (offsets / unit).half() if offsets is not None else None


def _store(
    num_inputs: int,
    parts: Sequence[torch.Tensor],
    scheme: Scheme,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
) -> QuantizedWeight:
    """Round scales and offsets to float16, choose codes of each part of the rows against them, pack."""
    unit, stored, stored_offsets = _as_stored(
        scales.squeeze(-1), offsets.squeeze(-1) if offsets is not None else None
    )
    rows = [len(part) if scheme.granularity != "tensor" else 1 for part in parts]
    steps = (stored.float() * unit).split(rows)
    shifts = (
        (stored_offsets.float() * unit).split(rows) if stored_offsets is not None else [None] * len(parts)
    )
    codes = [
        _packed_codes(part.float(), scheme, step, shift)
        for part, step, shift in zip(parts, steps, shifts, strict=True)
    ]
    return QuantizedWeight(
        scheme, num_inputs, torch.cat(codes), stored, stored_offsets, torch.tensor(unit, device=scales.device)
    )


def _packed_codes(
    weight: torch.Tensor, scheme: Scheme, scales: torch.Tensor, offsets: torch.Tensor | None
) -> torch.Tensor:
    """Codes of a weight `[N, K] float32` against scales and offsets `[N, G]` as they are stored, packed."""
    n, k = weight.shape
    groups = _split(weight, scheme, None)
    if offsets is not None:
        codes = _codes(groups.weight, scales.unsqueeze(-1), offsets.unsqueeze(-1), scheme)
    else:
        codes = _signed_codes(groups.weight, scales.unsqueeze(-1), scheme) + scheme.middle
    codes = codes.to(torch.uint8).reshape(n, -1)[:, :k].contiguous()
    return pack_nibbles(codes) if scheme.bits == 4 else codes


def _to_fp8(num_inputs: int, parts: Sequence[torch.Tensor], scheme: Scheme) -> QuantizedWeight:
    scales = torch.cat([_largest(part.float()) for part in parts]) / FP8_MAX
    unit = choose_unit(float(scales.max()))
    stored = (scales / unit).half().clamp_min(torch.finfo(torch.float16).smallest_normal)
    steps = (stored.float() * unit).split([len(part) for part in parts])
    codes = [
        (part.float() / step).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        for part, step in zip(parts, steps, strict=True)
    ]
    unit_tensor = torch.tensor(unit, device=scales.device)
    return QuantizedWeight(scheme, num_inputs, torch.cat(codes), stored, None, unit_tensor)

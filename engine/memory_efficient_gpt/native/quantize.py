"""The native search for scales and codes as functions of torch tensors.

Purpose: check what comes in, allocate the results, call the library.
Does not know: schemes, float16, how results are stored (quantization/rounding.py does).
Invariant: a group's numbers depend on that group only, not on threads.

Letters: N outputs, K inputs, G groups of inputs that share a scale.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_void_p

import torch

from memory_efficient_gpt.native.checks import describe, float_code
from memory_efficient_gpt.native.ops import Kernels, declare
from memory_efficient_gpt.native.packed_weight import BLOCK, PackedWeight, pack_parameters, spans_of


class _Sizes(ctypes.Structure):
    """MegptQuantizeSizes of quantize.cpp."""

    _fields_ = [(name, c_int64) for name in ("N", "K", "group", "groups", "bits", "dtype", "threads")]


def search_scales(
    kernels: Kernels,
    weight: torch.Tensor,
    *,
    bits: int,
    group_size: int | None,
    symmetric: bool,
    importance: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Scales and offsets `[N, G] float32` for weight `[N, K]` (float32 or bfloat16, contiguous).

    importance `[K]` weighs squared errors. Raises ValueError for other shapes, dtypes or layouts.
    """
    sizes = _sizes(kernels, weight, bits, group_size)
    if importance is not None:
        if importance.shape != weight.shape[1:]:
            raise ValueError(f"importance must be [{weight.shape[1]}], got {describe(importance)}")
        importance = importance.to(torch.float32).contiguous()
    scales = torch.empty(weight.shape[0], sizes.groups)
    offsets = None if symmetric else torch.empty_like(scales)
    function = declare(kernels.compiled.cdll.megpt_search_scales, *[c_void_p] * 5)
    function(
        scales.data_ptr(),
        None if offsets is None else offsets.data_ptr(),
        weight.data_ptr(),
        None if importance is None else importance.data_ptr(),
        ctypes.addressof(sizes),
    )
    return scales, offsets


def choose_codes(
    kernels: Kernels,
    weight: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    *,
    bits: int,
    group_size: int | None,
) -> torch.Tensor:
    """The nearest codes for weight `[N, K]` under scales and offsets `[N, G] float32`.

    `[N, K] uint8`, or `[N, ceil(K / 2)]` with two codes of 4 bits in a byte, the even input in the low half.
    """
    sizes = _sizes(kernels, weight, bits, group_size)
    for values in (scales, offsets):
        if values is not None and (values.shape != (len(weight), sizes.groups) or not values.is_contiguous()):
            raise ValueError(f"scales must be contiguous [N, {sizes.groups}], got {describe(values)}")
    n, k = weight.shape
    codes = torch.empty(n, (k + 1) // 2 if bits == 4 else k, dtype=torch.uint8)
    function = declare(kernels.compiled.cdll.megpt_choose_codes, *[c_void_p] * 5)
    function(
        codes.data_ptr(),
        weight.data_ptr(),
        scales.data_ptr(),
        None if offsets is None else offsets.data_ptr(),
        ctypes.addressof(sizes),
    )
    return codes


def pack_stored(
    kernels: Kernels,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor | None,
    unit: float,
    *,
    num_inputs: int,
    bits: int,
    group_size: int | None,
) -> PackedWeight:
    """As `packed_weight.pack`, from codes as `choose_codes` gives them, without unpacking them first."""
    n, width = codes.shape
    span, spans, per_group = spans_of(num_inputs, group_size)
    if codes.dtype is not torch.uint8 or not codes.is_contiguous() or not codes.is_cpu:
        raise ValueError(f"packing needs contiguous uint8 codes on the CPU, got {describe(codes)}")
    units = spans * span * bits // 32
    packed = torch.empty(-(-n // BLOCK), units, 4 * BLOCK, dtype=torch.uint8)
    function = declare(kernels.compiled.cdll.megpt_pack_codes, *[c_void_p] * 2, *[c_int64] * 5)
    function(packed.data_ptr(), codes.data_ptr(), n, width, units, bits, kernels.thread_limit())
    return PackedWeight(
        packed,
        pack_parameters(scales, n),
        pack_parameters(offsets, n) if offsets is not None else None,
        unit, n, num_inputs, bits, span, per_group,
    )  # fmt: skip


def _sizes(kernels: Kernels, weight: torch.Tensor, bits: int, group_size: int | None) -> _Sizes:
    if weight.dim() != 2 or not weight.is_contiguous() or not weight.numel():
        raise ValueError(f"quantizing needs a contiguous, non-empty weight [N, K], got {describe(weight)}")
    n, k = weight.shape
    group = group_size or k
    return _Sizes(n, k, group, -(-k // group), bits, float_code(weight), kernels.thread_limit())

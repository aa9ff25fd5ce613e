"""Whole numbers of a call to the native library, where they are too many for arguments of their own.

Purpose: the structures whose addresses calls pass.
Does not know: tensors, what the numbers mean to a kernel.
Invariant: fields, order and sizes are those of the C++ source that each names.
"""

from __future__ import annotations

import ctypes
from ctypes import c_int64


class AttentionSizes(ctypes.Structure):
    """MegptAttentionSizes of attention.cpp."""

    _fields_ = [
        (name, c_int64)
        for name in (
            *("T", "S", "Hq", "Hkv", "Dk", "Dv", "BS", "table_stride", "query_stride_t", "query_stride_h"),
            *("query_dtype", "cache_dtype", "window", "threads"),
        )
    ]


class WriteSizes(ctypes.Structure):
    """MegptWriteSizes of kv_cache.cpp."""

    _fields_ = [
        (name, c_int64)
        for name in (
            *("T", "Hkv", "Dk", "Dv", "key_stride_t", "key_stride_h", "value_stride_t", "value_stride_h"),
            *("source_dtype", "cache_dtype", "threads"),
        )
    ]


class QuantizedSizes(ctypes.Structure):
    """MegptQuantizedSizes of quantized_linear.cpp."""

    _fields_ = [
        (name, c_int64)
        for name in ("M", "N", "K", "bits", "span", "spans", "per_group", "x_stride", "dtype", "threads")
    ]

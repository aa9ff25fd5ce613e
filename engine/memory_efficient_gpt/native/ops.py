"""The native CPU kernels as functions of torch tensors.

Purpose: check shapes, dtypes and strides, allocate the result, call the library.
Does not know: modules, models, steps of the engine.
Invariant: a result does not depend on the number of threads, nor a row of it on the other rows.

Letters: M rows, K inputs, N outputs; R rows, D elements; T tokens, S sequences, H heads. Every function takes
float32 or bfloat16 CPU tensors (all of one dtype unless it says otherwise) and runs on at most
`Kernels.num_threads` threads, on fewer when the work is small.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from typing import Any, ClassVar, Final, Literal, cast

import torch

from memory_efficient_gpt.native.build import Isa, NativeLibrary, Unavailable, load_library
from memory_efficient_gpt.native.call_sizes import AttentionSizes, QuantizedSizes, WriteSizes
from memory_efficient_gpt.native.checks import (
    DTYPE_CODES,
    alike,
    check_cache,
    check_step,
    describe,
    float_code,
    last_contiguous,
    per_head,
    rows,
)
from memory_efficient_gpt.native.expert_stacks import ExpertsFunction, NativeStack
from memory_efficient_gpt.native.packed_weight import PackedWeight
from memory_efficient_gpt.native.replay import Function, NativeFunction

Activation = Literal["silu", "gelu_tanh", "gelu"]
NormStyle = Literal["round_then_scale", "one_plus_weight", "scale_then_round"]

_ACTIVATIONS: Final[dict[Activation, int]] = {"silu": 0, "gelu_tanh": 1, "gelu": 2}
_NORM_STYLES: Final[dict[NormStyle, int]] = {
    "round_then_scale": 0,
    "one_plus_weight": 1,
    "scale_then_round": 2,
}


def load_kernels(isa: Isa | None = None) -> Kernels | Unavailable:
    """The kernels, compiled now if they never were on this machine; loaded once for a process.

    isa: an instruction set to use; None takes $MEGPT_NATIVE_ISA, else the best that the CPU has.
    """
    library = load_library(isa)
    return library if isinstance(library, Unavailable) else _kernels_of(library)


@functools.cache
def _kernels_of(library: NativeLibrary) -> Kernels:
    return Kernels(library)


class Kernels:
    """The library's functions. `isa` is "amx", "avx512", "avx2" or "portable". Safe to share between threads.

    num_threads: threads of a call; None follows torch.get_num_threads(). deterministic: a row's result never
    depends on how many others there are.
    """

    num_threads: int | None = None
    device_type: ClassVar[str] = "cpu"
    deterministic: ClassVar[bool] = True
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset((torch.float32, torch.bfloat16))

    def __init__(self, library: NativeLibrary) -> None:
        cdll = library.cdll
        self.isa = library.isa
        self.compiled = library
        self._linear = NativeFunction(cdll.megpt_linear, Function.LINEAR, [*[c_void_p] * 4, *[c_int64] * 6])
        self._quantized_linear = NativeFunction(
            cdll.megpt_quantized_linear,
            Function.QUANTIZED_LINEAR,
            [*[c_void_p] * 7, c_float],
            QuantizedSizes,
        )
        self._rms_norm = NativeFunction(
            cdll.megpt_rms_norm, Function.RMS_NORM,
            [*[c_void_p] * 3, *[c_int64] * 3, c_float, *[c_int64] * 3],
        )  # fmt: skip
        self._gated = NativeFunction(cdll.megpt_gated, Function.GATED, [*[c_void_p] * 3, *[c_int64] * 7])
        self._rope = NativeFunction(cdll.megpt_rope, Function.ROPE, [*[c_void_p] * 3, *[c_int64] * 7])
        self._experts = ExpertsFunction(library)
        self._write = NativeFunction(cdll.megpt_write_kv, Function.WRITE_KV, [c_void_p] * 8, WriteSizes)
        self._attention = NativeFunction(
            cdll.megpt_attention, Function.ATTENTION, [*[c_void_p] * 12, c_float, c_float], AttentionSizes
        )

    def experts(
        self,
        x: torch.Tensor,
        index: torch.Tensor,
        weights: torch.Tensor,
        gate_up: NativeStack,
        down: NativeStack,
        activation: Activation,
    ) -> torch.Tensor:
        """x `[T, D]` through each token's experts: index `[T, k]` (E and beyond: none), weights `[T, k]`.

        An expert is down(activation(gate(x)) * up(x)); its stacks are `[E, 2 I, D]` and `[E, D, I]`. Results
        are summed in float32 in the order of the choices. Raises ValueError for other shapes.
        """
        return self._experts(x, index, weights, gate_up, down, _ACTIVATIONS[activation], self.thread_limit())

    def __reduce__(self) -> Any:
        """Raises TypeError: another process has its own library."""
        raise TypeError(
            "a model that computes with native kernels can't be pickled; write it with "
            "save_pretrained(folder), or pickle its state_dict()."
        )

    def __deepcopy__(self, memo: dict[int, object]) -> Kernels:
        """Itself: a copied model shares the library."""
        return self

    @property
    def label(self) -> str:
        """For people."""
        return f"native kernels ({self.isa})"

    def thread_limit(self) -> int:
        """The most threads that a call uses."""
        return self.num_threads or torch.get_num_threads()

    def multiplies(self, weight: torch.Tensor) -> bool:
        """Whether `linear` is the one to multiply weights `[N, K]` on this device: always."""
        return weight.is_cpu

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x `[..., K]` times weight `[N, K]` transposed, plus bias `[N]`: `[..., N]`. Sums are float32.

        Raises ValueError for other shapes, dtypes that differ, or a weight that is not contiguous.
        """
        flat, m, size, stride = rows(x)
        n, k = weight.shape
        if size != k or weight.dtype is not x.dtype or not weight.is_contiguous():
            raise ValueError(
                f"linear needs x [..., {k}] and a contiguous weight [N, {k}] of one dtype; "
                f"got {describe(x)} and {describe(weight)}"
            )
        if bias is not None and (bias.dtype is not x.dtype or bias.shape != (n,) or bias.stride(0) != 1):
            raise ValueError(f"linear needs a contiguous bias [{n}] of {x.dtype}, got {describe(bias)}")
        out = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
        self._linear(
            out.data_ptr(),
            flat.data_ptr(),
            weight.data_ptr(),
            None if bias is None else bias.data_ptr(),
            m,
            n,
            k,
            stride,
            float_code(x),
            self.thread_limit(),
        )
        return out

    def quantized_linear(
        self, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """x `[..., K]` times a quantized weight `[N, K]` transposed, plus bias `[N]`: `[..., N]`.

        x is rounded to 8 bits on the way, with a step for each row and span of inputs (largest magnitude
        127); products of a span are summed as integers, spans in float32. Method: quantized_linear.cpp.
        Raises ValueError for other shapes or dtypes.
        """
        flat, m, size, stride = rows(x)
        n, k = weight.num_outputs, weight.num_inputs
        if size != k:
            raise ValueError(f"quantized_linear needs x [..., {k}], got {describe(x)}")
        if bias is not None and (bias.dtype is not x.dtype or bias.shape != (n,) or bias.stride(0) != 1):
            raise ValueError(
                f"quantized_linear needs a contiguous bias [{n}] of {x.dtype}, got {describe(bias)}"
            )
        out = torch.empty((*x.shape[:-1], n), dtype=x.dtype)
        sizes = QuantizedSizes(
            *(m, n, k, weight.bits, weight.span, weight.num_spans, weight.per_group),
            *(stride, float_code(x), self.thread_limit()),
        )
        self._quantized_linear(
            out.data_ptr(),
            flat.data_ptr(),
            weight.codes.data_ptr(),
            weight.scales.data_ptr(),
            None if weight.offsets is None else weight.offsets.data_ptr(),
            None if bias is None else bias.data_ptr(),
            ctypes.addressof(sizes),
            weight.unit,
        )
        return out

    def rms_norm(
        self,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        style: NormStyle = "round_then_scale",
    ) -> torch.Tensor:
        """x `[..., D]` over its root mean square, times weight `[D]` (or 1 + weight); float32 inside.

        `style` says where a bfloat16 result is rounded. Raises ValueError for other shapes or dtypes.
        """
        flat, r, d, stride = rows(x)
        if weight is not None and (
            weight.dtype is not x.dtype or weight.shape != (d,) or weight.stride(0) != 1
        ):
            raise ValueError(f"rms_norm needs a contiguous weight [{d}] of {x.dtype}, got {describe(weight)}")
        out = alike(x)
        self._rms_norm(
            out.data_ptr(),
            flat.data_ptr(),
            None if weight is None else weight.data_ptr(),
            r,
            d,
            stride,
            eps,
            _NORM_STYLES[style],
            float_code(x),
            self.thread_limit(),
        )
        return out

    def gated(self, gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
        """activation(gate) * up for `[..., D]`, rounded to the dtype in between as torch would."""
        gate_rows, r, d, gate_stride = rows(gate)
        up_rows, _, _, up_stride = rows(up)
        if gate.shape != up.shape or gate.dtype is not up.dtype:
            raise ValueError(f"gated needs two tensors alike, got {describe(gate)} and {describe(up)}")
        out = alike(gate)
        self._gated(
            out.data_ptr(),
            gate_rows.data_ptr(),
            up_rows.data_ptr(),
            r,
            d,
            gate_stride,
            up_stride,
            _ACTIVATIONS[activation],
            float_code(gate),
            self.thread_limit(),
        )
        return out

    def apply_rope(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Turn x `[T, H, D]` in place by cos and sin `[T, P]`, P <= D and even.

        Element i of the first half of P turns with element i of the second, as `rotate_half` does in
        transformers; products and sums are rounded to the dtype one by one, as there.
        """
        t, h, d = x.shape
        p = cos.shape[-1]
        same = cos.shape == sin.shape == (t, p) and cos.dtype is x.dtype and sin.dtype is x.dtype
        whole = cos.is_contiguous() and sin.is_contiguous() and (x.stride(2) == 1 or d == 1)
        if not same or not whole or p > d or p % 2:
            raise ValueError(
                f"apply_rope needs x [T, H, D] and contiguous cos and sin [T, P], P <= D even, of one dtype; "
                f"got {describe(x)}, {describe(cos)} and {describe(sin)}"
            )
        self._rope(
            x.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            t,
            h,
            p,
            x.stride(0),
            x.stride(1),
            float_code(x),
            self.thread_limit(),
        )

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query and key `[1, H, T, D]` turned by cos and sin `[1, T, P]` as `apply_rope` does, copied."""
        turned = [last_contiguous(x.clone()) for x in (query, key)]  # the model may still need query and key
        for x in turned:
            self.apply_rope(x[0].transpose(0, 1), cos[0], sin[0])
        return turned[0], turned[1]

    def write_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        key_scale: torch.Tensor | None,
        value_scale: torch.Tensor | None,
        slots: torch.Tensor,
    ) -> None:
        """Store key `[T, Hkv, Dk]` and value `[T, Hkv, Dv]` at slots `[T] int64` of a contiguous cache.

        Caches `[N, BS, Hkv, D]` float32, bfloat16, or int8 with scales `[N, BS, Hkv] float32`: then
        x = scale * q with scale = max|x| / 127. Slots are not checked against the cache's size.
        """
        t, h, dk = key.shape
        dv = value.shape[2]
        check_cache(key_cache, value_cache, key_scale, value_scale)
        if value.shape[:2] != (t, h) or key_cache.shape[2:] != (h, dk) or value_cache.shape[2:] != (h, dv):
            raise ValueError(
                f"write_kv: {describe(key)} and {describe(value)} do not fit caches "
                f"{describe(key_cache)} and {describe(value_cache)}"
            )
        if slots.dtype is not torch.int64 or slots.shape != (t,) or not slots.is_contiguous():
            raise ValueError(f"write_kv needs contiguous slots [{t}] of int64, got {describe(slots)}")
        if value.dtype is not key.dtype:
            raise ValueError(f"write_kv needs one dtype, got {describe(key)} and {describe(value)}")
        key, value = last_contiguous(key), last_contiguous(value)
        sizes = WriteSizes(
            *(t, h, dk, dv, key.stride(0), key.stride(1), value.stride(0), value.stride(1)),
            *(float_code(key), DTYPE_CODES[key_cache.dtype], self.thread_limit()),
        )
        self._write(
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            None if key_scale is None else key_scale.data_ptr(),
            None if value_scale is None else value_scale.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
            slots.data_ptr(),
            ctypes.addressof(sizes),
        )

    def paged_attention(
        self,
        query: torch.Tensor,
        key_cache: torch.Tensor,
        value_cache: torch.Tensor,
        key_scale: torch.Tensor | None,
        value_scale: torch.Tensor | None,
        block_tables: torch.Tensor,
        query_starts: torch.Tensor,
        context_lens: torch.Tensor,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        sinks: torch.Tensor | None = None,
        alibi_slopes: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Causal attention of query `[T, Hq, Dk]` over paged caches: `[T, Hq, Dv]` in query's dtype.

        Caches as in `write_kv`; block_tables `[S, MB]`, query_starts `[S + 1]` and context_lens `[S]`, all
        int32; sinks and alibi_slopes `[Hq]` (float32, or converted). Tokens of no row come out as zeros.
        The contents of tables are not checked.
        Method: see attention.cpp. Raises ValueError for other shapes or dtypes.
        """
        t, hq, dk = query.shape
        _, bs, hkv, dv = value_cache.shape
        check_cache(key_cache, value_cache, key_scale, value_scale)
        if key_cache.shape[2:] != (hkv, dk) or hq % hkv:
            raise ValueError(f"query {describe(query)} does not fit caches {describe(key_cache)}")
        check_step(block_tables, query_starts, context_lens)
        query = last_contiguous(query)
        sinks = per_head("sinks", sinks, hq)
        slopes = per_head("alibi_slopes", alibi_slopes, hq)
        out = torch.empty((t, hq, dv), dtype=query.dtype)
        sizes = AttentionSizes(
            *(t, block_tables.shape[0], hq, hkv, dk, dv, bs, block_tables.stride(0)),
            *(query.stride(0), query.stride(1), float_code(query), DTYPE_CODES[key_cache.dtype]),
            *(window or 0, self.thread_limit()),
        )
        self._attention(
            out.data_ptr(),
            query.data_ptr(),
            key_cache.data_ptr(),
            value_cache.data_ptr(),
            None if key_scale is None else key_scale.data_ptr(),
            None if value_scale is None else value_scale.data_ptr(),
            block_tables.data_ptr(),
            query_starts.data_ptr(),
            context_lens.data_ptr(),
            None if sinks is None else sinks.data_ptr(),
            None if slopes is None else slopes.data_ptr(),
            ctypes.addressof(sizes),
            scale,
            softcap or 0.0,
        )
        return out


def declare(function: Any, *argtypes: type) -> Callable[..., None]:
    """A function of the library that returns nothing, with its arguments' C types."""
    function.argtypes = list(argtypes)
    function.restype = None
    return cast(Callable[..., None], function)

"""Launches of the small layers' kernels, from tensors on a CUDA device.

Purpose: RMS norms, gated activations and rotary positions for the layers of a fused model.
Does not know: models, modules, which layers may take them (fusion decides).
Invariant: no host synchronization, and no allocation but the results' (and copies of inputs with strides that
no launch takes), so launches can be captured in a CUDA graph once they ran before; sizes of tiles depend on a
row's size only, so a row alone gives the same bits as among others.
"""

from __future__ import annotations

from typing import Any, ClassVar, Final, Protocol

import torch
import triton
from torch.nn import functional

from memory_efficient_gpt.triton_kernels.availability import overlap_options
from memory_efficient_gpt.triton_kernels.dense import DTYPES, few_rows_linear, takes
from memory_efficient_gpt.triton_kernels.layer_kernels import gated_kernel, rms_norm_kernel, rotary_kernel
from memory_efficient_gpt.triton_kernels.row_strides import one_stride, two_strides

NORM_STYLES: Final = ("round_then_scale", "one_plus_weight", "scale_then_round")
ACTIVATIONS: Final = ("silu", "gelu_tanh", "gelu")
_NORM_TILE: Final = 512
_GATED_TILE: Final = 1024
_ROTARY_TILE: Final = 512
"""Elements of a program, where a row has fewer."""
_PER_THREAD: Final = 8
_MOST_WARPS: Final = 16


class Sum(Protocol):
    """A sum to compute (native/deferral.py)."""

    @property
    def left(self) -> torch.Tensor: ...
    @property
    def right(self) -> torch.Tensor: ...
    @property
    def out(self) -> torch.Tensor: ...


class TritonKernels:
    """The kernels of one process. Tensors must be on one CUDA device.

    deterministic: whether a row's product may not depend on the number of rows; all else never does.
    """

    label: ClassVar[str] = "Triton kernels"
    device_type: ClassVar[str] = "cuda"
    dtypes: ClassVar[frozenset[torch.dtype]] = frozenset((torch.float32, torch.bfloat16, torch.float16))

    def __init__(self, *, deterministic: bool = False) -> None:
        self.deterministic: Final = deterministic

    def __deepcopy__(self, memo: dict[int, object]) -> TritonKernels:
        """Itself: there is nothing to copy."""
        return self

    def multiplies(self, weight: torch.Tensor) -> bool:
        """Whether `linear` has a kernel for weight `[N, K]`, for some numbers of rows."""
        return weight.dtype in DTYPES and takes(1, weight, deterministic=self.deterministic)

    def linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x `[..., K]` times weight `[N, K]` transposed plus bias `[N]`: by our kernel where it is ahead, or
        deterministic."""
        rows, fixed = x.numel() // max(1, x.shape[-1]), self.deterministic
        if x.dtype is weight.dtype and takes(rows, weight, deterministic=fixed):
            return few_rows_linear(x, weight, bias, deterministic=fixed)
        return functional.linear(x, weight, bias)

    def rms_norm(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, style: str = "round_then_scale"
    ) -> torch.Tensor:
        """x `[..., D]` over its root mean square, times weight `[D]` (or 1 + weight); contiguous.

        `style` says where the result is rounded. Raises ValueError for other shapes, dtypes or styles.
        """
        return _normed(x, None, weight, eps, style)

    def sum_rms_norm(
        self, terms: Sum, weight: torch.Tensor, eps: float, style: str = "round_then_scale"
    ) -> torch.Tensor:
        """`rms_norm` of the sum, which is rounded to the dtype and written to `terms.out`.

        Both are those of two kernels bit for bit. The tensors of `terms` are contiguous and alike. Raises
        ValueError as `rms_norm`.
        """
        return _normed(terms.left, terms, weight, eps, style)

    def rms_norm_into(
        self, x: torch.Tensor, weight: torch.Tensor, eps: float, style: str, out: torch.Tensor
    ) -> None:
        """As `rms_norm`, into a contiguous tensor like x."""
        _normed(x, None, weight, eps, style, out)

    def gated(self, gate: torch.Tensor, up: torch.Tensor, activation: str) -> torch.Tensor:
        """activation(gate) * up for `[..., D]`, rounded to the dtype in between as torch would; contiguous.

        Raises ValueError for tensors that differ, or another activation.
        """
        same = gate.shape == up.shape and gate.dtype is up.dtype and gate.device == up.device
        if not same or activation not in ACTIVATIONS:
            raise ValueError(
                f"gated needs two tensors alike and an activation of {ACTIVATIONS}; "
                f"got {_describe(gate)}, {_describe(up)} and {activation!r}"
            )
        out = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
        size = gate.shape[-1]
        if out.numel() == 0:
            return out
        gate, gate_stride = one_stride(gate)
        up, up_stride = one_stride(up)
        block = min(_GATED_TILE, triton.next_power_of_2(size))
        with _device(gate):
            gated_kernel[(out.numel() // size, -(-size // block))](
                gate, up, out, gate_stride, up_stride, size, BLOCK=block, activation=activation,
                num_warps=warps_for(block), **overlap_options(gate.device),
            )  # fmt: skip
        return out

    def rotate(
        self, query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """query `[1, Hq, T, D]` and key `[1, Hk, T, D]` turned by cos and sin `[1, T, P]`, P <= D and even.

        Element i of the first half of P turns with element i of the second; products and sums are rounded to
        the dtype one by one. The results are views of contiguous `[1, T, H, D]`; the rest is copied.
        Raises ValueError for other shapes or dtypes.
        """
        check_rotary(query, key, cos, sin)
        turned = _turned_like(query), _turned_like(key)
        self.rotate_into(query, key, cos, sin, turned)
        return turned

    def rotate_into(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        out: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """As `rotate`, into tensors of the same shapes that are views of contiguous `[1, T, H, D]`."""
        check_rotary(query, key, cos, sin)
        tokens, size = query.shape[2:]
        query, key, cos, sin = (last_adjacent(x) for x in (query, key, cos, sin))
        part = cos.shape[2]
        half, block = rotary_sizes(query, key, part)
        if tokens:
            blocks = -(-query.shape[1] // block) - (-key.shape[1] // block)
            with _device(query):
                rotary_kernel[(tokens, blocks)](
                    query, key, cos, sin, *out, query.stride(2), query.stride(1), key.stride(2),
                    key.stride(1), cos.stride(1), sin.stride(1), HQ=query.shape[1], HK=key.shape[1], D=size,
                    P=part, HALF=half, REST=triton.next_power_of_2(max(1, size - part)), BLOCK=block,
                    num_warps=warps_for(2 * block * half), enable_fp_fusion=False,
                    **overlap_options(query.device),
                )  # fmt: skip


def _normed(
    x: torch.Tensor,
    terms: Sum | None,
    weight: torch.Tensor,
    eps: float,
    style: str,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """terms: those of the sum to compute and normalize, of which x is one; None: x itself."""
    size = x.shape[-1]
    same = weight.dtype is x.dtype and weight.device == x.device and weight.shape == (size,)
    if not same or weight.stride(0) != 1 or style not in NORM_STYLES:
        raise ValueError(
            f"rms_norm needs a contiguous weight [{size}] of {x.dtype} and a style of {NORM_STYLES}; "
            f"got {_describe(weight)} and {style!r}"
        )
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows = out.numel() // size if size else 0
    if rows == 0:
        return out
    x, inner, outer_stride, inner_stride = two_strides(x)
    block = triton.next_power_of_2(size)
    rows_of_tile = max(1, _NORM_TILE // block)
    other, total = (x, x) if terms is None else (terms.right, terms.out)
    with _device(x):
        rms_norm_kernel[(-(-rows // rows_of_tile),)](
            x, other, total, weight, out, rows, inner, outer_stride, inner_stride, eps, D=size, BLOCK=block,
            R=rows_of_tile, style=style, adds=terms is not None, num_warps=warps_for(block * rows_of_tile),
            **overlap_options(x.device),
        )  # fmt: skip
    return out


def _turned_like(x: torch.Tensor) -> torch.Tensor:
    _, heads, tokens, size = x.shape
    return torch.empty((1, tokens, heads, size), dtype=x.dtype, device=x.device).transpose(1, 2)


def rotary_sizes(query: torch.Tensor, key: torch.Tensor, part: int) -> tuple[int, int]:
    """Half of the elements that turn as a power of two, and the heads of a program."""
    half: int = triton.next_power_of_2(part // 2)
    most_heads: int = triton.next_power_of_2(max(query.shape[1], key.shape[1]))
    return half, min(most_heads, max(1, _ROTARY_TILE // half))


def check_rotary(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
    """Raises ValueError for what `TritonKernels.rotate` does not take."""
    tensors = (query, key, cos, sin)
    alike = len({(x.dtype, x.device) for x in tensors}) == 1
    if alike and query.dim() == key.dim() == 4 and cos.dim() == 3:
        tokens, size = query.shape[2:]
        part = cos.shape[2]
        shapes = query.shape[0] == key.shape[0] == 1 and key.shape[2:] == (tokens, size)
        if shapes and cos.shape == sin.shape == (1, tokens, part) and 0 < part <= size and part % 2 == 0:
            return
    raise ValueError(
        "rotate needs query and key [1, H, T, D] and cos and sin [1, T, P], P <= D even, of one dtype and "
        f"device; got {', '.join(map(_describe, tensors))}"
    )


def last_adjacent(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def warps_for(elements: int) -> int:
    """Warps of a program with so many elements, a power of two."""
    return min(_MOST_WARPS, max(1, elements // (32 * _PER_THREAD)))


def _describe(x: torch.Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)} on {x.device}"


def _device(x: torch.Tensor) -> Any:
    return torch.cuda.device(x.device)

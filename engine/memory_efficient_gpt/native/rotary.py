"""Rotary positions of an attention module by the native kernel.

Purpose: a subclass of a model's attention class whose `forward` is the same code, but turns queries and keys
with the kernel; and the function it calls instead of transformers'.
Does not know: which modules may take it (fusion decides).
Invariant: transformers' own module is not changed; what the kernel can't take goes to the model's function.

Nearly all rotary models of transformers call a function of one name, found among their module's globals. The
subclass runs `forward` with a copy of those globals in which that one name is ours.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import FunctionType
from typing import Any, Final

import torch
from torch import nn

from memory_efficient_gpt.native.layers import DTYPES
from memory_efficient_gpt.native.ops import Kernels

FUNCTION_NAME: Final = "apply_rotary_pos_emb"
_MARK: Final = "turns_natively"

Rotary = Callable[..., Any]


def rotary_function(own: type[nn.Module]) -> Rotary | None:
    """The function with which the class's `forward` turns queries and keys; None if it names none."""
    forward = own.forward
    if not isinstance(forward, FunctionType) or FUNCTION_NAME not in forward.__code__.co_names:
        return None
    function = forward.__globals__.get(FUNCTION_NAME)
    return function if callable(function) else None


def native_rotary(kernels: Kernels, own: Rotary) -> Rotary:
    """As `own(query, key, cos, sin)`, for tensors that the kernel takes; `own` itself for all others."""

    def apply_rotary_pos_emb(
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *rest: Any,
        **options: Any,
    ) -> Any:
        if rest or options or not _takes(query, key, cos, sin):
            return own(query, key, cos, sin, *rest, **options)
        return _turned(kernels, query, cos, sin), _turned(kernels, key, cos, sin)

    return apply_rotary_pos_emb


@functools.cache
def with_native_rotary(own: type[nn.Module], kernels: Kernels) -> type[nn.Module]:
    """A subclass of `own` that turns queries and keys with the kernel."""
    forward: Any = own.forward
    replaced = {FUNCTION_NAME: native_rotary(kernels, forward.__globals__[FUNCTION_NAME])}
    copy = FunctionType(
        forward.__code__,
        {**forward.__globals__, **replaced},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    functools.update_wrapper(copy, forward)
    copy.__kwdefaults__ = forward.__kwdefaults__
    namespace = {"__module__": own.__module__, "forward": copy, _MARK: True}
    return type(f"NativeRotary{own.__name__}", (own,), namespace)


def has_native_rotary(module: nn.Module) -> bool:
    """Whether its class is one of `with_native_rotary`."""
    return getattr(type(module), _MARK, False)


def _takes(query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> bool:
    """Whether these are one packed row on the CPU: query and key `[1, H, T, D]`, cos and sin `[1, T, P]`."""
    dtype = query.dtype
    alike = dtype in DTYPES and dtype is key.dtype is cos.dtype is sin.dtype and query.is_cpu
    if not alike or torch.is_grad_enabled() or query.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    size = cos.shape[2]
    return (
        query.shape[0] == key.shape[0] == cos.shape[0] == 1
        and query.shape[2] == key.shape[2] == cos.shape[1]
        and query.shape[3] == key.shape[3] == size
        and size % 2 == 0
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


def _turned(kernels: Kernels, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    turned = x.clone()  # the kernel works in place, and the model may still need x
    heads = turned[0].transpose(0, 1)
    if heads.stride(2) != 1:
        turned = x.contiguous().clone()
        heads = turned[0].transpose(0, 1)
    kernels.apply_rope(heads, cos[0], sin[0])
    return turned

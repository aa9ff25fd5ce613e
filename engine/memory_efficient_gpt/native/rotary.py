"""Rotary positions of an attention module by a kernel.

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

from memory_efficient_gpt.native.deferral import current_deferral
from memory_efficient_gpt.native.deferred_calls import DeferredTurn, TurningKernels
from memory_efficient_gpt.native.layers import LayerKernels

FUNCTION_NAME: Final = "apply_rotary_pos_emb"
_MARK: Final = "turns_with"

Rotary = Callable[..., Any]


def rotary_function(own: type[nn.Module]) -> Rotary | None:
    """The function with which the class's `forward` turns queries and keys; None if it names none."""
    forward = own.forward
    if not isinstance(forward, FunctionType) or FUNCTION_NAME not in forward.__code__.co_names:
        return None
    function = forward.__globals__.get(FUNCTION_NAME)
    return function if callable(function) else None


def native_rotary(kernels: LayerKernels, own: Rotary, *, partial: bool = False) -> Rotary:
    """As `own(query, key, cos, sin)`, for tensors that the kernel takes; `own` itself for all others.

    partial: whether the kernel may turn the first elements of a head only, where cos has fewer than a head.
    """

    def apply_rotary_pos_emb(
        query: torch.Tensor,
        key: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *rest: Any,
        **options: Any,
    ) -> Any:
        if rest or options or not _takes(kernels, query, key, cos, sin, partial=partial):
            return own(query, key, cos, sin, *rest, **options)
        deferral = current_deferral()
        if deferral is not None and deferral.defers("turns") and isinstance(kernels, TurningKernels):
            return deferral.put_turn(
                DeferredTurn(kernels, query, key, cos, sin, (unturned(query), unturned(key)))
            )
        return kernels.rotate(query, key, cos, sin)

    return apply_rotary_pos_emb


def unturned(x: torch.Tensor) -> torch.Tensor:
    """An uninitialised tensor for x `[1, H, T, D]` turned: a view of a contiguous `[1, T, H, D]`."""
    _, heads, tokens, size = x.shape
    return torch.empty((1, tokens, heads, size), dtype=x.dtype, device=x.device).transpose(1, 2)


@functools.cache
def with_native_rotary(own: type[nn.Module], kernels: LayerKernels, partial: bool = False) -> type[nn.Module]:
    """A subclass of `own` that turns queries and keys with the kernel."""
    forward: Any = own.forward
    turn = native_rotary(kernels, forward.__globals__[FUNCTION_NAME], partial=partial)
    replaced = {FUNCTION_NAME: turn}
    copy = FunctionType(
        forward.__code__,
        {**forward.__globals__, **replaced},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    functools.update_wrapper(copy, forward)
    copy.__kwdefaults__ = forward.__kwdefaults__
    namespace = {"__module__": own.__module__, "forward": copy, _MARK: kernels}
    return type(f"NativeRotary{own.__name__}", (own,), namespace)


def rotary_kernels(module: nn.Module) -> LayerKernels | None:
    """Those of its class, if that is one of `with_native_rotary`."""
    kernels: LayerKernels | None = getattr(type(module), _MARK, None)
    return kernels


def _takes(
    kernels: LayerKernels,
    query: torch.Tensor,
    key: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    partial: bool,
) -> bool:
    """Whether these are one packed row on the kernels' device: `[1, H, T, D]`, cos and sin `[1, T, P]`."""
    dtype = query.dtype
    alike = dtype in kernels.dtypes and dtype is key.dtype is cos.dtype is sin.dtype
    here = query.device.type == kernels.device_type
    if not alike or not here or torch.is_grad_enabled():
        return False
    if query.dim() != 4 or key.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape:
        return False
    size = cos.shape[2]
    return (
        query.shape[0] == key.shape[0] == cos.shape[0] == 1
        and query.shape[2] == key.shape[2] == cos.shape[1]
        and query.shape[3] == key.shape[3]
        and (query.shape[3] == size or (partial and 0 < size < query.shape[3]))
        and size % 2 == 0
        and cos.is_contiguous()
        and sin.is_contiguous()
    )

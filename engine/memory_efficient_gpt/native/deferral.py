"""Calls that wait for the next one, so that one kernel may compute both.

Purpose: residual sums that wait for a norm; rotary turns, and norms over heads before them, that wait for the
cache's write.
Does not know: models, kernels; which kinds of calls are worth it (fusion/deferral_trial.py).
Invariant: program order. Whatever torch is asked for next that touches any data computes first what waits, in
order, so that no code of a model can tell whether its calls have waited. Views and shapes touch none.

Within a `Deferral` torch hands over every call before it does it (`TorchFunctionMode`). A sum of two tensors
alike gives a new tensor without contents, and waits. If an RMS norm of ours is asked for that very tensor, it
takes the sum and one kernel computes sum and norm; anything else finds the sum computed. What torch does not
hand over (scripted functions, foreign code that reads an address by its own ways) could see a tensor that has
no contents yet: `poison` fills them with NaN, so that a trial shows it.

Each call of torch costs its host some microseconds more here: for steps that are captured once and replayed,
and for large ones, whose host has time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import replace
from typing import Any, Final, Literal, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from memory_efficient_gpt.native.deferred_calls import DeferredHeadNorm, DeferredSum, DeferredTurn

DeferredKind = Literal["sums", "turns", "head_norms"]

_SUMS: Final = frozenset((torch.Tensor.add, torch.add))
"""`a + b` comes as the first."""
_GETTERS: Final = (
    "shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_cpu", "is_meta", "is_nested", "is_sparse",
    "is_quantized", "requires_grad", "itemsize", "nbytes",
)  # fmt: skip
_METHODS: Final = (
    "size", "dim", "stride", "numel", "is_contiguous", "element_size", "is_inference", "is_floating_point",
    "get_device", "ndimension",
)  # fmt: skip
_VIEWS: Final = frozenset(
    (torch.Tensor.transpose, torch.Tensor.view, torch.Tensor.narrow, torch.Tensor.unflatten)
)
"""They touch no data."""
_METADATA: Final[frozenset[Any]] = frozenset(
    [getattr(torch.Tensor, name).__get__ for name in _GETTERS]
    + [getattr(torch.Tensor, name) for name in _METHODS]
    + [torch.empty, torch.empty_like]
)
"""What is known of a tensor without its contents, and new ones without any."""


_Call = TypeVar("_Call", DeferredSum, DeferredTurn)
_Waiting = DeferredSum | DeferredTurn | DeferredHeadNorm


class Deferral(TorchFunctionMode):
    """A context in which calls of some kinds wait; it is left with none waiting.

    taken: by kind, the calls that another kernel computed along.
    """

    def __init__(self, kinds: frozenset[DeferredKind], *, poison: bool = False) -> None:
        """poison: results that are not computed yet are NaN, for a trial."""
        super().__init__()
        self.taken: Counter[DeferredKind] = Counter()
        self._kinds = kinds
        self._poison = poison
        self._waiting: list[_Waiting] = []
        self._known: list[tuple[torch.Tensor, DeferredHeadNorm]] = []
        self._inside = 0
        self._token: Token[Deferral | None] | None = None

    def __enter__(self) -> Deferral:
        super().__enter__()  # type: ignore[no-untyped-call]  # torch's has no types
        self._token = _current.set(self)
        return self

    def __exit__(self, *error: Any) -> None:
        if self._token is not None:
            _current.reset(self._token)
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # likewise
        if error[0] is None:
            self._settle()
        self._forget()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if self._inside or func in _METADATA or _owns_storage(func, args):
            return func(*args, **(kwargs or {}))
        self._inside += 1  # torch hands over nothing that is called from here
        try:
            if func in _VIEWS:
                return self._view(func, args, kwargs or {})
            self._settle()
            if func in _SUMS and not kwargs and "sums" in self._kinds and _can_wait(args):
                left, right = args
                out = torch.empty_like(left)
                self._put(DeferredSum(left, right, out))
                return out
            return func(*args, **(kwargs or {}))
        finally:
            self._inside -= 1

    def defers(self, kind: DeferredKind) -> bool:
        """Whether such a call may wait now."""
        return kind in self._kinds and not self._inside

    def put_turn(self, call: DeferredTurn) -> tuple[torch.Tensor, torch.Tensor]:
        """Let a call wait, where `defers`, with the norms before it if they do; returns its outputs."""
        norms = self._norms_of(call)
        if norms is None:
            self._settle()
        else:
            self._forget()
            call = replace(call, norms=norms)
        self._put(call)
        return call.outputs

    def put_norm(self, call: DeferredHeadNorm) -> torch.Tensor:
        """Let a call wait, where `defers`, beside one before it; returns its output."""
        if len(self._waiting) > 1 or not all(isinstance(c, DeferredHeadNorm) for c in self._waiting):
            self._settle()
        self._put(call)
        self._known.append((call.out, call))
        return call.out

    def take(self, kind: type[_Call], *outputs: torch.Tensor) -> _Call | None:
        """The call that waits, if these are its very outputs; the caller computes them now."""
        call = self._waiting[0] if len(self._waiting) == 1 else None
        if not isinstance(call, kind) or any(a is not b for a, b in zip(call.outputs, outputs, strict=True)):
            return None
        self._forget()
        if isinstance(call, DeferredSum):
            self.taken["sums"] += 1
        else:
            self.taken["turns"] += 1
            if call.norms is not None:
                self.taken["head_norms"] += len(call.norms)
        return call

    def _view(self, func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """A view of a tensor; one that has heads before tokens stays known as its norm's."""
        view = func(*args, **kwargs)
        norm = self._norm_of(args[0])
        if func is torch.Tensor.transpose and norm is not None and args[0] is norm.out and args[1:] == (1, 2):
            self._known.append((view, norm))
        return view

    def _norm_of(self, x: torch.Tensor) -> DeferredHeadNorm | None:
        """The norm that waits whose output is x, or is seen with heads first through x."""
        return next((norm for known, norm in self._known if known is x), None)

    def _norms_of(self, call: DeferredTurn) -> tuple[DeferredHeadNorm, DeferredHeadNorm] | None:
        """Those that wait for nothing but this turn."""
        query, key = self._norm_of(call.query), self._norm_of(call.key)
        if query is None or key is None or query is key or len(self._waiting) != 2:
            return None
        if query.style != key.style or query.x.shape[3] != key.x.shape[3]:
            return None
        return query, key

    def _put(self, call: _Waiting) -> None:
        if self._poison:
            self._inside += 1  # not a call of the model
            for tensor in call.outputs:
                tensor.fill_(torch.nan)
            self._inside -= 1
        self._waiting.append(call)

    def _settle(self) -> None:
        calls = self._waiting
        self._forget()
        self._inside += 1  # what they call does not wait
        try:
            for call in calls:
                call.compute()
        finally:
            self._inside -= 1

    def _forget(self) -> None:
        self._waiting, self._known = [], []


_current: ContextVar[Deferral | None] = ContextVar("megpt_deferral", default=None)


def current_deferral() -> Deferral | None:
    """The one around the running code."""
    return _current.get()


def _owns_storage(func: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether a parameter is asked for its storage: it is nothing that waits."""
    return func is torch.Tensor.untyped_storage and type(args[0]) is nn.Parameter


def _can_wait(args: Sequence[Any]) -> bool:
    """Whether this is a sum of two plain tensors alike, rows of numbers in one piece each."""
    if len(args) != 2 or torch.is_grad_enabled():
        return False
    left, right = args
    return (
        type(left) is torch.Tensor
        and type(right) is torch.Tensor
        and left.shape == right.shape
        and left.dtype is right.dtype
        and left.device == right.device
        and left.dtype.is_floating_point
        and left.dim() >= 2
        and left.numel() > 0
        and left.is_contiguous()
        and right.is_contiguous()
    )


def deferring(kinds: frozenset[DeferredKind]) -> AbstractContextManager[object]:
    """A `Deferral` of these kinds, or nothing where there are none."""
    return Deferral(kinds) if kinds else nullcontext()

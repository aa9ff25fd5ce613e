"""Calls of the native library as data, and all of them in one call.

Purpose: functions that tell a recorder of their calls; a list of calls that the library does by itself.
Does not know: what is recorded, models.
Invariant: a replayed call gets the arguments that it was recorded with; whole numbers behind an address that
the caller owns are copied.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from contextvars import ContextVar
from ctypes import c_float, c_int64, c_void_p
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, Protocol

_INTEGERS: Final = 12
_FLOATS: Final = 2


class Function(IntEnum):
    """As in replay.cpp."""

    LINEAR = 0
    QUANTIZED_LINEAR = 1
    RMS_NORM = 2
    GATED = 3
    ROPE = 4
    WRITE_KV = 5
    ATTENTION = 6
    ADD = 7
    COPY = 8
    EXPERTS = 9


class _Call(ctypes.Structure):
    """MegptCall of replay.cpp."""

    _fields_ = [("function", c_int64), ("n", c_int64 * _INTEGERS), ("x", c_float * _FLOATS)]


@dataclass(slots=True)
class NativeCall:
    """integers: addresses and whole numbers; sizes: what must stay in memory for them."""

    function: Function
    integers: list[int]
    floats: list[float] = field(default_factory=list)
    sizes: ctypes.Structure | None = None


class CallRecorder(Protocol):
    """Who wants to know of calls."""

    def note_native(self, call: NativeCall) -> None:
        """A call was just done."""


recorder: ContextVar[CallRecorder | None] = ContextVar("megpt_call_recorder", default=None)


class NativeFunction:
    """A function of the library that returns nothing; its calls are noted where there is a recorder."""

    def __init__(
        self,
        function: Any,
        which: Function,
        argtypes: Sequence[type],
        sizes: type[ctypes.Structure] | None = None,
    ) -> None:
        """sizes: the structure whose address is the last argument that is no float."""
        function.argtypes = list(argtypes)
        function.restype = None
        self._function = function
        self._which = which
        self._is_float = [kind is c_float for kind in argtypes]
        self._sizes = sizes

    def __call__(self, *arguments: Any) -> None:
        self._function(*arguments)
        listener = recorder.get()
        if listener is not None:
            listener.note_native(self._as_call(arguments))

    def _as_call(self, arguments: Sequence[Any]) -> NativeCall:
        integers = [value or 0 for value, real in zip(arguments, self._is_float, strict=True) if not real]
        floats = [value for value, real in zip(arguments, self._is_float, strict=True) if real]
        sizes = None
        if self._sizes is not None:
            sizes = self._sizes.from_buffer_copy(self._sizes.from_address(integers[-1]))
            integers[-1] = ctypes.addressof(sizes)
        return NativeCall(self._which, integers, floats, sizes)


class NativeRun:
    """Calls that follow each other, as one."""

    def __init__(self, cdll: Any, calls: Sequence[NativeCall]) -> None:
        self._function = cdll.megpt_replay
        self._function.argtypes = [c_void_p, c_int64]
        self._function.restype = None
        self._sizes = [call.sizes for call in calls]
        self._calls = (_Call * len(calls))()
        for entry, call in zip(self._calls, calls, strict=True):
            entry.function = call.function
            entry.n[: len(call.integers)] = call.integers
            entry.x[: len(call.floats)] = call.floats

    def __len__(self) -> int:
        return len(self._calls)

    def __call__(self) -> None:
        self._function(self._calls, len(self._calls))

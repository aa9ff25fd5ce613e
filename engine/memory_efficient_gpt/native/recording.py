"""What a function does with tensors, recorded once and done again without Python's way there.

Purpose: note every call of torch and of the native library while some code runs; replay them on the same
memory.
Does not know: models, steps, engines.
Invariant: a replay reads what its inputs' memory holds then, and leaves in the recorded tensors' memory
what the code would have left; code that reads numbers to decide something is refused, as far as torch
tells of it. Whoever records must compare a replay with the code once, for what torch does not tell.

The native library's calls between two of torch are done in one call; sums of two tensors alike and copies
within the host's memory become the library's as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from memory_efficient_gpt.native.arena import Arena, is_dense
from memory_efficient_gpt.native.build import NativeLibrary
from memory_efficient_gpt.native.checks import DTYPE_CODES
from memory_efficient_gpt.native.replay import Function, NativeCall, NativeRun, recorder

_ATEN: Final = torch.ops.aten
_EMPTY: Final = frozenset(
    (
        _ATEN.empty.memory_format,
        _ATEN.empty_like.default,
        _ATEN.empty_strided.default,
        _ATEN.new_empty.default,
    )
)
_REFUSED_TAGS: Final = frozenset(
    (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape, torch.Tag.nondeterministic_seeded)
)
_ANSWERS: Final = frozenset((_ATEN.is_nonzero.default, _ATEN.equal.default, _ATEN.item.default))
_HOST_READS: Final = frozenset((torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.__array__))
_ADDED: Final = (torch.float32, torch.bfloat16)


class NotRecordableError(RuntimeError):
    """The code does what a replay could not do again."""


class Recording:
    """Calls to be done again, and the memory that they work in."""

    def __init__(
        self, steps: Sequence[Callable[[], object]], tensors: Sequence[torch.Tensor], arena: Arena
    ) -> None:
        """tensors: what else they read or write; held, so that addresses stay theirs."""
        self._steps = list(steps)
        self._tensors = list(tensors)
        self._arena = arena

    @property
    def num_bytes(self) -> int:
        """Memory of its own, for what lies between inputs and results."""
        return self._arena.num_bytes

    @property
    def num_native(self) -> int:
        """Calls that the native library does by itself."""
        return sum(len(step) for step in self._steps if isinstance(step, NativeRun))

    @property
    def num_torch(self) -> int:
        """Calls of torch."""
        return sum(not isinstance(step, NativeRun) for step in self._steps)

    def replay(self) -> None:
        """Do them again."""
        for step in self._steps:
            step()


@contextmanager
def recording(library: NativeLibrary) -> Iterator[Recorder]:
    """What runs within is recorded; `Recorder.finish` gives it. Raises NotRecordableError from within."""
    noted = Recorder(library)
    token = recorder.set(noted)
    try:
        with _NoHostReads(), noted:
            yield noted
    finally:
        recorder.reset(token)


class Recorder(TorchDispatchMode):
    """Notes calls, in order. For tensors on the CPU."""

    def __init__(self, library: NativeLibrary) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's has no types
        self._cdll = library.cdll
        self._steps: list[Callable[[], object] | NativeCall] = []
        self._arena = Arena()
        self._tensors: dict[int, torch.Tensor] = {}  # by storage

    def finish(self) -> Recording:
        """All that was noted."""
        steps: list[Callable[[], object]] = []
        run: list[NativeCall] = []
        for step in [*self._steps, None]:
            if isinstance(step, NativeCall):
                run.append(step)
                continue
            if run:
                steps.append(NativeRun(self._cdll, run))
                run = []
            if step is not None:
                steps.append(step)
        return Recording(steps, list(self._tensors.values()), self._arena)

    def note_native(self, call: NativeCall) -> None:
        """A call of the native library."""
        self._steps.append(call)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        _refuse_what_reads(func, args, inputs)
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if func._schema.is_mutable:
            self._steps.append(_copy_of(func, args) or _again(func, args, kwargs))
        elif outputs and not _shares(outputs, inputs):
            result = tree_map(self._moved, result)
            if func not in _EMPTY:
                outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
                self._steps.append(
                    _native_form(func, args, kwargs, result) or _into(func, args, kwargs, outputs)
                )
        self._hold(inputs)
        return result

    def _moved(self, leaf: Any) -> Any:
        """A new tensor in the arena, where it can be."""
        moved = self._arena.like(leaf) if isinstance(leaf, torch.Tensor) else None
        if moved is None:
            self._hold([leaf] if isinstance(leaf, torch.Tensor) else [])
            return leaf
        return moved.copy_(leaf)

    def _hold(self, tensors: Sequence[torch.Tensor]) -> None:
        """Keep those that are not the arena's: calls of the library know nothing but addresses."""
        for tensor in tensors:
            if not self._arena.owns(tensor):
                self._tensors[tensor.untyped_storage()._cdata] = tensor


class _NoHostReads(TorchFunctionMode):
    """Refuses what torch does without telling a dispatch mode."""

    def __torch_function__(
        self,
        func: Any,
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func in _HOST_READS:
            raise NotRecordableError(f"numbers are read by {getattr(func, '__name__', func)}")
        return func(*args, **(kwargs or {}))


def _refuse_what_reads(func: Any, args: Sequence[Any], inputs: Sequence[torch.Tensor]) -> None:
    """Raises NotRecordableError for calls whose results' shapes, or other code, depend on numbers."""
    refused = _REFUSED_TAGS.intersection(func.tags)
    if func is _ATEN.index.Tensor and not any(x.dtype in (torch.bool, torch.uint8) for x in inputs[1:]):
        return  # its shape depends on masks only
    if func is _ATEN.dropout.default and not args[2]:
        return  # it does nothing
    if func in _ANSWERS or refused:
        why = " and ".join(tag.name.replace("_", " ") for tag in refused) or "numbers are read"
        raise NotRecordableError(f"{func}: {why}")


def _again(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Callable[[], object]:
    """The same call."""
    return lambda: func(*args, **kwargs)


def _into(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], outputs: Sequence[torch.Tensor]
) -> Callable[[], object]:
    """The same call, its results copied to where the first ones are."""

    def call() -> None:
        results = [leaf for leaf in tree_leaves(func(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]
        for kept, new in zip(outputs, results, strict=True):
            kept.copy_(new)

    return call


def _shares(outputs: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> bool:
    """Whether the results are views: whose memory is one of the inputs'."""
    memory = {tensor.untyped_storage()._cdata for tensor in inputs}
    return any(tensor.untyped_storage()._cdata in memory for tensor in outputs)


def _native_form(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], out: Any) -> NativeCall | None:
    """The native library's call that gives the same bits, for sums of tensors alike and copies."""
    if func is _ATEN.add.Tensor and not kwargs and len(args) == 2 and _can_add(args[0], args[1], out):
        addresses = [x.data_ptr() for x in (out, *args)]
        return NativeCall(Function.ADD, [*addresses, out.numel(), DTYPE_CODES[out.dtype]])
    if func is _ATEN.clone.default and is_dense(args[0]) and args[0].stride() == out.stride():
        return _copy(out, args[0])
    return None


def _can_add(left: object, right: object, out: torch.Tensor) -> bool:
    if not isinstance(left, torch.Tensor) or not isinstance(right, torch.Tensor):
        return False
    whole = left.is_contiguous() and right.is_contiguous() and out.is_contiguous()
    return whole and _alike(left, right) and left.dtype in _ADDED


def _copy_of(func: Any, args: Sequence[Any]) -> NativeCall | None:
    """Likewise for a copy into a tensor that was there."""
    if func is not _ATEN.copy_.default or not isinstance(args[1], torch.Tensor):
        return None
    target, source = args[:2]
    same = _alike(target, source) and target.stride() == source.stride() and is_dense(target)
    return _copy(target, source) if same else None


def _copy(target: torch.Tensor, source: torch.Tensor) -> NativeCall:
    return NativeCall(
        Function.COPY, [target.data_ptr(), source.data_ptr(), source.numel() * source.element_size()]
    )


def _alike(left: torch.Tensor, right: torch.Tensor) -> bool:
    return left.shape == right.shape and left.dtype is right.dtype

"""Linear layers of bitsandbytes, with what it computes wrongly set right.

Purpose: its modules as they are, mixed with ours: their scheme, bytes, moves, gradients; the optional import.
Does not know: plans, models, checkpoints.
Invariant: nothing here imports bitsandbytes before it is needed; no code is downloaded for it.

What bitsandbytes gets wrong or leaves to its caller:

    packing     on CPUs with AVX512-BF16 4-bit weights are packed at the first forward. Only those of bfloat16
                models are here, of shapes that the kernel takes; others are dequantized and multiplied.
    unpacking   scales are left in the packed order: a model that ran would be saved wrongly.
    gradients   a packed weight gives none: it is unpacked when an input wants one.
    moving      packed weights would be misread on another device, 8-bit scales would stay behind.
    numbers     4-bit weights whose rows are no whole blocks of 64 are dequantized wrongly on CPUs: refused.

Letters: N outputs, K inputs.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import sys
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, Self, cast

import torch
from torch import nn

from memory_efficient_gpt.errors import UnsupportedModelError
from memory_efficient_gpt.quantization.scheme import BNB_INT8, Kind, Scheme, bnb_scheme

logger = logging.getLogger(__name__)

_PACKED_OUTPUTS: Final = 32
"""The CPU kernel takes weights of whole multiples of so many outputs."""
_NOISY_LOGGERS: Final = ("bitsandbytes.backends.cpu.ops", "bitsandbytes.autograd._functions")
"""The one warns of kernels it could not download, the other at every multiplication."""


class BitsAndBytesModule(nn.Module):
    """Mixed into a class of bitsandbytes'; see `take_over`. compute_dtype: the model's."""

    in_features: int
    out_features: int
    compute_dtype: torch.dtype

    @property
    def num_outputs(self) -> int:
        """N."""
        return self.out_features

    @property
    def num_inputs(self) -> int:
        """K."""
        return self.in_features

    @property
    @abstractmethod
    def scheme(self) -> Scheme:
        """How the weight is stored."""

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weight takes in memory now, scales and tables included."""
        tensors = (cast(torch.Tensor, self.weight), *self.statistics())
        return sum(t.numel() * t.element_size() for t in tensors)

    @abstractmethod
    def statistics(self) -> list[torch.Tensor]:
        """Scales and tables: what the weight needs besides its codes."""

    def prepare(self) -> None:
        """Do now what would be done at the first forward."""

    def _set_compute_dtype(self, dtype: torch.dtype) -> None:
        self.compute_dtype = dtype

    @abstractmethod
    def _move(self, device: torch.device) -> None:
        """Replace the parameter by one on `device`."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Self:
        """Move codes and scales together; another dtype is one to compute in, theirs stays."""
        weight = cast(nn.Parameter, self.weight)
        moved = fn(torch.empty(0, dtype=self.compute_dtype, device=weight.device))
        if moved.device != weight.device:
            self._move(moved.device)
            weight = cast(nn.Parameter, self.weight)
        self._parameters["weight"] = None
        try:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        finally:
            self._parameters["weight"] = weight
        self._set_compute_dtype(moved.dtype)
        return self


class FourBit(BitsAndBytesModule):
    """Of Linear4bit."""

    support_avx512bf16_for_cpu: bool
    compute_type_is_set: bool

    @property
    def scheme(self) -> Scheme:
        """Of the weight as it was quantized; packing for the CPU undoes nested scales."""
        weight: Any = self.weight
        return bnb_scheme(cast(Kind, f"bnb-{weight.quant_type}"), nested=bool(weight.compress_statistics))

    @property
    def is_packed(self) -> bool:
        """Whether the weight is in the CPU kernel's layout."""
        return bool(getattr(self._state, "packing_format_for_cpu", False))

    @property
    def _state(self) -> Any:
        return cast(Any, self.weight).quant_state

    def statistics(self) -> list[torch.Tensor]:
        """absmax and the table of 16 values; nested: those of absmax."""
        state = self._state
        nested = [state.state2.absmax, state.state2.code, state.offset] if state.nested else []
        return [state.absmax, state.code, *nested]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x `[..., K]` to `[..., N]`, in its dtype."""
        if x.requires_grad:
            self.unpack()
        return cast(torch.Tensor, super().forward(x))

    def prepare(self) -> None:
        """Pack the weight if it will be."""
        weight = cast(torch.Tensor, self.weight)
        if self.support_avx512bf16_for_cpu and weight.is_cpu and not self.training and not self.is_packed:
            with torch.no_grad():
                self.forward(torch.zeros(1, self.in_features, dtype=self.compute_dtype))

    def unpack(self) -> None:
        """Go back to the layout that is saved; scales stay rounded to bfloat16, nested ones anew."""
        if not self.is_packed:
            return
        super()._save_to_state_dict({}, "", True)  # bitsandbytes unpacks before it saves
        state = self._state
        if state.absmax.dim() == 2:  # it leaves scales as they were packed, `[K / 64, N]`
            state.absmax = state.absmax.t().reshape(-1).float()
        if state.nested:
            state.offset = state.offset.float()

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.unpack()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _set_compute_dtype(self, dtype: torch.dtype) -> None:
        self.compute_dtype, self.compute_type_is_set = dtype, True
        whole = self.out_features % _PACKED_OUTPUTS == 0 and self.in_features % self._state.blocksize == 0
        packs = whole and dtype is torch.bfloat16 and bool(require().functional.has_avx512bf16())
        if not packs:
            self.unpack()
        self.support_avx512bf16_for_cpu = packs

    def _move(self, device: torch.device) -> None:
        self.unpack()
        self._parameters["weight"] = cast(nn.Parameter, cast(torch.Tensor, self.weight).to(device))


class EightBit(BitsAndBytesModule):
    """Of Linear8bitLt; codes and scales are in its `state`."""

    state: Any

    @property
    def scheme(self) -> Scheme:
        """Always the same one."""
        return BNB_INT8

    @property
    def threshold(self) -> float:
        """From which size on activations are multiplied in float; 0: none are."""
        return float(self.state.threshold)

    def statistics(self) -> list[torch.Tensor]:
        """A scale for each output."""
        return [self.state.SCB]

    def _move(self, device: torch.device) -> None:
        moved: Any = cast(torch.Tensor, self.weight).to(device)
        self._parameters["weight"], self.state.CB = moved, moved.data
        self.state.SCB, moved.CB = self.state.SCB.to(device), None


def bitsandbytes_modules(model: nn.Module) -> list[BitsAndBytesModule]:
    """Every layer that bitsandbytes computes."""
    return [module for module in model.modules() if isinstance(module, BitsAndBytesModule)]


def take_over(module: nn.Module, dtype: torch.dtype, name: str) -> None:
    """Make a quantized module of bitsandbytes one of ours, computing in `dtype`; float ones stay as they are.

    Raises UnsupportedModelError.
    """
    known: Any = module
    if hasattr(known, "state"):
        if known.state.has_fp16_weights:
            return
        if known.weight.CB is not None:
            known.init_8bit_state()
        module.__class__ = _subclass(EightBit, type(module))  # type: ignore[arg-type]  # classes are hashable
    else:
        state = getattr(known.weight, "quant_state", None)
        if state is None:
            return
        if known.weight.is_cpu and known.in_features % state.blocksize:
            raise UnsupportedModelError(
                f"{name} has {known.in_features:,} inputs, no multiple of {state.blocksize}: bitsandbytes "
                "computes such 4-bit weights wrongly on a CPU. Use a GPU, or the float checkpoint."
            )
        known.quant_state = known.weight.module = None  # else a copy would hold on to the original
        module.__class__ = _subclass(FourBit, type(module))  # type: ignore[arg-type]  # likewise
    cast(BitsAndBytesModule, module)._set_compute_dtype(dtype)


@functools.cache
def _subclass(kind: type[BitsAndBytesModule], own: type[nn.Module]) -> type[nn.Module]:
    return type(own.__name__, (kind, own), {"__module__": own.__module__})


def require(*, to_load: bool = False) -> Any:
    """The bitsandbytes package. Raises UnsupportedModelError saying how to get it.

    to_load: transformers shall load one of its checkpoints, for which it needs accelerate too.
    """
    for name in _NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    missing = "bitsandbytes"
    try:
        with _no_downloaded_kernels():
            import bitsandbytes
        missing = "accelerate"
        if not to_load or importlib.util.find_spec("accelerate") is not None:
            return bitsandbytes
    except ImportError as error:
        logger.debug("bitsandbytes cannot be imported: %s", error)
    raise UnsupportedModelError(
        f"weights in bitsandbytes' formats need {missing}, which is not installed (or not for this machine): "
        "pip install 'memory-efficient-gpt[quant]'. Our own int4 and int8 need neither."
    )


@contextmanager
def _no_downloaded_kernels() -> Iterator[None]:
    """On some CPUs bitsandbytes downloads native code when it is imported, if it finds package `kernels`."""
    if "bitsandbytes" in sys.modules:
        yield
        return
    modules = cast("dict[str, Any]", sys.modules)
    present = modules.get("kernels")
    modules["kernels"] = None
    try:
        yield
    finally:
        if present is None:
            del modules["kernels"]
        else:
            modules["kernels"] = present

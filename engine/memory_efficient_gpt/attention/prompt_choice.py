"""Which kernels compute rows of a step that have several tokens: those installed, compared and timed at load.

Purpose: from the device and layers' sizes to the kernels that are ahead there, with the times as the reason.
Does not know: models, the backend's own kernels but for their time.
Invariant: a kernel is used from the least size on from which it was the fastest of all at each size that was
timed. Nothing is timed where no package is installed and cuDNN can be used, which was ahead of torch's flash
attention wherever both were measured.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Final, cast

import torch

from memory_efficient_gpt.attention.context import AttentionBackend, AttentionOptions, StepContext
from memory_efficient_gpt.attention.flash_packages import (
    DTYPES,
    FlashPackage,
    FlashPrompts,
    TorchFlash,
    installed_packages,
)
from memory_efficient_gpt.attention.prompt_kernels import PromptKernel
from memory_efficient_gpt.attention.whole_prompts import CudnnPrompts
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from memory_efficient_gpt.kv_cache.pool import LayerCache

logger = logging.getLogger(__name__)

TIMED_TOKENS: Final = (512, 2048)
"""Of a step's one prompt. Chunks that begin later have twice as many tokens before them."""
_COMPARED_TOKENS: Final = 70
_WINDOW: Final = 33
_SOFTCAP: Final = 20.0
_TOLERANCE: Final = 2e-2
_REPETITIONS: Final = 5
_REFUSALS: Final = (
    RuntimeError, TypeError, ValueError, NotImplementedError, AttributeError, AssertionError, ImportError,
)  # fmt: skip
_OWN: Final = "Triton"

Clock = Callable[[Callable[[], object]], float]
Times = Mapping[tuple[bool, int], Mapping[str, float]]
"""Seconds by (chunk that begins later, tokens) and kernel."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What kernels are tried on. own: the backend with its own kernels only."""

    own: AttentionBackend
    layers: Sequence[LayerKV]
    block_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def layer(self) -> LayerKV:
        """The one with the largest keys or values."""
        return max(self.layers, key=lambda layer: max(layer.key_dim, layer.value_dim))

    @property
    def dim(self) -> int:
        """Of keys or values, the larger."""
        return max(self.layer.key_dim, self.layer.value_dim)

    def options(self, window: int | None = None, softcap: float | None = None) -> AttentionOptions:
        """Causal attention."""
        return AttentionOptions(self.layer.key_dim**-0.5, window=window, softcap=softcap)

    def step(self, tokens: int, before: int) -> tuple[torch.Tensor, LayerCache, StepContext]:
        """Queries of one row of that many tokens behind `before` others; what it does not own is NaN."""
        length, size = before + tokens, self.block_size
        blocks = -(-length // size)
        generator = torch.Generator(self.device).manual_seed(0)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator, device=self.device).to(self.dtype)

        def cached(dim: int) -> torch.Tensor:
            rows = draw(blocks * size, self.layer.num_kv_heads, dim)
            rows[length:] = torch.nan
            pool = rows.new_full((blocks + 1, size, self.layer.num_kv_heads, dim), torch.nan)
            pool[table.long()] = rows.view(blocks, size, self.layer.num_kv_heads, dim)
            return pool

        table = torch.arange(blocks, 0, -1, dtype=torch.int32, device=self.device)
        cache = LayerCache(self.layer, cached(self.layer.key_dim), cached(self.layer.value_dim))
        context = StepContext(
            backend=self.own, slots=torch.zeros(tokens, dtype=torch.int64, device=self.device),
            block_tables=table.unsqueeze(0),
            query_starts=torch.tensor([0, tokens], dtype=torch.int32, device=self.device),
            context_lens=torch.tensor([length], dtype=torch.int32, device=self.device),
            max_query_len=tokens, max_context_len=length, host_query_lens=[tokens],
            host_context_lens=[length],
        )  # fmt: skip
        return draw(tokens, self.layer.num_query_heads, self.layer.key_dim), cache, context


def gpu_seconds(call: Callable[[], object]) -> float:
    """Seconds on the GPU, the median of a few, after two for warming up."""
    call(), call()
    seconds = []
    for _ in range(_REPETITIONS):
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        call()
        ended.record()
        ended.synchronize()
        seconds.append(float(begun.elapsed_time(ended)) / 1e3)
    return median(seconds)


def choose_prompt_kernels(
    trial: Trial, cudnn: CudnnPrompts | None, clock: Clock = gpu_seconds
) -> tuple[list[PromptKernel], list[str]]:
    """Kernels in the order in which to ask them, and what was found about packages, for people.

    cudnn: if it can be used. Runs some 50 small steps on the GPU if there is something to compare.
    """
    if trial.dtype not in DTYPES:
        return ([cudnn] if cudnn is not None else []), []
    packages, notes = installed_packages()
    usable: list[FlashPrompts] = []
    for package in packages if cudnn is not None else [*packages, TorchFlash()]:
        found = usable_package(package, trial)
        if isinstance(found, str):
            notes.append(f"{package.name} can't be used: {found}")
        else:
            kernel, lacks = _with_features(found, trial)
            usable.append(kernel)
            notes += lacks
    rest: list[PromptKernel] = [cudnn] if cudnn is not None else []
    if not usable:
        return rest, notes
    tried = [*usable, *rest]
    times = {
        (later, tokens): seconds_by_kernel(trial, tried, tokens, clock, later=later)
        for later in (False, True)
        for tokens in TIMED_TOKENS
    }
    chosen = [with_thresholds(kernel, times) for kernel in usable]
    notes += [described(kernel, times) for kernel in chosen]
    return [*(kernel for kernel in chosen if kernel.is_used), *rest], notes


def usable_package(package: FlashPackage, trial: Trial) -> FlashPrompts | str:
    """The package, reading pages if it can, or why it can't be used at all."""
    reason = None
    for pages in (True, False):
        kernel = FlashPrompts(package, trial.dim, pages)
        reason = _obstacle(kernel, trial, trial.options())
        if reason is None:
            return kernel
    return str(reason)


def _obstacle(kernel: FlashPrompts, trial: Trial, options: AttentionOptions) -> str | None:
    """Why the kernel can't be used for such layers, or None."""
    try:
        difference = _difference(kernel, trial, options)
    except _REFUSALS as error:
        return (str(error).splitlines() or [type(error).__name__])[0][:120]
    return None if difference <= _TOLERANCE else f"its result differs by {difference:.2g}"


def _with_features(kernel: FlashPrompts, trial: Trial) -> tuple[FlashPrompts, list[str]]:
    """The kernel for layers with a window or a softcap only if it computes them; which of these it lacks."""
    found: dict[str, str | None] = {"windows": None, "softcaps": None}
    if any(layer.window is not None for layer in trial.layers):
        found["windows"] = _obstacle(kernel, trial, trial.options(window=_WINDOW))
    if any(layer.softcap is not None for layer in trial.layers):
        found["softcaps"] = _obstacle(kernel, trial, trial.options(softcap=_SOFTCAP))
    lacks = [
        f"{kernel.name} computes no {feature} here: {reason}" for feature, reason in found.items() if reason
    ]
    return replace(kernel, windows=not found["windows"], softcaps=not found["softcaps"]), lacks


def with_thresholds(kernel: FlashPrompts, times: Times) -> FlashPrompts:
    """The kernel for the sizes from which on it was the fastest."""
    found: dict[bool, int | None] = {}
    for later in (False, True):
        found[later] = None
        for tokens in sorted((t for when, t in times if when is later), reverse=True):
            seconds = times[later, tokens]
            if kernel.name not in seconds or min(seconds, key=seconds.__getitem__) != kernel.name:
                break
            found[later] = tokens
    return replace(kernel, least_whole=found[False], least_later=found[True])


def described(kernel: FlashPrompts, times: Times) -> str:
    """What a kernel is used for, and the times that say so."""
    uses = []
    if kernel.least_whole is not None:
        uses.append(f"whole prompts from {kernel.least_whole:,} tokens on")
    if kernel.least_later is not None:
        uses.append(f"later chunks from {kernel.least_later:,} tokens on")
    what = f"{' and '.join(uses)} by {kernel.name}" if uses else f"{kernel.name} is installed, but not ahead"
    largest = max(tokens for _, tokens in times)
    words = [
        ("later " if later else "whole ") + ", ".join(f"{name} {s * 1e3:.2f}" for name, s in seconds.items())
        for (later, tokens), seconds in times.items()
        if tokens == largest
    ]
    return f"{what} (ms for {largest:,} tokens: {'; '.join(words)})"


def _difference(kernel: FlashPrompts, trial: Trial, options: AttentionOptions) -> float:
    """Of a small whole prompt and, if it reads pages, of a chunk that begins later."""
    worst = 0.0
    for before in (0, 2 * trial.block_size + 3) if kernel.pages else (0,):
        query, cache, context = trial.step(_COMPARED_TOKENS, before)
        pieces = kernel.attend(query, cache, context, options)
        if pieces is None:
            raise ValueError(f"not for keys of {trial.layer.key_dim} and values of {trial.layer.value_dim}")
        got = torch.cat([piece.output for piece in pieces])
        want = trial.own.attend(query, cache, context, options)
        worst = max(worst, float((got.float() - want.float()).abs().nan_to_num(torch.inf).max()))
    return worst


def seconds_by_kernel(
    trial: Trial, kernels: Sequence[PromptKernel], tokens: int, clock: Clock = gpu_seconds, *, later: bool
) -> dict[str, float]:
    """Of a prompt of that many tokens, by own kernels and those that take it; later: after twice as many."""
    query, cache, context = trial.step(tokens, 2 * tokens if later else 0)

    def timed(attend: object) -> float:
        call = cast(Callable[..., object], attend)
        return clock(lambda: call(query, cache, context, trial.options()))

    found = {_OWN: timed(trial.own.attend)}
    for kernel in kernels:
        try:
            if kernel.attend(query, cache, context, trial.options()) is not None:
                found[kernel.name] = timed(kernel.attend)
        except _REFUSALS as error:  # of this size only, such as for want of memory: another kernel has it
            logger.warning("%s can't compute %d tokens: %s", kernel.name, tokens, error)
    return found

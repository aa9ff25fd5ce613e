"""Which kernels are chosen for prompts, and what people are told of it.

Stand-ins compute, a script is the clock.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from memory_efficient_gpt.attention.flash_packages import MODULES, FlashAttention3, FlashPrompts
from memory_efficient_gpt.attention.prompt_choice import (
    TIMED_TOKENS,
    Trial,
    choose_prompt_kernels,
    described,
    with_thresholds,
)
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from memory_efficient_gpt.attention.whole_prompts import CudnnPrompts
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from tests.engine.attention.flash_doubles import Package

LAYER = LayerKV("layer", 2, 16, 16, 4)
CPU = torch.device("cpu")
CUDNN = CudnnPrompts(16)  # takes no prompt as short as these


def trial(*layers: LayerKV, dtype: torch.dtype = torch.bfloat16, block_size: int = 16) -> Trial:
    return Trial(TorchBackend(), layers or (LAYER,), block_size, dtype, CPU)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memory_efficient_gpt.attention.prompt_choice.TIMED_TOKENS", (8, 24))


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def installed(**modules: Any) -> None:
        for name in (name for names in MODULES.values() for name in names):
            monkeypatch.setitem(sys.modules, name, modules.get(name))

    installed()
    return installed


def clock(*seconds: float) -> Callable[[Callable[[], object]], float]:
    """In the order in which things are timed: whole 8, whole 24, later 8, later 24; own first in each."""
    script: Iterator[float] = iter(seconds)

    def timed(call: Callable[[], object]) -> float:
        assert call() is not None
        return next(script)

    return timed


def test_nothing_is_timed_without_a_package_where_cudnn_is_used(install: Callable[..., None]) -> None:
    assert choose_prompt_kernels(trial(), CUDNN, clock()) == ([CUDNN], [])
    install(flash_attn_interface=Package("flash"))
    for cudnn in (None, CUDNN):
        found = choose_prompt_kernels(trial(dtype=torch.float32), cudnn, clock())
        assert found == ([cudnn] if cudnn else [], []), "packages have no such dtype"


def test_torchs_flash_attention_is_tried_where_cudnn_is_not_used(
    install: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    windowed = LayerKV("layer", 2, 16, 16, 4, window=100)
    (kernel, *_), notes = choose_prompt_kernels(
        trial(LAYER, windowed), None, clock(*[2.0, 1.0] * 2, 2.0, 2.0)
    )
    assert isinstance(kernel, FlashPrompts) and kernel.name == "torch's flash attention"
    assert (kernel.pages, kernel.windows, kernel.least_whole) == (False, False, 8)
    assert notes[0] == "torch's flash attention computes no windows here: no window and no softcap"
    assert notes[1].startswith("whole prompts from 8 tokens on by torch's flash attention (ms for 24 tokens")

    def varlen(query: torch.Tensor, key: Any, value: Any, starts: Any, *rest: Any, **options: Any) -> Any:
        assert rest[0] is None and options["enable_gqa"] and options["window_size"] == (-1, 0)
        return Package("2").flash_attn_with_kvcache(
            query, key, value, cache_seqlens=options["seqused_k"], page_table=options["block_table"],
            cu_seqlens_q=starts, max_seqlen_q=rest[1], softmax_scale=options["scale"], causal=True,
            window_size=(-1, -1), softcap=0.0,
        )[0]  # fmt: skip

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    (kernel, *_), _ = choose_prompt_kernels(trial(), None, clock(*[2.0, 1.0] * 4))
    assert isinstance(kernel, FlashPrompts) and (kernel.pages, kernel.least_later) == (True, 8)


def test_a_package_is_used_where_it_was_fastest_and_the_times_are_told(install: Callable[..., None]) -> None:
    install(flash_attn_interface=Package("flash"))
    times = clock(0.001, 0.002, 0.004, 0.003, 0.001, 0.0005, 0.004, 0.002)
    (kernel, *_), notes = choose_prompt_kernels(trial(), CUDNN, times)
    assert isinstance(kernel, FlashPrompts) and kernel.pages
    assert (kernel.least_whole, kernel.least_later) == (24, 8)
    assert notes == [
        "whole prompts from 24 tokens on and later chunks from 8 tokens on by FlashAttention-3 (ms for 24 "
        "tokens: whole Triton 4.00, FlashAttention-3 3.00; later Triton 4.00, FlashAttention-3 2.00)"
    ]


def test_a_package_that_is_never_ahead_is_not_used(install: Callable[..., None]) -> None:
    install(flash_attn=Package("flash"))
    kernels, notes = choose_prompt_kernels(trial(block_size=256), CUDNN, clock(*[1.0, 2.0] * 4))
    assert kernels == [CUDNN]
    assert notes[0].startswith("FlashAttention-2 is installed, but not ahead (ms for 24 tokens: whole Triton")


def test_a_package_without_pages_is_timed_on_whole_prompts_only(install: Callable[..., None]) -> None:
    module = Package("flash", pages=False)
    install(fa3_fwd_interface=module)
    (kernel, *_), _ = choose_prompt_kernels(trial(), CUDNN, clock(2.0, 1.0, 2.0, 1.0, 2.0, 2.0))
    assert isinstance(kernel, FlashPrompts) and not kernel.pages
    assert (kernel.least_whole, kernel.least_later) == (8, None)
    assert "flash_attn_func" in module.calls


def test_two_packages_are_timed_against_each_other(install: Callable[..., None]) -> None:
    install(flash_attn_interface=Package("three"), flash_attn=Package("two"))
    whole, later = (3.0, 2.0, 1.0), (3.0, 1.0, 2.0)
    (*kernels, _), notes = choose_prompt_kernels(
        trial(block_size=256), CUDNN, clock(*whole, *whole, *later, *later)
    )
    assert [kernel.name for kernel in kernels] == ["FlashAttention-3", "FlashAttention-2"]
    three, two = kernels
    assert isinstance(three, FlashPrompts) and isinstance(two, FlashPrompts)
    assert (three.least_whole, three.least_later) == (None, 8)
    assert (two.least_whole, two.least_later) == (8, None)
    assert len(notes) == 2


def test_wrong_results_and_refusals_are_named(install: Callable[..., None]) -> None:
    install(flash_attn_interface=Package("three", broken=0.5), flash_attn=Package("two", pages=False))
    odd = LayerKV("layer", 2, 16, 8, 4)
    _, notes = choose_prompt_kernels(trial(), CUDNN, clock(*[1.0, 2.0] * 3))
    assert notes[0].startswith("FlashAttention-3 can't be used: its result differs by 0.5")
    kernels, notes = choose_prompt_kernels(trial(odd), CUDNN, clock())
    assert kernels == [CUDNN]
    assert notes == [
        f"FlashAttention-{version} can't be used: not for keys of 16 and values of 8" for version in (3, 2)
    ]


def test_windows_and_softcaps_are_tried_if_a_layer_has_them(install: Callable[..., None]) -> None:
    install(flash_attn_interface=Package("flash", windows=False))
    windowed = LayerKV("layer", 2, 16, 16, 4, window=100, softcap=30.0)
    times = [2.0, 1.0] * 4
    (kernel, *_), notes = choose_prompt_kernels(trial(LAYER, windowed), CUDNN, clock(*times))
    assert isinstance(kernel, FlashPrompts) and not kernel.windows and kernel.softcaps
    reason = "This flash attention build does not support local attention."
    assert notes[0] == f"FlashAttention-3 computes no windows here: {reason}"
    (kernel, *_), notes = choose_prompt_kernels(trial(), CUDNN, clock(*times))
    assert isinstance(kernel, FlashPrompts) and kernel.windows and len(notes) == 1


def test_thresholds_stop_at_the_first_size_that_another_wins() -> None:
    kernel = FlashPrompts(FlashAttention3(Package("flash")), 16, pages=True)
    name = kernel.name
    times = {
        (False, 8): {"Triton": 2.0, name: 1.0}, (False, 16): {"Triton": 1.0, name: 2.0},
        (False, 24): {"Triton": 2.0, "cuDNN": 1.5, name: 1.0}, (True, 8): {"Triton": 2.0, name: 1.0},
        (True, 16): {"Triton": 2.0, name: 1.0}, (True, 24): {"Triton": 2.0, name: 1.0},
    }  # fmt: skip
    found = with_thresholds(kernel, times)
    assert (found.least_whole, found.least_later) == (24, 8)
    assert "cuDNN 1500.00" in described(found, times)


def test_the_sizes_that_are_timed_begin_where_a_step_is_no_longer_captured() -> None:
    assert TIMED_TOKENS == (512, 2048)


def test_a_kernel_that_fails_at_a_size_is_not_used_there(
    install: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    class Small(Package):
        def flash_attn_with_kvcache(self, q: torch.Tensor, *arguments: Any, **options: Any) -> Any:
            if len(q) == 24:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().flash_attn_with_kvcache(q, *arguments, **options)

    install(flash_attn_interface=Small("flash"))
    kernels, notes = choose_prompt_kernels(trial(), CUDNN, clock(2.0, 1.0, 2.0, 2.0, 1.0, 2.0))
    assert kernels == [CUDNN] and notes[0].startswith("FlashAttention-3 is installed, but not ahead")
    assert "FlashAttention-3 can't compute 24 tokens: CUDA out of memory" in caplog.text

"""What FlashAttention's packages get of a step, and which steps they are for; stand-ins compute."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from memory_efficient_gpt.attention.context import AttentionOptions
from memory_efficient_gpt.attention.flash_packages import (
    MODULES,
    FlashAttention2,
    FlashAttention3,
    FlashPackage,
    FlashPrompts,
    installed_packages,
)
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from tests.engine.attention.flash_doubles import Package
from tests.engine.attention.oracle import PagedStep, Shape, expected, make_step
from tests.engine.attention.test_torch_backend import FEATURES, HEADS, options_for

DIM = 16
PLAIN = AttentionOptions(scale=0.25)
STEPS = {
    "whole": ([9], [9]),
    "several": ([9, 5], [9, 5]),
    "behind decoding rows": ([1, 1, 9, 5], [7, 3, 9, 5]),
    "around decoding rows": ([9, 1, 5, 1], [9, 7, 5, 4]),
}
LATER = {"later": ([1, 4, 7], [5, 11, 19])}
VERSIONS: dict[str, Callable[[Any], FlashPackage]] = {"3": FlashAttention3, "2": FlashAttention2}


def step_of(
    lens: list[int], contexts: list[int], *, heads: str = "GQA", block_size: int = 4,
    cache_dtype: torch.dtype = torch.bfloat16, host_lengths: bool = True,
) -> PagedStep:  # fmt: skip
    step = make_step(
        TorchBackend(), lens, contexts, shape=Shape(*HEADS[heads], DIM, DIM), dtype=torch.bfloat16,
        cache_dtype=cache_dtype, block_size=block_size, host_lengths=host_lengths,
    )  # fmt: skip
    TorchBackend().write(step.key, step.value, step.cache, step.context)
    return step


def compare(kernel: FlashPrompts, step: PagedStep, options: AttentionOptions) -> None:
    pieces = kernel.attend(step.query, step.cache, step.context, options)
    assert pieces is not None
    wanted = expected(step, options)
    seen = set()
    for piece in pieces:
        assert piece.output.dtype is torch.bfloat16
        assert float((piece.output.double() - wanted[piece.start : piece.end]).abs().max()) < 2e-2
        seen |= set(range(piece.start, piece.end))
    starts = torch.tensor([0, *step.query_lens]).cumsum(0).tolist()
    rows = [range(s, s + n) for s, n in zip(starts, step.query_lens, strict=False) if n > 1]
    assert {token for row in rows for token in row} <= seen


@pytest.mark.parametrize("kind", STEPS | LATER)
@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("feature", ["plain", "window", "softcap"])
@pytest.mark.parametrize("heads", HEADS)
def test_pages_are_read_as_the_package_wants_them(heads: str, feature: str, version: str, kind: str) -> None:
    step = step_of(*(STEPS | LATER)[kind], heads=heads, block_size=256 if version == "2" else 4)
    module = Package("flash")
    compare(
        FlashPrompts(VERSIONS[version](module), DIM, pages=True), step, options_for(feature, HEADS[heads][0])
    )
    assert len(module.calls) == 1 and "flash_attn_func" not in module.calls


@pytest.mark.parametrize("kind", STEPS)
@pytest.mark.parametrize("version", VERSIONS)
def test_a_package_without_pages_gets_whole_prompts_in_one_piece(version: str, kind: str) -> None:
    module = Package("flash", pages=False)
    kernel = FlashPrompts(VERSIONS[version](module), DIM, pages=False)
    compare(kernel, step_of(*STEPS[kind]), options_for("window", 6))
    assert set(module.calls) == {"flash_attn_func"}
    later = step_of(*LATER["later"])
    assert kernel.attend(later.query, later.cache, later.context, PLAIN) is None


def refused(kernel: FlashPrompts, step: PagedStep, options: AttentionOptions = PLAIN) -> bool:
    return kernel.attend(step.query, step.cache, step.context, options) is None


def test_steps_that_it_is_not_for() -> None:
    kernel = FlashPrompts(FlashAttention3(Package("flash")), DIM, pages=True)
    assert not refused(kernel, step_of([5], [5]))
    assert refused(kernel, step_of([5], [5], host_lengths=False)), "a captured step"
    assert refused(kernel, step_of([1, 1], [5, 3])), "nothing but decoding"
    assert refused(kernel, step_of([5], [5], cache_dtype=torch.int8))
    for feature in ("sinks", "alibi"):
        assert feature in FEATURES and refused(kernel, step_of([5], [5]), options_for(feature, 6))
    assert refused(FlashPrompts(kernel.package, 2 * DIM, pages=True), step_of([5], [5])), (
        "another layer's sizes"
    )


def test_windows_and_softcaps_that_it_was_built_without() -> None:
    module = Package("flash", windows=False, softcaps=False)
    kernel = FlashPrompts(FlashAttention3(module), DIM, pages=True, windows=False, softcaps=False)
    step = step_of([9], [9])
    assert refused(kernel, step, AttentionOptions(0.25, window=8))
    assert refused(kernel, step, AttentionOptions(0.25, softcap=3.0))
    compare(kernel, step, AttentionOptions(0.25, window=9))  # hides nothing, and is not asked for


def test_sizes_from_which_on_it_is_used() -> None:
    package: FlashPackage = FlashAttention3(Package("flash"))
    whole = FlashPrompts(package, DIM, True, least_whole=12, least_later=None)
    assert refused(whole, step_of([11, 11], [11, 11])) and not refused(whole, step_of([12, 6], [12, 6]))
    pieces = FlashPrompts(package, DIM, False, least_whole=12)
    assert refused(pieces, step_of([12, 6], [12, 6])), "a call for each prompt"
    assert refused(whole, step_of([12], [13]))
    later = FlashPrompts(package, DIM, True, least_whole=None, least_later=5)
    assert refused(later, step_of([12], [12])) and not refused(later, step_of([12], [13]))
    assert whole.is_used and not FlashPrompts(package, DIM, True, least_whole=None, least_later=None).is_used


def installed(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    for name in (name for names in MODULES.values() for name in names):
        monkeypatch.setitem(sys.modules, name, modules.get(name))


def test_installed_packages_are_found_the_better_first(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch)
    assert installed_packages() == ([], [])
    installed(monkeypatch, flash_attn=Package("flash_attn"), fa3_fwd_interface=Package("fa3"))
    found, obstacles = installed_packages()
    assert [package.name for package in found] == ["FlashAttention-3", "FlashAttention-2"] and not obstacles


def test_a_package_for_another_torch_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    installed(monkeypatch)
    for name, text in {
        "flash_attn": "raise ImportError('undefined symbol: _ZN3c10')",
        "flash_attn_interface": "import einops_that_is_absent",
    }.items():
        monkeypatch.delitem(sys.modules, name)
        (tmp_path / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    found, obstacles = installed_packages()
    assert not found
    assert obstacles == [
        "FlashAttention-3: No module named 'einops_that_is_absent'",
        "FlashAttention-2: undefined symbol: _ZN3c10",
    ]

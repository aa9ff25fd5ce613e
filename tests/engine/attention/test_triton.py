"""Which kernels the backend for GPUs launches for a step; torch's arithmetic stands in for Triton's."""

from __future__ import annotations

import sys
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from memory_efficient_gpt.attention.context import AttentionOptions, LayerCache, StepContext
from memory_efficient_gpt.attention.prompt_kernels import Piece
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from memory_efficient_gpt.attention.triton import TritonBackend
from tests.engine.attention.oracle import PagedStep, expected, make_step
from tests.engine.attention.test_torch_backend import options_for

PLAIN = options_for("plain", 4)


class Launches:
    """Own kernels: each writes its rows of what torch gives for the whole step."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def module(self) -> Any:
        def launch(name: str, *, single: bool) -> Any:
            def write(
                query: torch.Tensor, cache: LayerCache, context: StepContext, options: AttentionOptions,
                out: torch.Tensor, *_: Any, **__: Any,
            ) -> None:  # fmt: skip
                self.seen.append(name)
                whole = TorchBackend().attend(query, cache, context, options)
                starts = context.query_starts.tolist()
                for start, end in pairwise(starts):
                    if (end - start == 1) is single:
                        out[start:end] = whole[start:end]

            return write

        return SimpleNamespace(
            decode_rows=launch("decode", single=True),
            prompt_chunks=launch("prompt", single=False),
            fixed_prompt_chunks=launch("fixed", single=False),
        )


class Other:
    """A prompt kernel by torch; None for steps that it is not for."""

    def __init__(self, name: str, *, takes: bool = True) -> None:
        self.name, self.takes, self.asked = name, takes, 0

    def attend(
        self, query: torch.Tensor, cache: LayerCache, context: StepContext, options: AttentionOptions
    ) -> list[Piece] | None:
        self.asked += 1
        if not self.takes:
            return None
        whole = TorchBackend().attend(query, cache, context, options)
        starts = context.query_starts.tolist()
        pairs = pairwise(starts)
        return [Piece(start, end, whole[start:end]) for start, end in pairs if end - start > 1]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()
    monkeypatch.setitem(sys.modules, "memory_efficient_gpt.triton_kernels.attention_launch", found.module())
    return found


def check(step: PagedStep, backend: TritonBackend) -> torch.Tensor:
    TorchBackend().write(step.key, step.value, step.cache, step.context)
    got = backend.attend(step.query, step.cache, step.context, PLAIN)
    assert float((got.double() - expected(step, PLAIN)).abs().max()) < 2e-6
    return got


@pytest.mark.parametrize(
    ("lens", "contexts", "launched"),
    [
        ([1, 1], [4, 9], ["decode"]),
        ([5], [5], ["prompt"]),
        ([1, 5, 3], [4, 5, 9], ["decode", "prompt"]),
    ],
    ids=["decoding", "prompt", "mixed"],
)
def test_own_kernels_compute_what_no_other_takes(
    launches: Launches, lens: list[int], contexts: list[int], launched: list[str]
) -> None:
    other = Other("other", takes=False)
    check(make_step(TorchBackend(), lens, contexts), TritonBackend(prompt_kernels=[other]))
    assert launches.seen == launched
    assert other.asked == (max(lens) > 1)


def test_the_first_kernel_that_takes_a_steps_prompts_computes_them(launches: Launches) -> None:
    kernels = [Other("not for it", takes=False), Other("takes"), Other("later")]
    check(make_step(TorchBackend(), [1, 5, 1, 3], [4, 5, 6, 9]), TritonBackend(prompt_kernels=kernels))
    assert launches.seen == ["decode"]
    assert [kernel.asked for kernel in kernels] == [1, 1, 0]


def test_a_step_of_one_prompt_is_not_copied(launches: Launches) -> None:
    kernel = Other("takes")
    step = make_step(TorchBackend(), [5], [5])
    given: list[torch.Tensor] = []
    attend = kernel.attend

    def remembered(*arguments: Any) -> list[Piece] | None:
        pieces = attend(*arguments)
        given.extend(piece.output for piece in pieces or [])
        return pieces

    kernel.attend = remembered  # type: ignore[assignment, method-assign]
    got = check(step, TritonBackend(prompt_kernels=[kernel]))
    assert got is given[0] and not launches.seen


def test_the_deterministic_setting_asks_no_other_kernel(launches: Launches) -> None:
    other = Other("takes")
    backend = TritonBackend(prompt_kernels=[other], deterministic=True)
    check(make_step(TorchBackend(), [1, 5], [4, 5]), backend)
    assert launches.seen == ["decode", "fixed"] and not other.asked

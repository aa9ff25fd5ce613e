"""Which steps cuDNN's attention is for, and what is gathered for it; torch's plain arithmetic stands in."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

import memory_efficient_gpt.attention.whole_prompts as module
from memory_efficient_gpt.attention.context import AttentionOptions
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from memory_efficient_gpt.attention.whole_prompts import CudnnPrompts, WholePrompt, whole_prompts
from tests.engine.attention.oracle import PagedStep, Shape, expected, make_step
from tests.engine.attention.test_torch_backend import FEATURES, HEADS, options_for

PLAIN = AttentionOptions(scale=0.25)


def step_of(
    lens: list[int], contexts: list[int], *, heads: str = "GQA", cache_dtype: torch.dtype = torch.bfloat16,
    host_lengths: bool = True,
) -> PagedStep:  # fmt: skip
    shape = Shape(*HEADS[heads])
    return make_step(
        TorchBackend(), lens, contexts, shape=shape, dtype=torch.bfloat16, cache_dtype=cache_dtype,
        host_lengths=host_lengths,
    )  # fmt: skip


def found(step: PagedStep, options: AttentionOptions = PLAIN, least: int = 3) -> list[WholePrompt]:
    return whole_prompts(step.context, step.cache, options, step.shape.key_dim, least=least)


def test_whole_long_prompts_are_found_beside_decoding_rows() -> None:
    step = step_of([1, 5, 1, 9], [7, 5, 1, 9])
    assert found(step) == [WholePrompt(1, 1, 6), WholePrompt(3, 7, 16)]


@pytest.mark.parametrize(
    ("lens", "contexts"),
    [([5, 4], [5, 9]), ([5, 2], [5, 2]), ([1, 1], [4, 9])],
    ids=["later", "short", "no"],
)
def test_a_step_with_other_chunks_is_left_to_the_kernels_that_read_pages(
    lens: list[int], contexts: list[int]
) -> None:
    assert found(step_of(lens, contexts)) == []


def test_lengths_that_the_host_does_not_know_and_rounded_caches_are_left_too() -> None:
    assert found(step_of([5], [5], host_lengths=False)) == []
    assert found(step_of([5], [5], cache_dtype=torch.int8)) == []


@pytest.mark.parametrize("feature", [name for name in FEATURES if name != "plain"])
def test_what_cudnn_does_not_compute_is_left_too(feature: str) -> None:
    step = step_of([9], [9], heads="MHA")
    assert found(step, options_for(feature, 4)) == []


def test_a_window_that_hides_nothing_is_no_obstacle() -> None:
    assert found(step_of([5], [5]), AttentionOptions(scale=0.25, window=5)) == [WholePrompt(0, 0, 5)]


def test_layers_with_other_sizes_than_were_tried_are_left_too() -> None:
    step = step_of([5], [5])
    assert whole_prompts(step.context, step.cache, PLAIN, step.shape.key_dim * 2, least=3) == []
    step.cache.value = step.cache.value[..., :8]
    assert found(step) == []


@pytest.mark.parametrize("padding", [1, 4, 7])
@pytest.mark.parametrize("heads", HEADS)
def test_outputs_equal_the_oracle(heads: str, padding: int) -> None:
    step = step_of([1, 5, 9], [7, 5, 9], heads=heads)
    options = options_for("plain", HEADS[heads][0])
    wanted = expected(step, options)
    backend = TorchBackend()
    backend.write(step.key, step.value, step.cache, step.context)
    kernel = CudnnPrompts(step.shape.key_dim, least=3, step=padding, kernel=SDPBackend.MATH)
    pieces = kernel.attend(step.query, step.cache, step.context, options)
    assert pieces is not None and [(piece.start, piece.end) for piece in pieces] == [(1, 6), (6, 15)]
    for piece in pieces:
        assert float((piece.output.double() - wanted[piece.start : piece.end]).abs().max()) < 2e-2


def test_a_step_that_is_not_for_it_is_left() -> None:
    step = step_of([5, 4], [5, 9])
    kernel = CudnnPrompts(step.shape.key_dim, least=3, kernel=SDPBackend.MATH)
    assert kernel.attend(step.query, step.cache, step.context, PLAIN) is None


def test_prompts_of_any_length_come_in_few_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def watched(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        seen.add((query.shape, query.stride(), key.shape, key.stride(), value.shape, value.stride()))
        return query

    monkeypatch.setattr(module, "scaled_dot_product_attention", watched)
    for length in (5, 6, 8):
        step = step_of([length], [length])
        kernel = CudnnPrompts(step.shape.key_dim, least=3, step=8)
        assert kernel.attend(step.query, step.cache, step.context, PLAIN) is not None
    assert len(seen) == 1, "shapes and strides are what a plan is for"

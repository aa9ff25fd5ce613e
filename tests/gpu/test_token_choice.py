"""The kernel that chooses tokens, against the sorts and scans that the CPU takes."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.request import Request, SamplingParams
from memory_efficient_gpt.sampling import SampleRow, SamplingBatch, sample
from tests.gpu.test_engine_cuda import make_engine

pytestmark = pytest.mark.gpu

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
GREEDY = SamplingParams(temperature=0.0)


def some_logits(rows: int, size: int, dtype: torch.dtype, *, ties: bool) -> torch.Tensor:
    logits = torch.randn(rows, size, generator=torch.Generator().manual_seed(size)) * 3
    return ((logits * 2).round() / 2 if ties else logits).to(dtype)


def some_rows(count: int, seed: int) -> list[SampleRow]:
    rng = random.Random(seed)
    return [
        SampleRow(
            SamplingParams(
                temperature=rng.choice([0.0, 0.4, 1.0, 1.7]),
                top_k=rng.choice([None, None, 1, 2, 50, 10**6]),
                top_p=rng.choice([1.0, 0.0, 0.1, 0.5, 0.9, 0.999]),
                min_p=rng.choice([0.0, 0.0, 0.01, 0.3, 1.0]),
            ),
            seed * 1000 + number,
            number,
        )
        for number in range(count)
    ]


def kernel(logits: torch.Tensor, rows: list[SampleRow]) -> tuple[list[int], list[bool]]:
    sampled = sample(logits.to(CUDA), SamplingBatch(rows, CUDA, kernel=True))
    return sampled.token_ids.tolist(), sampled.ok.tolist()


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [5, 97, 32001, 128256, 151936])
def test_tokens_are_those_of_sorts_and_scans(size: int, dtype: torch.dtype, ties: bool) -> None:
    logits, rows = some_logits(48, size, dtype, ties=ties), some_rows(48, size)
    tokens, ok = kernel(logits, rows)
    expected = sample(logits, SamplingBatch(rows, CPU)).token_ids.tolist()
    assert all(ok)
    # exp is rounded differently: of many thousand weights, a draw may fall on the other side of an edge
    assert sum(one != other for one, other in zip(tokens, expected, strict=True)) <= (size > 1000)
    greedy = [number for number, row in enumerate(rows) if row.params.greedy]
    assert greedy and all(tokens[number] == expected[number] for number in greedy)


def test_only_tokens_that_the_filters_keep_are_drawn_and_all_of_them() -> None:
    logits = torch.full((1, 40000), -20.0)
    likely = {7: 3.0, 8191: 2.0, 8192: 2.0, 30000: 2.0, 39999: 1.0}
    for token, value in likely.items():
        logits[0, token] = value
    for options, kept in (
        ({"top_k": 2}, {7, 8191, 8192, 30000}),  # ties stay together
        ({"top_k": 5}, set(likely)),
        ({"top_p": 0.4}, {7}),
        ({"top_p": 0.6}, {7, 8191, 8192, 30000}),
        ({"min_p": 0.3}, {7, 8191, 8192, 30000}),
        ({"top_p": 0.99999}, set(likely)),
    ):
        rows = [SampleRow(SamplingParams(**options), 3, number) for number in range(600)]
        tokens, _ = kernel(logits.expand(600, -1), rows)
        assert set(tokens) == kept, options


def test_a_row_gives_the_same_token_alone_and_in_any_dtype_that_holds_it() -> None:
    logits, rows = some_logits(64, 151936, torch.bfloat16, ties=False), some_rows(64, 2)
    together, _ = kernel(logits, rows)
    assert kernel(logits.float(), rows)[0] == together
    assert [kernel(logits[n : n + 1], rows[n : n + 1])[0][0] for n in range(64)] == together


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_k=3, top_p=0.9)], ids=str)
def test_unusable_rows_are_told_and_leave_others_alone(params: SamplingParams) -> None:
    logits = some_logits(6, 9000, torch.float32, ties=False)
    logits[1, 8500] = torch.nan
    logits[2, 3] = torch.inf
    logits[3] = -torch.inf
    logits[4, :8999] = -torch.inf
    tokens, ok = kernel(logits, [SampleRow(params, 1, n) for n in range(6)])
    assert ok == [True, False, False, False, True, True]
    assert tokens[1:5] == [0, 0, 0, 8999]


def test_padding_rows_are_skipped_and_others_kept_in_their_slots() -> None:
    from memory_efficient_gpt.triton_kernels.token_choice import choose

    logits = some_logits(4, 5000, torch.bfloat16, ties=False).to(CUDA)
    logits[2] = torch.nan
    tokens, usable = torch.full((4,), -1, device=CUDA), torch.zeros(4, dtype=torch.uint8, device=CUDA)
    kept = torch.full((8,), -1, device=CUDA)
    choose(logits, None, tokens, usable, kept, torch.tensor([5, 0, 7, 3], dtype=torch.int32, device=CUDA))
    best = logits.argmax(-1).tolist()
    assert tokens.tolist() == [best[0], best[1], 0, best[3]] and usable.tolist() == [1, 1, 1, 1]
    assert kept.tolist() == [best[1], -1, -1, best[3], -1, best[0], -1, 0]


def texts(engine: Engine, numbers: list[int]) -> dict[str, list[int]]:
    options: list[dict[str, Any]] = [
        {"temperature": 0.0}, {"top_p": 0.8}, {"top_k": 5, "temperature": 1.3}, {"min_p": 0.1}, {},
        {"top_p": 0.9, "logprobs": 2}, {"top_p": 0.7, "min_tokens": 6}, {"repetition_penalty": 1.2},
    ]  # fmt: skip
    for number in numbers:
        params = SamplingParams(max_tokens=20, ignore_eos=True, seed=number, **options[number])
        prompt = tuple(range(3, 9 + 5 * number))
        engine.submit(Request(id=str(number), prompt_token_ids=prompt, params=params))
    got: dict[str, list[int]] = {}
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            got.setdefault(event.request_id, []).extend(event.token_ids)
    return got


def test_filtered_rows_are_drawn_in_the_graph_as_without_one() -> None:
    together = texts(make_engine("llama", "cuda", dtype="float32"), list(range(8)))
    engine = make_engine("llama", "cuda", dtype="float32")
    for _ in range(2):  # the second time by graphs
        for number in range(8):
            assert texts(engine, [number])[str(number)] == together[str(number)]
    assert texts(make_engine("llama", "cuda", cuda_graphs=False), list(range(8))) == together
    graphs: Any = engine._runner._replays  # type: ignore[attr-defined]
    assert any(kind.choice is not None for kind in graphs._graphs)


def test_without_own_kernels_torch_draws() -> None:
    engine = make_engine("llama", "cuda", native_kernels=False)
    assert engine.info.attention_backend != "triton"
    got = texts(engine, [0, 1, 2])
    assert [len(got[name]) for name in ("0", "1", "2")] == [20, 20, 20]

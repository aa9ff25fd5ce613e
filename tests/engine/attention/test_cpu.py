"""The native CPU backend: against a float64 oracle on every instruction set, and its bit-for-bit promises."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from memory_efficient_gpt.attention.context import AttentionOptions, LayerCache, StepContext
from memory_efficient_gpt.attention.cpu import NativeCPUBackend
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from memory_efficient_gpt.native.build import Isa, Unavailable
from memory_efficient_gpt.native.ops import load_kernels
from tests.engine.attention.oracle import PagedStep, Shape, expected, make_step

STEPS = {
    "prefill": ([5, 9, 1], [5, 9, 1]),
    "chunk": ([4, 7], [11, 7 + 12]),
    "decode": ([1, 1, 1, 1], [3, 14, 8, 70]),
    "mixed": ([1, 6, 1, 3, 2], [9, 6, 1, 13, 67]),
}
HEADS = {"MHA": (4, 4), "GQA": (6, 2), "MQA": (4, 1)}
FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 5},
    "softcap": {"softcap": 1.5},
    "sinks": {"sinks": True},
    "alibi": {"alibi": True},
    "everything": {"window": 6, "softcap": 2.0, "sinks": True, "alibi": True},
}
DTYPES = {
    "fp32": (torch.float32, torch.float32),
    "fp32 on int8": (torch.float32, torch.int8),
    "fp32 on bf16": (torch.float32, torch.bfloat16),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "bf16 on int8": (torch.bfloat16, torch.int8),
}
# The oracle sees the stored numbers, so only arithmetic differs. float32: a few units in the last place of
# sums of up to 1,500 terms. bfloat16: probabilities are rounded once (2^-9 of each term, so at most
# 2^-9 * max|v| of the sum, |v| < 5) and the output once (2^-9 of itself).
TOLERANCES = {torch.float32: (4e-6, 4e-6), torch.bfloat16: (2**-9, 5 * 2**-9)}


ISAS = [isa for isa in get_args(Isa) if isa != "amx"]  # whose own kernels multiply quantized weights only


@pytest.fixture(scope="module", params=ISAS)
def backend(request: pytest.FixtureRequest) -> NativeCPUBackend:
    kernels = load_kernels(request.param)
    if isinstance(kernels, Unavailable):
        pytest.skip(kernels.reason)
    return NativeCPUBackend(kernels)


def options_for(feature: str, query_heads: int, scale: float = 0.3) -> AttentionOptions:
    wanted = dict(FEATURES[feature])
    sinks, alibi = wanted.pop("sinks", False), wanted.pop("alibi", False)
    return AttentionOptions(
        scale=scale,
        sinks=torch.linspace(-1, 2, query_heads) if sinks else None,
        alibi_slopes=torch.linspace(0.1, 0.5, query_heads) if alibi else None,
        **wanted,
    )


def check(step: PagedStep, got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == step.query.dtype
    rtol, atol = TOLERANCES[got.dtype]
    torch.testing.assert_close(got.double(), want, rtol=rtol, atol=atol)


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("kind", STEPS)
def test_equals_the_oracle(backend: NativeCPUBackend, kind: str, feature: str, dtypes: str) -> None:
    dtype, cache_dtype = DTYPES[dtypes]
    step = make_step(backend, *STEPS[kind], shape=Shape(6, 2), dtype=dtype, cache_dtype=cache_dtype)
    options = options_for(feature, 6)
    check(step, step.run(backend, options), expected(step, options))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("feature", ["plain", "everything"])
@pytest.mark.parametrize("heads", HEADS)
def test_every_head_ratio(backend: NativeCPUBackend, heads: str, feature: str, dtypes: str) -> None:
    dtype, cache_dtype = DTYPES[dtypes]
    shape = Shape(*HEADS[heads])
    step = make_step(backend, *STEPS["mixed"], shape=shape, dtype=dtype, cache_dtype=cache_dtype)
    options = options_for(feature, shape.query_heads)
    check(step, step.run(backend, options), expected(step, options))


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("sizes", [(1, 1), (7, 3), (24, 10), (33, 80), (128, 96)], ids=str)
def test_any_head_size(backend: NativeCPUBackend, sizes: tuple[int, int], dtypes: str) -> None:
    dtype, cache_dtype = DTYPES[dtypes]
    shape = Shape(4, 2, key_dim=sizes[0], value_dim=sizes[1])
    step = make_step(backend, *STEPS["mixed"], shape=shape, dtype=dtype, cache_dtype=cache_dtype)
    options = options_for("plain", 4, scale=sizes[0] ** -0.5)
    check(step, step.run(backend, options), expected(step, options))


@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16 on int8"])
def test_long_contexts(backend: NativeCPUBackend, dtypes: str, feature: str) -> None:
    """Across tiles of 64 keys and splits of 1,024, for a prompt's chunk and for single tokens."""
    dtype, cache_dtype = DTYPES[dtypes]
    lens = ([70, 1, 1], [1100, 1025, 1500])
    step = make_step(backend, *lens, shape=Shape(6, 2), dtype=dtype, cache_dtype=cache_dtype, block_size=16)
    options = options_for(feature, 6)
    if options.window is not None:
        options = AttentionOptions(0.3, 90, options.softcap, options.sinks, options.alibi_slopes)
    check(step, step.run(backend, options), vectorized_oracle(step, options))


def vectorized_oracle(step: PagedStep, options: AttentionOptions) -> torch.Tensor:
    """The definition in float64, a row at a time."""
    outputs, group, token = [], step.shape.query_heads // step.shape.kv_heads, 0
    for new, (keys, values) in zip(step.query_lens, step.history, strict=True):
        total = keys.shape[0]
        query = step.query[token : token + new].double()
        token += new
        scores = options.scale * torch.einsum("qhd,khd->hqk", query, keys.repeat_interleave(group, 1))
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        distance = torch.arange(total) - torch.arange(total - new, total).unsqueeze(1)
        if options.alibi_slopes is not None:
            scores = scores + options.alibi_slopes.double().view(-1, 1, 1) * distance
        hidden = distance > 0
        if options.window is not None:
            hidden |= distance <= -options.window
        weights = scores.masked_fill(hidden, -torch.inf).exp()
        sums = weights.sum(-1, keepdim=True)
        if options.sinks is not None:
            sums = sums + options.sinks.double().exp().view(-1, 1, 1)
        outputs.append(torch.einsum("hqk,khd->qhd", weights / sums, values.repeat_interleave(group, 1)))
    return torch.cat(outputs)


class Sequence:
    """One sequence's numbers, to be computed in any company and in any pieces."""

    def __init__(self, length: int, seed: int, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.query = torch.randn((length, 6, 32), generator=generator).to(dtype)
        self.key = torch.randn((length, 2, 32), generator=generator).to(dtype)
        self.value = torch.randn((length, 2, 32), generator=generator).to(dtype)


class Batch:
    """Sequences over one cache, given out block after block."""

    def __init__(
        self, backend: NativeCPUBackend, dtype: torch.dtype, block_size: int, num_blocks: int
    ) -> None:
        pages = (num_blocks, block_size, 2)
        quantized = dtype == torch.int8
        scales = [torch.zeros(pages) if quantized else None for _ in range(2)]
        key, value = (torch.zeros((*pages, 32), dtype=dtype) for _ in range(2))
        self.cache = LayerCache(LayerKV("layer", 2, 32, 32, 6), key, value, *scales)
        self.backend, self.block_size, self.used = backend, block_size, 1

    def table(self, length: int) -> list[int]:
        count = -(-length // self.block_size)
        self.used += count
        return list(range(self.used - 1, self.used - 1 - count, -1))

    def run(
        self, pieces: list[tuple[Sequence, list[int], int, int]], options: AttentionOptions
    ) -> list[torch.Tensor]:
        """Compute tokens start..end of each (sequence, table, start, end) in one step."""
        width = max(len(table) for _, table, _, _ in pieces)
        tables = torch.zeros((len(pieces), width), dtype=torch.int32)
        slots = []
        for row, (_, table, start, end) in enumerate(pieces):
            tables[row, : len(table)] = torch.tensor(table)
            positions = torch.arange(start, end)
            slots.append(tables[row, positions // self.block_size].long() * self.block_size)
            slots[-1] += positions % self.block_size
        lens = [end - start for _, _, start, end in pieces]
        ends = [end for _, _, _, end in pieces]
        context = StepContext(
            backend=self.backend,
            slots=torch.cat(slots),
            block_tables=tables,
            query_starts=torch.tensor([0, *lens]).cumsum(0).int(),
            context_lens=torch.tensor(ends, dtype=torch.int32),
            max_query_len=max(lens),
            max_context_len=max(ends),
        )
        key = torch.cat([s.key[start:end] for s, _, start, end in pieces])
        value = torch.cat([s.value[start:end] for s, _, start, end in pieces])
        query = torch.cat([s.query[start:end] for s, _, start, end in pieces])
        self.backend.write(key, value, self.cache, context)
        return list(torch.split(self.backend.attend(query, self.cache, context, options), lens))


@pytest.mark.parametrize("feature", ["plain", "everything", "long window"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_rows_do_not_depend_on_batch_chunking_or_block_size(
    backend: NativeCPUBackend, dtypes: str, feature: str
) -> None:
    dtype, cache_dtype = DTYPES[dtypes]
    options = options_for("plain" if feature == "long window" else feature, 6)
    if feature == "long window":
        options = AttentionOptions(0.3, window=1030)
    sequences = [Sequence(length, seed, dtype) for seed, length in enumerate([1100, 75, 130])]
    alone = []
    for sequence in sequences:
        batch = Batch(backend, cache_dtype, 16, 80)
        length = sequence.query.shape[0]
        alone += batch.run([(sequence, batch.table(length), 0, length)], options)
    batch = Batch(backend, cache_dtype, 7, 250)
    tables = [batch.table(sequence.query.shape[0]) for sequence in sequences]
    done = [0, 0, 0]
    parts: list[list[torch.Tensor]] = [[], [], []]
    for sizes in [(1, 3, 129), (9, 1, 1), (1000, 68, 0), (1, 1, 0), (1, 2, 0), (88, 0, 0)]:
        rows = [row for row in range(3) if sizes[row]]
        pieces = [(sequences[r], tables[r], done[r], done[r] + sizes[r]) for r in rows]
        for row, out in zip(rows, batch.run(pieces, options), strict=True):
            parts[row].append(out)
            done[row] += sizes[row]
    for row in range(3):
        assert torch.equal(torch.cat(parts[row]), alone[row])


@pytest.mark.parametrize("dtypes", ["fp32", "bf16", "bf16 on int8"])
def test_results_do_not_depend_on_the_number_of_threads(backend: NativeCPUBackend, dtypes: str) -> None:
    """One long decode is split over threads when there are more than rows; many rows are not."""
    dtype, cache_dtype = DTYPES[dtypes]
    step = make_step(
        backend, [1], [4100], shape=Shape(4, 1, 64, 64), dtype=dtype, cache_dtype=cache_dtype, block_size=16
    )
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(step.run(backend, AttentionOptions(0.1)))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
    check(step, results[0], vectorized_oracle(step, AttentionOptions(0.1)))


def test_tokens_of_no_row_come_out_as_zeros(backend: NativeCPUBackend) -> None:
    step = make_step(backend, [2, 3], [4, 3])
    padded = torch.cat([step.query, torch.full((4, *step.query.shape[1:]), torch.nan)])
    backend.write(step.key, step.value, step.cache, step.context)
    got = backend.attend(padded, step.cache, step.context, AttentionOptions(0.3))
    assert torch.equal(got[5:], torch.zeros_like(got[5:]))
    check(step, got[:5], expected(step, AttentionOptions(0.3)))


def test_a_row_without_tokens_is_skipped(backend: NativeCPUBackend) -> None:
    step = make_step(backend, [2, 3], [4, 3])
    want = step.run(backend, AttentionOptions(0.3))
    context = step.context
    context.block_tables = torch.cat([context.block_tables, torch.zeros_like(context.block_tables)])
    context.query_starts = torch.tensor([0, 2, 5, 5, 5], dtype=torch.int32)
    context.context_lens = torch.tensor([4, 3, 0, 7], dtype=torch.int32)
    assert torch.equal(backend.attend(step.query, step.cache, context, AttentionOptions(0.3)), want)


def test_transposed_inputs_are_read_by_their_strides(backend: NativeCPUBackend) -> None:
    step = make_step(backend, *STEPS["mixed"], shape=Shape(6, 2))
    want = step.run(backend, AttentionOptions(0.3))
    for name in ("query", "key", "value"):
        tensor = getattr(step, name)
        setattr(step, name, tensor.transpose(0, 1).contiguous().transpose(0, 1))
        assert not getattr(step, name).is_contiguous()
    assert torch.equal(step.run(backend, AttentionOptions(0.3)), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [5, 64])
def test_int8_rows_keep_their_largest_value_and_zero(
    backend: NativeCPUBackend, size: int, dtype: torch.dtype
) -> None:
    step = make_step(backend, [3], [3], shape=Shape(2, 2, size, size), dtype=dtype, cache_dtype=torch.int8)
    step.key[1] = 0
    step.run(backend, AttentionOptions(0.3))
    assert step.cache.key_scale is not None
    slots = step.context.slots
    scale = step.cache.key_scale.view(-1, 2)[slots]
    numbers = step.key.float()
    assert torch.equal(scale, numbers.abs().amax(-1) / 127)
    safe = scale.masked_fill(scale == 0, 1).unsqueeze(-1)
    stored = step.cache.key.view(-1, 2, size)[slots]
    assert torch.equal(stored, (numbers / safe).round().to(torch.int8))


def test_types_without_a_kernel_are_refused_with_a_reason() -> None:
    for dtypes, word in [
        ((torch.float16, torch.float16), "float16 queries"),
        ((torch.float32, torch.float16), "float16 KV cache"),
    ]:
        refused = NativeCPUBackend.create(*dtypes)
        assert isinstance(refused, Unavailable)
        assert word in refused.reason.replace("torch.", "")


def test_shapes_that_do_not_fit_are_refused(backend: NativeCPUBackend) -> None:
    step = make_step(backend, [2], [2])
    with pytest.raises(ValueError, match="does not fit"):
        backend.attend(step.query[:, :, :8], step.cache, step.context, AttentionOptions(0.3))
    with pytest.raises(ValueError, match="do not fit"):
        backend.write(step.key[:, :1], step.value, step.cache, step.context)
    step.context.context_lens = step.context.context_lens.long()
    with pytest.raises(ValueError, match="context_lens must be contiguous int32"):
        backend.attend(step.query, step.cache, step.context, AttentionOptions(0.3))

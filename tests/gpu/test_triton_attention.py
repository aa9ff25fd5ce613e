"""Paged attention by Triton on a CUDA device, against the oracle in float64."""

from __future__ import annotations

import pytest
import torch

from memory_efficient_gpt.attention.context import StepContext
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from memory_efficient_gpt.attention.triton import TritonBackend, obstacle
from memory_efficient_gpt.attention.whole_prompts import LEAST_TOKENS, CudnnPrompts, whole_prompts_obstacle
from tests.engine.attention.oracle import PagedStep, Shape, expected, make_step
from tests.engine.attention.test_torch_backend import FEATURES, HEADS, STEPS, options_for

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda", 0)

CACHES = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.float8_e4m3fn]
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
"""By the queries' dtype, which probabilities and outputs are rounded to; up to 60 keys."""


def on_device(step: PagedStep) -> None:
    """Move everything that the backend reads; the oracle's numbers stay."""
    for name in ("query", "key", "value"):
        setattr(step, name, getattr(step, name).cuda())
    for name in ("key", "value", "key_scale", "value_scale"):
        tensor = getattr(step.cache, name)
        if tensor is not None:
            setattr(step.cache, name, tensor.cuda())
    context: StepContext = step.context
    for name in ("slots", "block_tables", "query_starts", "context_lens"):
        setattr(context, name, getattr(context, name).cuda())


@pytest.mark.parametrize("cache_dtype", CACHES, ids=str)
@pytest.mark.parametrize("feature", FEATURES)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", STEPS)
def test_equals_the_oracle(kind: str, heads: str, feature: str, cache_dtype: torch.dtype) -> None:
    query_heads, kv_heads = HEADS[heads]
    dtype = cache_dtype if cache_dtype in TOLERANCES else torch.bfloat16
    backend = TritonBackend()
    step = make_step(
        TorchBackend(), *STEPS[kind], shape=Shape(query_heads, kv_heads), dtype=dtype, cache_dtype=cache_dtype
    )
    options = options_for(feature, query_heads)
    wanted = expected(step, options)
    on_device(step)
    for name in ("sinks", "alibi_slopes"):
        tensor = getattr(options, name)
        if tensor is not None:
            object.__setattr__(options, name, tensor.cuda())
    got = step.run(backend, options)
    assert got.dtype is dtype
    assert float((got.double().cpu() - wanted).abs().max()) < TOLERANCES[dtype]


@pytest.mark.parametrize("dims", [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)])
def test_every_size_of_head(dims: tuple[int, int]) -> None:
    backend = TritonBackend()
    shape = Shape(8, 2, key_dim=dims[0], value_dim=dims[1])
    step = make_step(TorchBackend(), *STEPS["mixed"], shape=shape, dtype=torch.bfloat16)
    options = options_for("plain", 8)
    wanted = expected(step, options)
    on_device(step)
    got = step.run(backend, options).double().cpu()
    assert float((got - wanted).abs().max()) < TOLERANCES[torch.bfloat16]


@pytest.mark.parametrize("lens", [[1, 1], [1, 130, 1], [200]], ids=str)
def test_blocks_of_64_tokens_and_long_contexts(lens: list[int]) -> None:
    """A tile of keys lies within a block, tiles are walked without a mask, rows are split."""
    contexts = [700, 200, 300][: len(lens)]
    step = make_step(TorchBackend(), lens, contexts, dtype=torch.float32, block_size=64)
    options = options_for("plain", 4)
    wanted = expected(step, options)
    on_device(step)
    assert float((step.run(TritonBackend(), options).double().cpu() - wanted).abs().max()) < 5e-6


def test_a_decoding_row_gives_the_same_bits_alone_and_among_a_few_others() -> None:
    backend = TritonBackend()
    lens = [1] * 6  # contexts of one split, of several, and so long that splits are longer
    step = make_step(TorchBackend(), lens, [700, 33, 4500, 128, 129, 1], dtype=torch.bfloat16)
    options = options_for("plain", 4)
    on_device(step)
    together = step.run(backend, options)
    context = step.context
    for row in range(6):
        alone = StepContext(
            backend, context.slots[row : row + 1], context.block_tables[row : row + 1],
            torch.tensor([0, 1], dtype=torch.int32, device="cuda"), context.context_lens[row : row + 1],
            1, int(context.context_lens[row]), [1], [int(context.context_lens[row])],
        )  # fmt: skip
        assert torch.equal(
            backend.attend(step.query[row : row + 1], step.cache, alone, options)[0], together[row]
        )


@pytest.mark.parametrize("least", [256, 512, 1024])
@pytest.mark.parametrize("feature", ["plain", "everything"])
def test_longer_splits_give_the_same_but_for_rounding(least: int, feature: str) -> None:
    from memory_efficient_gpt.triton_kernels.attention_launch import decode_rows

    contexts = [700, 33, 4500, 256, 257, 1]
    step = make_step(TorchBackend(), [1] * 6, contexts, dtype=torch.float32, block_size=64)
    options = options_for(feature, 4)
    wanted = expected(step, options)
    on_device(step)
    for name in ("sinks", "alibi_slopes"):
        if (tensor := getattr(options, name)) is not None:
            object.__setattr__(options, name, tensor.cuda())
    out = torch.empty_like(step.query)
    backend = TritonBackend()
    backend.write(step.key, step.value, step.cache, step.context)
    decode_rows(step.query, step.cache, step.context, options, out, 6, 4500, "ieee", least=least)
    assert float((out.double().cpu() - wanted).abs().max()) < 5e-6


@pytest.mark.parametrize(
    ("rows", "longest", "least"),
    [(1, 512, 128), (8, 1024, 128), (1, 8192, 128), (16, 1024, 256), (32, 1024, 256), (8, 8192, 1024),
     (64, 1024, 256), (136, 2048, 512), (256, 65536, 1024)],
)  # fmt: skip
def test_splits_are_longer_where_a_step_has_more_rows_or_longer_ones(
    rows: int, longest: int, least: int
) -> None:
    from memory_efficient_gpt.triton_kernels.attention_launch import least_split

    assert least_split(rows, 8, longest) == least


@pytest.mark.parametrize("rows", [3, 40, 70])
def test_steps_of_few_rows_and_of_many_are_right(rows: int) -> None:
    """They differ in the shortest split and in what kernels read before the one before has ended."""
    contexts = [1 + 997 * row % 1500 for row in range(rows)]
    shape = Shape(16, 8, key_dim=64, value_dim=64)
    step = make_step(TorchBackend(), [1] * rows, contexts, shape=shape, dtype=torch.bfloat16, block_size=64)
    options = options_for("plain", 16)
    wanted = expected(step, options)
    on_device(step)
    got = step.run(TritonBackend(), options).double().cpu()
    assert float((got - wanted).abs().max()) < TOLERANCES[torch.bfloat16]


def test_what_it_does_not_take_is_named() -> None:
    device = torch.device("cuda")
    assert obstacle(device, torch.bfloat16, torch.int8, 128) is None
    assert "float64" in (obstacle(device, torch.float64, torch.float32, 64) or "")
    assert "at most 256" in (obstacle(device, torch.bfloat16, torch.bfloat16, 512) or "")


@pytest.mark.parametrize("dim", [64, 128])
def test_long_prompts_by_cudnn_equal_those_by_our_kernel(dim: int) -> None:
    if (reason := whole_prompts_obstacle(DEVICE, torch.bfloat16, torch.bfloat16, dim)) is not None:
        pytest.skip(reason)
    lens = [1, LEAST_TOKENS + 77, 1, LEAST_TOKENS]
    contexts = [300, LEAST_TOKENS + 77, 1, LEAST_TOKENS]
    shape = Shape(8, 2, key_dim=dim, value_dim=dim)
    step = make_step(TorchBackend(), lens, contexts, shape=shape, dtype=torch.bfloat16, block_size=16)
    on_device(step)
    options = options_for("plain", 8)
    own = step.run(TritonBackend(), options)
    got = step.run(TritonBackend(prompt_kernels=[CudnnPrompts(dim)]), options)
    assert not torch.equal(got, own), "nothing was computed otherwise"
    assert float((got - own).abs().max()) < TOLERANCES[torch.bfloat16]

"""Recorded calls: replays compute what the code computes, on new numbers; what can't be is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import Kernels, load_kernels
from memory_efficient_gpt.native.recording import NotRecordableError, Recording, recording

pytestmark = pytest.mark.usefixtures("inference")
Code = Callable[[torch.Tensor], torch.Tensor]


@pytest.fixture
def inference() -> Iterator[None]:
    """As an engine computes."""
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def kernels() -> Kernels:
    loaded = load_kernels()
    if isinstance(loaded, Unavailable):
        pytest.skip(loaded.reason)
    return loaded


def record(kernels: Kernels, code: Code, x: torch.Tensor) -> tuple[Recording, torch.Tensor]:
    with recording(kernels.compiled) as recorder:
        out = code(x)
    return recorder.finish(), out


def numbers(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def native_layer(kernels: Kernels, dtype: torch.dtype) -> Code:
    """A residual block by our kernels, with views and torch's own calls between them."""
    norm, up, down = numbers(64, dtype=dtype), numbers(192, 64, dtype=dtype), numbers(64, 96, dtype=dtype)

    def code(x: torch.Tensor) -> torch.Tensor:
        h = kernels.rms_norm(x, norm, 1e-6)
        gate, value = kernels.linear(h, up).chunk(2, dim=-1)
        inner = kernels.gated(gate, value, "silu")
        return functional.gelu(x + kernels.linear(inner, down)).clone()

    return code


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_replay_gives_the_codes_bits_on_other_numbers(kernels: Kernels, dtype: torch.dtype) -> None:
    code, x = native_layer(kernels, dtype), numbers(3, 64, dtype=dtype)
    recorded, out = record(kernels, code, x)
    for seed in range(1, 4):
        x.copy_(numbers(3, 64, dtype=dtype, seed=seed))
        recorded.replay()
        assert torch.equal(out, code(x))
    assert recorded.num_native == 6  # with the sum and the copy
    assert recorded.num_torch == 1


@pytest.mark.parametrize(
    "code",
    [
        lambda x: torch.zeros(4, 8).index_add_(0, torch.tensor([1, 1, 3]), x),
        lambda x: x.transpose(0, 1).clone().add_(1.0)[2:].contiguous(),
        lambda x: torch.cat(x.split(4, dim=1), dim=0).softmax(-1),
        lambda x: x[torch.tensor([2, 0])] * x.max(dim=0).values,
        lambda x: x.expand(2, 3, 8).reshape(6, 8) + x.repeat(2, 1),
        lambda x: nn.functional.layer_norm(x, (8,)).masked_fill(x > 0, -1.0),
    ],
    ids=["accumulated", "in place", "split", "gathered", "expanded", "masked"],
)
def test_calls_of_torch_are_done_again_on_their_memory(kernels: Kernels, code: Code) -> None:
    x = numbers(3, 8, dtype=torch.float32)
    recorded, out = record(kernels, code, x)
    for seed in (1, 2):
        x.copy_(numbers(3, 8, dtype=torch.float32, seed=seed))
        recorded.replay()
        assert torch.equal(out, code(x))


@pytest.mark.parametrize(
    "code",
    [
        lambda x: x * float(x.sum()),
        lambda x: x * x.tolist()[0][0],
        lambda x: x * x.numpy()[0, 0],
        lambda x: x[x > 0],
        lambda x: x[x.nonzero()[0]],
        lambda x: x if (x > 0).any() else -x,
        lambda x: functional.dropout(x, 0.5, training=True),
    ],
    ids=["item", "tolist", "numpy", "mask", "nonzero", "bool", "random"],
)
def test_code_that_reads_numbers_or_draws_them_is_refused(kernels: Kernels, code: Code) -> None:
    with pytest.raises(NotRecordableError):
        record(kernels, code, numbers(3, 8, dtype=torch.float32))


def test_sizes_of_a_call_outlive_the_call(kernels: Kernels) -> None:
    """Attention and the cache's write pass structures that are gone after the call."""
    key_cache, value_cache = numbers(4, 8, 2, 16), numbers(4, 8, 2, 16)
    tables = torch.tensor([[1, 2]], dtype=torch.int32)
    starts, lens = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([11], dtype=torch.int32)
    slots = torch.tensor([18])

    def code(x: torch.Tensor) -> torch.Tensor:
        heads = x.view(1, 2, 16)
        kernels.write_kv(heads, heads, key_cache, value_cache, None, None, slots)
        return kernels.paged_attention(
            heads.repeat(1, 2, 1), key_cache, value_cache, None, None, tables, starts, lens, scale=0.25
        )

    x = numbers(1, 32)
    recorded, out = record(kernels, code, x)
    for seed in (1, 2):
        x.copy_(numbers(1, 32, seed=seed))
        lens.fill_(11 - seed)
        key_cache[2, 2].zero_()
        recorded.replay()
        replayed = out.clone()
        assert torch.equal(replayed, code(x))
        assert torch.equal(key_cache[2, 2], x.view(2, 16))


def test_nothing_is_noted_outside(kernels: Kernels) -> None:
    x, weight = numbers(1, 8), numbers(4, 8)
    recorded, _ = record(kernels, lambda x: kernels.linear(x, weight), x)
    kernels.linear(x, weight)
    assert (recorded.num_native, recorded.num_torch) == (1, 0)

"""Unpacking against packing with Python's integers; group sizes of checkpoints on the native layout."""

from __future__ import annotations

import pytest
import torch

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import load_kernels
from memory_efficient_gpt.native.packed_weight import dequantize_rows
from memory_efficient_gpt.quantization.foreign.bit_streams import WIDTHS, nibbles_of, unpack_words, words_of
from memory_efficient_gpt.quantization.foreign.raw_weight import RawWeight, pack_codes
from memory_efficient_gpt.quantization.modules import pack_weight
from memory_efficient_gpt.quantization.scheme import parse_scheme
from memory_efficient_gpt.quantization.storage import pack_nibbles
from tests.engine.quantization.foreign import packers


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("count", [1, 2, 7, 10, 11, 21, 22, 31, 32, 33, 42, 64, 97])
def test_unpacking_undoes_packing(bits: int, count: int) -> None:
    codes = torch.randint(2**bits, (3, count), generator=torch.Generator().manual_seed(count))
    words = packers.words(codes, bits)
    assert words.shape[1] == words_of(count, bits)
    assert torch.equal(unpack_words(words, bits, count).long(), codes)


@pytest.mark.parametrize("count", [8, 32, 40])
def test_words_of_4_bits_are_our_bytes(count: int) -> None:
    codes = torch.randint(16, (3, count), generator=torch.Generator().manual_seed(count))
    assert torch.equal(nibbles_of(packers.words(codes, 4), count), pack_nibbles(codes))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [8, 16, 24, 96, 256, 384, 1024])
def test_native_kernels_take_any_group_size_that_may_be_stored(bits: int, group: int) -> None:
    if isinstance(kernels := load_kernels(), Unavailable):
        pytest.skip(kernels.reason)
    generator = torch.Generator().manual_seed(group)
    grouped = packers.quantize(
        torch.randn(20, 1100, generator=generator), bits=bits, group=group, symmetric=False
    )
    codes = pack_codes(grouped.codes.to(torch.uint8), bits)
    weight = RawWeight(1100, bits, codes, grouped.scales, grouped.zeros, group).quantized()
    assert parse_scheme(str(weight.scheme), stored=True) == weight.scheme
    packed = pack_weight(weight, kernels)
    assert torch.equal(dequantize_rows(packed, torch.arange(20), torch.float32), weight.dequantize())
    x = torch.randn(5, 1100, generator=generator)
    want = x @ weight.dequantize().t()
    error = (kernels.quantized_linear(x, packed) - want).norm() / want.norm()
    assert error < 0.02  # the kernel rounds activations to 8 bits


@pytest.mark.parametrize("name", ["int4-g0", "int4-g12", "int4-g192", "int8-g130"])
def test_other_group_sizes_cannot_be_stored(name: str) -> None:
    with pytest.raises(ConfigError, match="group size"):
        parse_scheme(name, stored=True)
    with pytest.raises(ConfigError, match="group size 256"):
        parse_scheme("int4-g256")

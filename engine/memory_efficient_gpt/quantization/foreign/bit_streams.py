"""Codes of 2, 3, 4 or 8 bits out of 32-bit words.

Purpose: read rows of words as streams of bits, lowest bit first.
Does not know: which tensor the words are from, what the codes mean.
Invariant: code i of a row is bits i * b .. i * b + b - 1 of its stream, across words where b is 3.

    word 0                                  word 1
    bit 0                           bit 31  bit 0
    | code 0 | code 1 | code 2 | ...      | |  ...

Eight codes fill b bytes exactly, so no code is split between two such runs of bytes.

Letters: R rows, W words of a row, b bits of a code.
"""

from __future__ import annotations

import torch
from torch.nn import functional

WIDTHS = (2, 3, 4, 8)


def words_of(count: int, bits: int) -> int:
    """Words that hold `count` codes."""
    return -(-count * bits // 32)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """The first `count` codes of each row: `[R, W] int32` to `[R, count] uint8`."""
    stream = words.contiguous().view(torch.uint8)
    if bits == 8:
        return stream[:, :count].contiguous()
    if bits == 4:
        return torch.stack((stream & 15, stream >> 4), dim=-1).flatten(1)[:, :count].contiguous()
    runs = functional.pad(stream, (0, -stream.shape[1] % bits)).unflatten(1, (-1, bits)).int()
    joined = sum((runs[..., i] << 8 * i for i in range(1, bits)), runs[..., 0])
    codes = torch.stack([(joined >> bits * i) & (1 << bits) - 1 for i in range(8)], dim=-1)
    return codes.flatten(1)[:, :count].to(torch.uint8)


def nibbles_of(words: torch.Tensor, count: int) -> torch.Tensor:
    """`[R, W] int32` of 4-bit codes as `[R, ceil(count / 2)] uint8`: storage.py packs bytes the same way."""
    return words.contiguous().view(torch.uint8)[:, : -(-count // 2)].contiguous()

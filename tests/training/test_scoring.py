"""The definition of bits per byte against a plain reference."""

import itertools
import math

import pytest
import torch

from training.scoring import score_books, split_stream, window_starts

VOCAB = 11


def bigram_logits(ids: torch.Tensor) -> torch.Tensor:
    """A fixed bigram model: context beyond one token changes nothing, so windows must not matter."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))
    return table[ids]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 20, 37])
@pytest.mark.parametrize("stride", [1, 3, 8])
def test_every_token_is_scored_once(length: int, stride: int) -> None:
    books = [torch.randint(1, VOCAB, (length + 1,)), torch.randint(1, VOCAB, (5,))]
    score = score_books(bigram_logits, books, num_bytes=3 * length, window=8, stride=stride, rows=2)
    nats = 0.0
    for book in books:
        for previous, token in itertools.pairwise(book):
            nats -= float(bigram_logits(previous).log_softmax(-1)[token])
    assert score.tokens == length + 4
    assert score.nats == pytest.approx(nats, rel=1e-5)
    assert score.bits_per_byte == pytest.approx(nats / math.log(2) / (3 * length), rel=1e-5)
    assert score.perplexity == pytest.approx(math.exp(nats / (length + 4)), rel=1e-5)


def test_later_windows_have_the_promised_context() -> None:
    pairs = window_starts(count=100, window=16, stride=4)
    assert all(first - start >= 12 for start, first in pairs[1:])
    assert pairs[-1][0] + 16 == 100


def test_stream_is_split_at_separators() -> None:
    books = split_stream(torch.tensor([0, 5, 6, 0, 7, 0]), separator=0)
    assert [book.tolist() for book in books] == [[0, 5, 6], [0, 7]]

"""Scores a model on books: total negative log likelihood, bits per byte, next-token accuracy.

Purpose: the one definition of held-out quality. A book is END_OF_TEXT + its tokens; every token of
    the book is scored once, with sliding windows: each window after the first scores only the tokens
    that no earlier window scored, so they have at least `window - stride` tokens of context.
Doesn't know: what makes the logits (any callable [B, T] ids -> [B, T, V] logits).
Invariant: the separators are never scored and their bytes never counted.
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F  # noqa: N812

LogitsFunction = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Score:
    """Sums over scored tokens; `nats` is the negative log likelihood."""

    nats: float
    correct: int
    tokens: int
    bytes: int

    @property
    def bits_per_byte(self) -> float:
        """Bits that an ideal coder would spend on each UTF-8 byte."""
        return self.nats / math.log(2) / self.bytes

    @property
    def perplexity(self) -> float:
        """Per token."""
        return math.exp(self.nats / self.tokens)

    @property
    def accuracy(self) -> float:
        """Share of tokens that are the model's first choice."""
        return self.correct / self.tokens


def split_stream(stream: torch.Tensor, separator: int) -> list[torch.Tensor]:
    """The books of a stream, each with the separator before it: [n + 1] tokens for n scored ones."""
    marks = (stream == separator).nonzero().flatten().tolist()
    return [stream[start:end] for start, end in itertools.pairwise(marks) if end > start + 1]


def window_starts(count: int, window: int, stride: int) -> list[tuple[int, int]]:
    """(start, first scored target) of each window over `count` targets; the last one ends at the end."""
    if count <= window:
        return [(0, 0)]
    pairs, done = [(0, 0)], window
    while done < count:
        start = min(done - window + stride, count - window)
        pairs.append((start, done))
        done = start + window
    return pairs


@torch.no_grad()
def score_tokens(
    logits_of: LogitsFunction, tokens: torch.Tensor, window: int, stride: int, rows: int
) -> tuple[float, int]:
    """(nats, correct) over the targets tokens[1:] of one book."""
    pairs = window_starts(len(tokens) - 1, window, stride)
    width = min(window, len(tokens) - 1)
    nats, correct = 0.0, 0
    offsets = torch.arange(width + 1, device=tokens.device)
    for index in range(0, len(pairs), rows):
        starts, firsts = torch.tensor(pairs[index : index + rows], device=tokens.device).unbind(1)
        batch = tokens[starts[:, None] + offsets].long()
        logits = logits_of(batch[:, :-1]).float().flatten(0, 1)
        targets = batch[:, 1:].flatten()
        wanted = (starts[:, None] + offsets[:-1] >= firsts[:, None]).flatten()
        loss = F.cross_entropy(logits, targets, reduction="none")
        nats += float(loss[wanted].double().sum())
        correct += int((logits.argmax(-1) == targets)[wanted].sum())
    return nats, correct


def score_books(
    logits_of: LogitsFunction,
    books: list[torch.Tensor],
    num_bytes: int,
    window: int,
    stride: int,
    rows: int = 16,
) -> Score:
    """The score of all books together."""
    results = [score_tokens(logits_of, book, window, stride, rows) for book in books]
    nats, correct = sum(r[0] for r in results), sum(r[1] for r in results)
    return Score(nats, correct, sum(len(book) - 1 for book in books), num_bytes)

"""The same sequences twice: alone through transformers' own attention, and packed through the paged cache.

Purpose: measure whether packed, paged, chunked execution of a model gives what the model itself gives.
Does not know: what follows from the answer.
Invariant: the plain run comes first, on the untouched model; nothing is changed outside the model given.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from memory_efficient_gpt.attention.context import StepContext
from memory_efficient_gpt.attention.interface import forward_packed
from memory_efficient_gpt.attention.model_setup import prepare_model
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from memory_efficient_gpt.errors import UnsupportedModelError
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from memory_efficient_gpt.kv_cache.pool import KVPool

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TOLERANCE: Final = 1e-3
"""Largest relative difference taken for rounding: float32 gives about 1e-6, a wrong mask 1e-1."""
_BLOCK_SIZE: Final = 4
_LENGTHS: Final = (23, 9, 14)
_FIRST_STEPS: Final = (((0, 7), (1, 5)), ((0, 7), (1, 1), (2, 11)), ((2, 1), (0, 3), (1, 1)))
"""(sequence, tokens): prompts in chunks beside decodes, in changing order; then all decode to their ends."""
_FIRST_TOKEN_ID: Final = 4
"""Ids below are left out: padding and the like may be treated specially."""

Plan = tuple[tuple[int, int], ...]


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Random weights of a size at which attention is far from uniform, so that a wrong mask shows.

    Matrices get a variance of 1 / inputs; vectors keep their initial values (1 for norms) plus noise.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * min(parameter.shape[-2:]) ** -0.5)
            else:
                parameter.add_(noise, alpha=0.1)


class NotCausalError(UnsupportedModelError):
    """Later tokens change earlier ones' logits: the model does not generate from left to right."""


@dataclass(frozen=True, slots=True)
class PlainRun:
    """Token ids of each sequence, and the logits `[n, V]` that the model gives it alone, in float32."""

    sequences: list[torch.Tensor]
    logits: list[torch.Tensor]


def plain_run(model: PreTrainedModel, vocab_size: int) -> PlainRun:
    """Run random sequences one by one. `model` is in float32 on the CPU, with any causal attention.

    Raises NotCausalError, ArithmeticError for logits that are not finite, and whatever the model raises.
    """
    generator = torch.Generator().manual_seed(0)
    first = min(_FIRST_TOKEN_ID, vocab_size - 1)
    sequences = [torch.randint(first, vocab_size, (n,), generator=generator) for n in _LENGTHS]
    model.train(False)
    with torch.no_grad():
        logits = [_plain_logits(model, ids) for ids in sequences]
        part = _LENGTHS[0] // 2
        error = _relative_error(_plain_logits(model, sequences[0][:part]), logits[0][:part])
    if not all(bool(part.isfinite().all()) for part in logits):
        raise ArithmeticError("the logits of random weights are not finite")
    if not error < TOLERANCE:
        raise NotCausalError(
            f"{type(model).__name__} does not generate from left to right: later tokens change earlier "
            f"logits by {error:.1e} (relative). Only causal decoders are served."
        )
    return PlainRun(sequences, logits)


def packed_error(model: PreTrainedModel, layers: list[LayerKV], plain: PlainRun) -> float:
    """Largest difference of packed from plain logits, relative to the largest plain logit of its sequence.

    `model` gave `plain`; it stays prepared for packed steps. Whatever the model raises passes through.
    """
    prepare_model(model)
    with torch.no_grad():
        packed = _packed_logits(model, layers, plain.sequences)
    return max(_relative_error(a, b) for a, b in zip(packed, plain.logits, strict=True))


def _plain_logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=ids.unsqueeze(0), use_cache=False).logits[0]
    return logits.float()


def _relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """NaN counts as infinitely wrong."""
    error = float((got - wanted).abs().max() / wanted.abs().max())
    return error if error == error else float("inf")


def _packed_logits(
    model: PreTrainedModel, layers: list[LayerKV], sequences: list[torch.Tensor]
) -> list[torch.Tensor]:
    needed = [-(-ids.shape[0] // _BLOCK_SIZE) for ids in sequences]
    pool = KVPool(layers, sum(needed) + 1, _BLOCK_SIZE, torch.float32, torch.device("cpu"))
    pool.attach(model)
    tables = torch.zeros((len(sequences), max(needed)), dtype=torch.int32)
    blocks = torch.randperm(sum(needed), generator=torch.Generator().manual_seed(0)) + 1
    for row, own in enumerate(torch.split(blocks, needed)):
        tables[row, : needed[row]] = own
    logits: list[list[torch.Tensor]] = [[] for _ in sequences]
    done = [0] * len(sequences)
    for plan in _plans():
        rows = _run_step(model, plan, sequences, tables, done)
        for (sequence, count), part in zip(plan, rows, strict=True):
            logits[sequence].append(part)
            done[sequence] += count
    return [torch.cat(parts) for parts in logits]


def _plans() -> Iterator[Plan]:
    left = list(_LENGTHS)
    for plan in _FIRST_STEPS:
        for sequence, count in plan:
            left[sequence] -= count
        yield plan
    while any(left):
        yield tuple((sequence, 1) for sequence, rest in enumerate(left) if rest)
        left = [max(0, rest - 1) for rest in left]


def _run_step(
    model: PreTrainedModel,
    plan: Plan,
    sequences: list[torch.Tensor],
    tables: torch.Tensor,
    done: list[int],
) -> list[torch.Tensor]:
    """Logits of each of the step's parts, `[count, V]`; asked for backwards, to test that order counts."""
    counts = [count for _, count in plan]
    positions = [torch.arange(done[s], done[s] + count) for s, count in plan]
    ids = torch.cat([sequences[s][at] for (s, _), at in zip(plan, positions, strict=True)])
    slots = [
        tables[s, at // _BLOCK_SIZE].long() * _BLOCK_SIZE + at % _BLOCK_SIZE
        for (s, _), at in zip(plan, positions, strict=True)
    ]
    context_lens = [done[s] + count for s, count in plan]
    context = StepContext(
        backend=TorchBackend(),
        slots=torch.cat(slots),
        block_tables=tables[[s for s, _ in plan]],
        query_starts=torch.tensor([0, *counts]).cumsum(0).int(),
        context_lens=torch.tensor(context_lens, dtype=torch.int32),
        max_query_len=max(counts),
        max_context_len=max(context_lens),
        host_query_lens=counts,
        host_context_lens=context_lens,
    )
    backwards = torch.arange(sum(counts) - 1, -1, -1)
    logits = forward_packed(model, ids, torch.cat(positions), context, backwards)
    return list(torch.split(logits.flip(0).float(), counts))

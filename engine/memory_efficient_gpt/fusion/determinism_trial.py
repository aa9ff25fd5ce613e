"""Whether a prepared model gives a sequence the same bits however it is computed, found out on the model.

Purpose: compute a few tokens whole, in chunks, one by one and among others, and compare.
Does not know: architectures' names, kernels, which layers might be to blame (determinism.py).
Invariant: the model is not changed, and is left without the pool that the trial used.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Final

import torch

from memory_efficient_gpt.attention.context import AttentionBackend, StepContext
from memory_efficient_gpt.attention.interface import CACHE_ATTRIBUTE, forward_packed
from memory_efficient_gpt.kv_cache.geometry import LayerKV
from memory_efficient_gpt.kv_cache.pool import KVPool
from memory_efficient_gpt.native.deferral import DeferredKind, deferring

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TOKENS: Final = 11
_CHUNKS: Final = (4, 1, 6)
_NEIGHBOURS: Final = (1, 90, 1)
"""Tokens of the sequences beside it: with them a step has larger tiles than alone."""


@dataclass(frozen=True, slots=True)
class _Part:
    """Tokens start .. start + count of a sequence, which is row `row` of the block tables."""

    row: int
    start: int
    count: int


def try_determinism(
    model: PreTrainedModel,
    layers: Sequence[LayerKV],
    backend: AttentionBackend,
    device: torch.device,
    kv_dtype: torch.dtype,
    block_size: int,
    defers: frozenset[DeferredKind] = frozenset(),
) -> str | None:
    """How a sequence was computed when its logits changed, or None: in chunks, token by token, among others.

    defers: what waits for the next call in some steps (native/deferral.py). Raises what the model raises.
    """
    trial = _Trial(model, layers, backend, device, kv_dtype, block_size)
    alone = [_Part(0, 0, _TOKENS)]
    starts = [0, *accumulate(_CHUNKS)][:-1]
    beside = [_Part(row, 0, count) for row, count in enumerate(_NEIGHBOURS, start=1)]
    ways: dict[str, list[list[_Part]]] = {
        "as before": [alone],
        "in chunks": [[_Part(0, start, count)] for start, count in zip(starts, _CHUNKS, strict=True)],
        "token by token": [[_Part(0, start, 1)] for start in range(_TOKENS)],
        "among other sequences": [[*beside[:2], *alone, beside[2]]],
    }
    with torch.inference_mode(), trial:
        want = trial.logits([alone])
        for name, steps in ways.items():
            if not torch.equal(trial.logits(steps), want):
                return f"computed {name}"
        if defers and not torch.equal(trial.logits([alone], defers), want):
            return "with calls joined as in captured steps"
    return None


class _Trial:
    """A context in which the model has a small cache."""

    def __init__(
        self, model: PreTrainedModel, layers: Sequence[LayerKV], backend: AttentionBackend,
        device: torch.device, kv_dtype: torch.dtype, block_size: int,
    ) -> None:  # fmt: skip
        self._model, self._layers, self._backend, self._device = model, layers, backend, device
        self._block_size = block_size
        self._width = -(-max(_TOKENS, *_NEIGHBOURS) // block_size)
        rows = 1 + len(_NEIGHBOURS)
        self._pool = KVPool(layers, rows * self._width + 1, block_size, kv_dtype, device)

    def __enter__(self) -> None:
        self._pool.attach(self._model)

    def __exit__(self, *error: object) -> None:
        for layer in self._layers:
            vars(self._model.get_submodule(layer.module)).pop(CACHE_ATTRIBUTE, None)

    def logits(
        self, steps: Sequence[Sequence[_Part]], defers: frozenset[DeferredKind] = frozenset()
    ) -> torch.Tensor:
        """Of the first sequence `[11, V]`, computed in these steps."""
        return torch.cat([part for step in steps for part in self._run(step, defers)])

    def _run(self, step: Sequence[_Part], defers: frozenset[DeferredKind]) -> Iterator[torch.Tensor]:
        counts = [part.count for part in step]
        seen = [part.start + part.count for part in step]
        starts = [0, *accumulate(counts)]
        positions = torch.cat([torch.arange(part.start, part.start + part.count) for part in step])
        rows = torch.cat([torch.full((part.count,), part.row) for part in step])
        blocks = 1 + rows * self._width + positions // self._block_size
        tables = torch.stack([1 + part.row * self._width + torch.arange(self._width) for part in step])
        context = StepContext(
            backend=self._backend,
            slots=self._there(blocks * self._block_size + positions % self._block_size),
            block_tables=self._there(tables.int()),
            query_starts=self._there(torch.tensor(starts, dtype=torch.int32)),
            context_lens=self._there(torch.tensor(seen, dtype=torch.int32)),
            max_query_len=max(counts),
            max_context_len=max(seen),
            host_query_lens=counts,
            host_context_lens=seen,
        )
        vocabulary = int(self._model.config.get_text_config().vocab_size)
        ids = 1 + (positions * 7 + rows * 3) % max(1, min(vocabulary - 1, 1000))
        wanted = [
            start + place for part, start in zip(step, starts, strict=False) if part.row == 0
            for place in range(part.count)
        ]  # fmt: skip
        with deferring(defers):
            logits = forward_packed(
                self._model, self._there(ids), self._there(positions), context,
                self._there(torch.tensor(wanted)),
            )  # fmt: skip
        yield logits

    def _there(self, numbers: torch.Tensor) -> torch.Tensor:
        return numbers.to(self._device)

"""The sampling side of one step: rows described on the host, laid out as tensors.

Purpose: turn the rows' parameters into tensors, and only for features that some row uses.
Does not know: logits, the vocabulary's size, how features are computed.
Invariant: building a batch never reads from the device; what is uploaded is uploaded asynchronously.

Letters: R rows of the step, S rows that draw (the others take the most likely token), P rows with
penalties, E entries of a flat (row, token) list.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt.sampling.rng import uniforms
from memory_efficient_gpt.uploads import upload


@dataclass(frozen=True, slots=True)
class SampleRow:
    """One token to choose.

    seed: of the sequence (a request's n sequences have different ones). counter: the index of the output
    token being chosen. history: prompt tokens, in any order and with or without repeats (a caller that keeps
    `np.unique(prompt)` saves converting a long prompt at each step). outputs: output tokens known on the
    host. history is read only with a repetition penalty, outputs only with any. suppress: ids that may
    not be chosen now (end-of-sequence and stop ids while min_tokens is not reached).
    """

    params: SamplingParams
    seed: int
    counter: int
    history: Sequence[int] | npt.NDArray[np.int64] = ()
    outputs: Sequence[int] | npt.NDArray[np.int64] = ()
    suppress: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Entries:
    """A list of (row, token) pairs: both `[E] int64`."""

    rows: torch.Tensor
    ids: torch.Tensor


@dataclass(frozen=True, slots=True)
class Penalties:
    """The P penalized rows. rows `[P] int64` are their places in the batch.

    repetition, presence, frequency: `[P] float32`. prompt: tokens of the prompts, repeats allowed (None: no
    row has a repetition penalty, or there are none). outputs: distinct output tokens, and `[E] float32`
    how often each occurs (None: there are none). Both count rows from 0 to P - 1.
    pending `[P] int64`: the token that outputs lack yet, or -1.
    """

    rows: torch.Tensor
    repetition: torch.Tensor
    presence: torch.Tensor
    frequency: torch.Tensor
    prompt: Entries | None
    outputs: Entries | None
    counts: torch.Tensor | None
    pending: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Truncation:
    """Rows (among the S that draw) to cut by top_k and top_p alike.

    rows `[G] int64`, or None for all S. top_k `[G, 1] int64` and the largest one, or None: no limit.
    top_p `[G, 1] float64`, or None: no row has one; 1 for rows without.
    """

    rows: torch.Tensor | None
    top_k: torch.Tensor | None
    max_top_k: int
    top_p: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Draw:
    """The S rows that draw. rows `[S] int64`, or None for all R.

    temperature, min_p (None: no row has one): `[S, 1] float32`; uniform `[S, 1] float64` in [0, 1).
    truncations: at most two disjoint groups of rows; rows in none are not cut.
    """

    rows: torch.Tensor | None
    temperature: torch.Tensor
    min_p: torch.Tensor | None
    uniform: torch.Tensor
    truncations: tuple[Truncation, ...]


@dataclass(frozen=True, slots=True)
class RowParameters:
    """How each of the R rows is chosen, with no lists of who wants what: all features in every row.

    temperature `[R] float32`: 0 for the most likely token. min_p `[R] float32`, top_k `[R] int32`,
    top_p `[R] float64`: 0 for none. uniform `[R] float64` in [0, 1).
    """

    temperature: torch.Tensor
    min_p: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    uniform: torch.Tensor

    def as_draw(self, vocabulary: int) -> Draw:
        """The same for `draw_tokens`, with the temperature 1 where there is none."""
        no_limit = Truncation(
            rows=None,
            top_k=torch.where(self.top_k > 0, self.top_k, vocabulary).long()[:, None],
            max_top_k=vocabulary,
            top_p=torch.where(self.top_p > 0, self.top_p, 1.0)[:, None],
        )
        return Draw(
            rows=None,
            temperature=torch.where(self.temperature > 0, self.temperature, 1.0)[:, None],
            min_p=self.min_p[:, None],
            uniform=self.uniform[:, None],
            truncations=(no_limit,),
        )


class HostParameters:
    """The numbers of RowParameters but for the uniform ones, from each row's SamplingParams."""

    def __init__(self, params: Sequence[SamplingParams]) -> None:
        drawn = [not takes_most_likely(p) for p in params]
        self.draws = any(drawn)
        pairs = list(zip(params, drawn, strict=True))
        self.temperature = np.array([p.temperature if d else 0.0 for p, d in pairs], dtype=np.float32)
        self.min_p = np.array([p.min_p for p in params], dtype=np.float32)
        self.top_k = np.array([p.top_k or 0 for p in params], dtype=np.int32)
        self.top_p = np.array([p.top_p if p.top_p < 1.0 else 0.0 for p in params], dtype=np.float64)


class SamplingBatch:
    """All that `sample` needs besides logits.

    draw is None when every row is greedy, and with a kernel, for which `parameters` has what it needs. bias:
    entries and `[E] float32` to add. logprob_rows: host indices of rows that want log probabilities, with
    `logprob_counts` alternatives each; logprob_index `[L] int64` are the same rows on the device, or None for
    none or all.
    """

    def __init__(
        self,
        rows: Sequence[SampleRow],
        device: torch.device,
        pending: torch.Tensor | None = None,
        *,
        kernel: bool = False,
    ) -> None:
        """`pending [R] int64` on `device`: each row's newest token where `outputs` lacks it, else -1.

        It is for penalties when a step is prepared before the last one's tokens are read.
        kernel: whether tokens are chosen by the Triton kernel.
        """
        self.num_rows = len(rows)
        self.device = device
        self.kernel = kernel
        drawing = [number for number, row in enumerate(rows) if not takes_most_likely(row.params)]
        self.draw = self._build_draw(rows, drawing) if drawing and not kernel else None
        self.parameters = self._build_parameters(rows) if drawing and kernel else None
        self.bias = self._build_bias(rows)
        self.suppressed = self._entries([row.suppress for row in rows])
        self.penalties = self._build_penalties(rows, pending)
        self.logprob_rows = tuple(i for i, row in enumerate(rows) if row.params.logprobs is not None)
        self.logprob_counts = tuple(rows[i].params.logprobs or 0 for i in self.logprob_rows)
        self.logprob_index = self._index(self.logprob_rows, self.num_rows) if self.logprob_rows else None

    @property
    def adjusts(self) -> bool:
        """Whether any row's logits are changed before tokens are chosen."""
        return self.bias is not None or self.suppressed is not None or self.penalties is not None

    def _build_parameters(self, rows: Sequence[SampleRow]) -> RowParameters:
        host = HostParameters([row.params for row in rows])
        uniform = uniforms([row.seed for row in rows], [row.counter for row in rows])
        columns = np.array([host.temperature, host.min_p, host.top_k, host.top_p, uniform])
        temperature, min_p, top_k, top_p, uniform_ = self._upload(columns)  # one transfer
        return RowParameters(temperature.float(), min_p.float(), top_k.int(), top_p, uniform_)

    def _build_draw(self, rows: Sequence[SampleRow], drawing: Sequence[int]) -> Draw:
        params = [rows[i].params for i in drawing]
        uniform = uniforms([rows[i].seed for i in drawing], [rows[i].counter for i in drawing])
        temperature = [p.temperature for p in params]
        min_p = [p.min_p for p in params]
        columns = self._upload(np.array([temperature, min_p, uniform])).unsqueeze(-1)  # one transfer
        limited = [i for i, p in enumerate(params) if p.top_k is not None]
        nucleus = [i for i, p in enumerate(params) if p.top_k is None and p.top_p < 1.0]
        return Draw(
            rows=self._index(drawing, self.num_rows),
            temperature=columns[0].float(),
            min_p=columns[1].float() if any(min_p) else None,
            uniform=columns[2],
            truncations=tuple(self._build_truncation(params, g) for g in (limited, nucleus) if g),
        )

    def _build_truncation(self, params: Sequence[SamplingParams], group: Sequence[int]) -> Truncation:
        top_k = [k for i in group if (k := params[i].top_k) is not None]
        top_p = [params[i].top_p for i in group]
        return Truncation(
            rows=self._index(group, len(params)),
            top_k=self._upload(np.array(top_k, dtype=np.int64)).unsqueeze(-1) if top_k else None,
            max_top_k=max(top_k, default=0),
            top_p=self._upload(np.array(top_p)).unsqueeze(-1) if min(top_p) < 1.0 else None,
        )

    def _build_bias(self, rows: Sequence[SampleRow]) -> tuple[Entries, torch.Tensor] | None:
        entries = self._entries([tuple(row.params.logit_bias) for row in rows])
        if entries is None:
            return None
        values = [bias for row in rows for bias in row.params.logit_bias.values()]
        return entries, self._upload(np.array(values, dtype=np.float32))

    def _build_penalties(self, rows: Sequence[SampleRow], pending: torch.Tensor | None) -> Penalties | None:
        chosen = [number for number, row in enumerate(rows) if row.params.penalized]
        if not chosen:
            return None
        params = [rows[i].params for i in chosen]
        factors = [(p.repetition_penalty, p.presence_penalty, p.frequency_penalty) for p in params]
        repetition, presence, frequency = self._upload(np.array(factors, dtype=np.float32).T)
        index = self._upload(np.array(chosen, dtype=np.int64))
        prompts = [rows[i].history if rows[i].params.repetition_penalty != 1.0 else () for i in chosen]
        distinct = [
            np.unique(np.asarray(rows[i].outputs, dtype=np.int64), return_counts=True) for i in chosen
        ]
        counts = np.concatenate([c for _, c in distinct]).astype(np.float32)
        return Penalties(
            rows=index,
            repetition=repetition,
            presence=presence,
            frequency=frequency,
            prompt=self._entries(prompts),
            outputs=self._entries([ids for ids, _ in distinct]),
            counts=self._upload(counts) if len(counts) else None,
            pending=None if pending is None else pending[index],
        )

    def _entries(self, ids: Sequence[Sequence[int] | npt.NDArray[np.int64]]) -> Entries | None:
        lengths = [len(row) for row in ids]
        if not any(lengths):
            return None
        flat = np.concatenate([np.asarray(row, dtype=np.int64) for row in ids])
        pairs = self._upload(np.stack([np.repeat(np.arange(len(ids)), lengths), flat]))
        return Entries(pairs[0], pairs[1])

    def _index(self, rows: Sequence[int], total: int) -> torch.Tensor | None:
        if len(rows) == total:
            return None
        return self._upload(np.array(rows, dtype=np.int64))

    def _upload(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return upload(array, self.device)


def takes_most_likely(params: SamplingParams) -> bool:
    """Whether no draw is needed: greedy, or a top_k or top_p that leaves only the most likely token."""
    return params.greedy or params.top_k == 1 or params.top_p == 0.0

"""The few sizes to which steps are padded, so that a captured graph fits many steps. No torch.

Purpose: from a step's sizes to the sizes of its graph; the packed inputs of such a step.
Does not know: models, devices.
Invariant: padding is inert: padding tokens are written to the trash block, and no row that counts sees them.

A step of decoding rows only has as many tokens as rows; its padding rows have one token and see one key, in
block 0. Padding tokens of other steps belong to no row, and their padding rows have no tokens.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import Final

import numpy as np
import numpy.typing as npt

from memory_efficient_gpt.sampling.batch import HostParameters
from memory_efficient_gpt.step_layout import StepLayout

ROWS: Final = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 80, 96, 112, 128, 160, 192, 224, 256, 320, 384, 448, 512)
MIXED_ROWS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
TOKENS: Final = (8, 16, 32, 64, 128, 192, 256, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
"""Tokens of steps with prompts; larger ones keep the device busy for longer than the host needs."""
LEAST_CONTEXT: Final = 512


@dataclass(frozen=True, slots=True)
class StepShape:
    """tokens, rows: with padding. context: keys that a row may see. decode: one token in each row."""

    tokens: int
    rows: int
    context: int
    decode: bool

    def table_width(self, block_size: int, max_blocks: int) -> int:
        """Blocks of a row's table."""
        return min(max_blocks, -(-self.context // block_size))


def shape_of(layout: StepLayout) -> StepShape | None:
    """The smallest shape that the step fits into; None if it is too large to be worth a graph."""
    decode = layout.num_tokens == layout.num_rows
    rows = _least(ROWS if decode else MIXED_ROWS, layout.num_rows)
    tokens = rows if decode else _least(TOKENS, layout.num_tokens)
    if rows is None or tokens is None:
        return None
    longest = max(LEAST_CONTEXT, int(layout.context_lens.max()))
    return StepShape(tokens, rows, 1 << (longest - 1).bit_length(), decode)


def largest_shape(max_num_seqs: int, max_model_len: int, decode_rows: int | None = None) -> StepShape:
    """Its packed inputs are no smaller than those of any step of an engine with these limits.

    decode_rows: the most rows, where all steps are decoding ones.
    """
    context = 1 << (max(LEAST_CONTEXT, max_model_len) - 1).bit_length()
    if decode_rows is not None:
        return StepShape(decode_rows, decode_rows, context, decode=True)
    rows = _least(MIXED_ROWS, max_num_seqs) or MIXED_ROWS[-1]
    return StepShape(TOKENS[-1], rows, context, decode=False)


@dataclass(frozen=True, slots=True)
class Fields:
    """Where the parts of a step's packed inputs `[size] int32` are, as slices.

    Each begins at a multiple of 16 bytes: Triton compiles a kernel anew for pointers that don't. `uniforms`
    and `top_ps` are float64, `temperatures` and `min_ps` float32.
    """

    uniforms: slice
    top_ps: slice
    temperatures: slice
    min_ps: slice
    top_ks: slice
    input_ids: slice
    unread: slice
    positions: slice
    slots: slice
    query_starts: slice
    context_lens: slice
    logit_rows: slice
    token_slots: slice
    block_tables: slice

    @property
    def size(self) -> int:
        """Elements of the whole."""
        return int(self.block_tables.stop)


def fields_of(shape: StepShape, table_width: int) -> Fields:
    """The parts for a shape."""
    tokens, rows = shape.tokens, shape.rows
    sizes = (
        2 * rows,
        2 * rows,
        rows,
        rows,
        rows,
        *(tokens,) * 4,
        rows + 1,
        rows,
        rows,
        rows,
        rows * table_width,
    )
    starts = np.cumsum([0, *(-(-size // 4) * 4 for size in sizes)]).tolist()
    return Fields(*(slice(start, start + size) for start, size in zip(starts, sizes, strict=False)))


class Choice(Enum):
    """How a graph chooses tokens: the most likely one, or (rows with a temperature) a draw with filters."""

    GREEDY = auto()
    DRAW = auto()


@dataclass(frozen=True, slots=True)
class RowsToSample:
    """The step's samples. logit_rows `[R] int32`: their tokens; token_slots `[R] int32`: where each sampled
    token is kept. draws: how they are chosen; None for steps that don't draw in the graph. uniforms
    `[R] float64`: empty for those."""

    logit_rows: npt.NDArray[np.int32]
    token_slots: npt.NDArray[np.int32]
    draws: HostParameters | None = None
    uniforms: npt.NDArray[np.float64] = field(default_factory=lambda: np.zeros(0))


def pack(
    layout: StepLayout,
    samples: RowsToSample,
    shape: StepShape,
    fields: Fields,
    no_slot: int,
    packed: npt.NDArray[np.int32],
) -> None:
    """Fill `packed [size]`, all zeros, with the step's numbers, padded to the shape.

    no_slot: where tokens of padding rows are kept.
    """
    tokens, rows, drawn = layout.num_tokens, layout.num_rows, len(samples.logit_rows)
    packed[fields.input_ids][:tokens] = layout.input_ids
    packed[fields.unread] = -1
    packed[fields.unread][:tokens] = layout.unread
    packed[fields.positions][:tokens] = layout.positions
    packed[fields.slots][:tokens] = layout.slots
    starts = packed[fields.query_starts]
    starts[: rows + 1] = layout.query_starts
    starts[rows + 1 :] = np.arange(rows + 1, shape.rows + 1) if shape.decode else tokens
    contexts = packed[fields.context_lens]
    contexts[:rows] = layout.context_lens
    contexts[rows:] = 1 if shape.decode else 0
    tables = packed[fields.block_tables].reshape(shape.rows, -1)
    tables[:rows, : layout.block_tables.shape[1]] = layout.block_tables
    packed[fields.logit_rows][:drawn] = samples.logit_rows
    packed[fields.token_slots] = no_slot
    packed[fields.token_slots][:drawn] = samples.token_slots
    if (draws := samples.draws) is not None:
        packed[fields.temperatures].view(np.float32)[:drawn] = draws.temperature
        packed[fields.min_ps].view(np.float32)[:drawn] = draws.min_p
        packed[fields.top_ks][:drawn] = draws.top_k
        packed[fields.top_ps].view(np.float64)[:drawn] = draws.top_p
        packed[fields.uniforms].view(np.float64)[:drawn] = samples.uniforms


def _least(sizes: tuple[int, ...], wanted: int) -> int | None:
    place = bisect_left(sizes, wanted)
    return sizes[place] if place < len(sizes) else None

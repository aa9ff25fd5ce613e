"""Steps padded to few sizes: the sizes chosen, and the packed numbers."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from memory_efficient_gpt.request import SamplingParams
from memory_efficient_gpt.sampling.batch import HostParameters
from memory_efficient_gpt.step_layout import StepLayout
from memory_efficient_gpt.step_shape import (
    RowsToSample,
    StepShape,
    fields_of,
    largest_shape,
    pack,
    shape_of,
)

BLOCK = 4


def layout_of(query_lens: list[int], context_lens: list[int]) -> StepLayout:
    """Ids count from 100, slots from 200, blocks from 1."""
    tokens = sum(query_lens)
    width = -(-max(context_lens) // BLOCK)
    return StepLayout(
        input_ids=np.arange(100, 100 + tokens),
        unread=np.full(tokens, -1, np.int32),
        positions=np.arange(tokens),
        slots=np.arange(200, 200 + tokens),
        query_starts=np.array([0, *np.cumsum(query_lens)], np.int32),
        context_lens=np.array(context_lens, np.int32),
        block_tables=np.arange(1, 1 + len(query_lens) * width, dtype=np.int32).reshape(-1, width),
    )


@pytest.mark.parametrize(
    ("query_lens", "context", "shape"),
    [
        ([1], 7, StepShape(1, 1, 512, decode=True)),
        ([1] * 5, 512, StepShape(8, 8, 512, decode=True)),
        ([1] * 33, 513, StepShape(48, 48, 1024, decode=True)),
        ([5], 5, StepShape(8, 1, 512, decode=False)),
        ([300, 1, 1], 3000, StepShape(384, 4, 4096, decode=False)),
        ([1] * 513, 9, None),
        ([2000, 49], 2000, None),
    ],
)
def test_a_step_gets_the_smallest_shape_that_holds_it(
    query_lens: list[int], context: int, shape: StepShape | None
) -> None:
    assert shape_of(layout_of(query_lens, [context] * len(query_lens))) == shape


def test_no_step_of_an_engine_needs_more_than_its_largest_shape() -> None:
    largest = largest_shape(max_num_seqs=40, max_model_len=1000)
    size = fields_of(largest, largest.table_width(BLOCK, 250)).size
    for rows in range(1, 41):
        for query in ([1] * rows, [1] * (rows - 1) + [40 * 3]):
            shape = shape_of(layout_of(query, [1000] * rows))
            assert shape is not None
            assert fields_of(shape, shape.table_width(BLOCK, 250)).size <= size


def test_parts_do_not_overlap_and_begin_at_sixteen_bytes() -> None:
    fields = fields_of(StepShape(6, 3, 512, decode=False), 5)
    parts = [getattr(fields, name) for name in fields.__slots__]
    assert all(part.start % 4 == 0 for part in parts)
    assert all(one.stop <= other.start for one, other in pairwise(parts))


def packed(layout: StepLayout, samples: RowsToSample) -> dict[str, list[int]]:
    shape = shape_of(layout)
    assert shape is not None
    fields = fields_of(shape, 4)
    numbers = np.zeros(fields.size, np.int32)
    pack(layout, samples, shape, fields, 77, numbers)
    return {name: numbers[getattr(fields, name)].tolist() for name in fields.__slots__}


def test_padding_rows_of_decoding_steps_see_one_key_in_the_trash_block() -> None:
    layout = layout_of([1, 1, 1], [3, 9, 5])
    got = packed(layout, RowsToSample(np.arange(3, dtype=np.int32), np.array([9, 8, 7], np.int32)))
    assert got["input_ids"] == [100, 101, 102, 0]
    assert got["slots"] == [200, 201, 202, 0]
    assert got["query_starts"] == [0, 1, 2, 3, 4]
    assert got["context_lens"] == [3, 9, 5, 1]
    assert got["token_slots"] == [9, 8, 7, 77]
    assert got["block_tables"] == [1, 2, 3, 0, 4, 5, 6, 0, 7, 8, 9, 0, 0, 0, 0, 0]


def test_padding_tokens_of_other_steps_belong_to_no_row() -> None:
    layout = layout_of([4, 1, 5], [4, 9, 5])
    got = packed(layout, RowsToSample(np.array([4, 9], np.int32), np.array([1, 2], np.int32)))
    assert got["input_ids"] == [*range(100, 110), *[0] * 6]
    assert got["unread"] == [-1] * 16
    assert got["query_starts"] == [0, 4, 5, 10, 10]
    assert got["context_lens"] == [4, 9, 5, 0]
    assert got["logit_rows"] == [4, 9, 0, 0]
    assert got["token_slots"] == [1, 2, 77, 77]


def test_parameters_and_uniforms_keep_their_bits() -> None:
    layout = layout_of([1, 1, 1], [3, 9, 5])
    shape = shape_of(layout)
    assert shape is not None
    fields = fields_of(shape, 4)
    uniforms = np.array([0.1, 2**-53, 1 - 2**-53])
    draws = HostParameters(
        [
            SamplingParams(temperature=0.7, top_p=0.9),
            SamplingParams(temperature=0.0, top_k=9),
            SamplingParams(temperature=1.3, min_p=0.1, top_k=2**31 - 1),
        ]
    )
    samples = RowsToSample(np.arange(3, dtype=np.int32), np.zeros(3, np.int32), draws, uniforms)
    numbers = np.zeros(fields.size, np.int32)
    pack(layout, samples, shape, fields, 0, numbers)
    floats = [numbers[part].view(np.float32)[:3] for part in (fields.temperatures, fields.min_ps)]
    assert floats[0].tolist() == [np.float32(0.7), 0.0, np.float32(1.3)]
    assert floats[1].tolist() == [0.0, 0.0, np.float32(0.1)]
    assert numbers[fields.top_ks].tolist() == [0, 9, 2**31 - 1, 0]
    assert numbers[fields.top_ps].view(np.float64).tolist() == [0.9, 0.0, 0.0, 0.0]
    assert (numbers[fields.uniforms].view(np.float64)[:3] == uniforms).all()

"""Numbers that go to the same place step after step."""

from __future__ import annotations

import torch

from memory_efficient_gpt.uploads import Staging

CPU = torch.device("cpu")


def test_what_is_taken_is_empty_and_only_what_is_sent_arrives() -> None:
    staging, target = Staging(6, CPU), torch.full((6,), -1, dtype=torch.int32)
    for number in range(1, 5):
        taken = staging.take(4)
        assert taken.tolist() == [0] * 4
        taken[:2] = number
        staging.send(target[:3])
        assert target.tolist() == [number, number, 0, -1, -1, -1]


def test_a_buffer_is_filled_while_the_one_before_may_still_be_read() -> None:
    staging = Staging(2, CPU)
    first = staging.take(2)
    first[:] = 7
    staging.send(torch.zeros(2, dtype=torch.int32))
    second = staging.take(2)
    second[:] = 8
    assert first.tolist() == [7, 7]

"""Pinned memory that is used again only when its copy is over."""

from __future__ import annotations

import pytest
import torch

from memory_efficient_gpt.uploads import Staging

pytestmark = pytest.mark.gpu


def test_a_buffer_waits_for_its_own_copy() -> None:
    device = torch.device("cuda", 0)
    staging = Staging(1 << 20, device)
    targets = [torch.zeros(1 << 20, dtype=torch.int32, device=device) for _ in range(6)]
    torch.cuda._sleep(50_000_000)  # the copies below come after it
    for number, target in enumerate(targets):
        staging.take(1 << 20).fill(number + 1)
        staging.send(target)
    torch.cuda.synchronize()
    assert [int(target.min()) for target in targets] == [int(target.max()) for target in targets]
    assert [int(target[0]) for target in targets] == [1, 2, 3, 4, 5, 6]

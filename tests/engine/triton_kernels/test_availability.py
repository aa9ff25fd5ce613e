"""Where the Triton kernels run."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from memory_efficient_gpt.triton_kernels import availability


def test_a_cpu_is_told_so() -> None:
    assert availability.triton_obstacle(torch.device("cpu")) == "on cpu"


@pytest.mark.parametrize(
    ("capability", "installed", "reason"),
    [((9, 0), True, None), ((7, 5), True, "compute capability 7.5"), ((9, 0), False, "pip install triton")],
)
def test_an_old_gpu_and_a_missing_package_are_named(
    capability: tuple[int, int], installed: bool, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    availability._cuda_obstacle.cache_clear()
    found: Any = object() if installed else None
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    got = availability.triton_obstacle(torch.device("cuda", 0))
    availability._cuda_obstacle.cache_clear()
    assert got is None if reason is None else got is not None and reason in got

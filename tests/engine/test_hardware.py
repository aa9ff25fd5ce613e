"""Devices and memory."""

from __future__ import annotations

import pytest
import torch

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.hardware import free_memory_bytes, resolve_device, usable_cpus


@pytest.mark.parametrize("name", ["gpu", "cuda:99", "meta", "", "cpu0"])
def test_unusable_device_is_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"device"):
        resolve_device(name)


def test_cpu_is_always_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    assert usable_cpus() >= 1
    assert 1 << 20 < free_memory_bytes(torch.device("cpu")) < 1 << 50

"""Where the Triton kernels run."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from memory_efficient_gpt.triton_kernels import availability


def test_a_cpu_is_told_so() -> None:
    assert availability.triton_obstacle(torch.device("cpu")) == "on cpu"


def test_kernels_overlap_since_hopper_only(monkeypatch: pytest.MonkeyPatch) -> None:
    capabilities = {0: (8, 9), 1: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[device.index])
    availability.can_overlap.cache_clear()
    devices = [torch.device("cuda", 0), torch.device("cuda", 1), torch.device("cpu")]
    found = [availability.overlap_options(device) for device in devices]
    availability.can_overlap.cache_clear()
    on, off = {"early": True, "launch_pdl": True}, {"early": False, "launch_pdl": False}
    assert found == [off, on, off]


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
    monkeypatch.setattr(availability, "_failed_trial", lambda device: None)
    got = availability.triton_obstacle(torch.device("cuda", 0))
    availability._cuda_obstacle.cache_clear()
    assert got is None if reason is None else got is not None and reason in got


def test_a_triton_that_cannot_compile_is_no_use_and_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trial = ModuleType("memory_efficient_gpt.triton_kernels.trial")

    def fail(device: torch.device) -> None:
        raise RuntimeError("Failed to find C compiler.\nSet CC.")

    trial.run_trial = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, trial.__name__, trial)
    reason = availability._failed_trial(torch.device("cuda", 0))
    assert reason == "Triton can't run a kernel here (RuntimeError: Failed to find C compiler.)"
    assert reason in caplog.text


def test_binaries_go_where_triton_is_told_or_beside_the_native_kernels(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    monkeypatch.delenv("MEGPT_CACHE_DIR", raising=False)
    assert availability.binaries_folder() == Path.home() / ".triton" / "cache"
    monkeypatch.setenv("MEGPT_CACHE_DIR", "/a")
    assert availability.binaries_folder() == Path("/a/triton")
    monkeypatch.setenv("TRITON_CACHE_DIR", "/b")
    assert availability.binaries_folder() == Path("/b")

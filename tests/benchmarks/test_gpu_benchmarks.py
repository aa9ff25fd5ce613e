"""Benchmarks of Triton kernels where there are none: they tell their options, and what is missing."""

from __future__ import annotations

import runpy
import sys

import pytest
import torch

MODULES = ("linears_gpu", "triton_tiles", "attention_gpu", "experts_gpu", "sampling_gpu")


@pytest.mark.parametrize("module", MODULES)
def test_help_needs_no_gpu(
    module: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(f"benchmarks.{module}", run_name="__main__")
    assert ended.value.code == 0
    assert "--out" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("module", MODULES)
def test_what_is_missing_is_told(module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [module, "--out", "record.json"])
    with pytest.raises(SystemExit, match=r"measures Triton kernels on a GPU; missing: .*a CUDA GPU"):
        runpy.run_module(f"benchmarks.{module}", run_name="__main__")

"""Runs of `megpt quantize`, for the tests of what it writes and of what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from memory_efficient_gpt_server.cli import main
from memory_efficient_gpt_server.commands import quantize_steps

MODEL = "demo-draft"
QUICK = ("--calibrate-tokens", "64")


@dataclass
class Done:
    """How the command ended."""

    code: int
    out: str
    err: str


Quantize = Callable[..., Done]


@pytest.fixture
def quantize(capsys: pytest.CaptureFixture[str]) -> Quantize:
    """Runs `megpt quantize demo-draft` with more arguments."""

    def run(*args: str, model: str = MODEL) -> Done:
        code = main(["quantize", model, *args])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def unloadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails a test that loads weights."""

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(quantize_steps, "load_model", load)

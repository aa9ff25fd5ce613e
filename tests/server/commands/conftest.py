"""The command line as an administrator runs it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from memory_efficient_gpt_server.cli import main
from tests.server.staged_models import ADMIN


@pytest.fixture
def megpt(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Runs a command with the admin key in its environment: its code, what it printed, and its errors."""
    monkeypatch.setenv("MEGPT_ADMIN_KEY", ADMIN)

    def run(*args: str) -> tuple[int, str, str]:
        code = main(args)
        return code, *capsys.readouterr()

    return run

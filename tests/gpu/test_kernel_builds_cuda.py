"""Kernels built ahead on a GPU: what is served afterwards compiles nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.server.command_line import megpt

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


def binaries(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*.cubin")}


@pytest.mark.parametrize("options", [(), ("--quantization", "int4", "--kv-cache-dtype", "int8")])
def test_after_a_build_nothing_is_compiled(tmp_path: Path, options: tuple[str, ...]) -> None:
    command = ("kernels", "build", "demo", *options, "--device", "cuda", "--json", "--cache", str(tmp_path))
    done = megpt(*command, timeout_s=300)
    assert done.returncode == 0, done.stderr
    build, built = json.loads(done.stdout), binaries(tmp_path)
    assert (build["what"], build["folder"]) == ("demo", str(tmp_path / "triton"))
    assert build["new"] == len(list(tmp_path.rglob("*.cubin"))) > 5
    for prompt in ("Once", "Once upon a time there was a house. " * 12):
        done = megpt("generate", "demo", "-p", prompt, "-n", "40", "--device", "cuda", *options,
                     MEGPT_CACHE_DIR=str(tmp_path), timeout_s=120)  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert binaries(tmp_path) == built

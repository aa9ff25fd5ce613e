"""`megpt kernels build`: the CPU's kernels land in the folder that is named, and are found there again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.server.command_line import megpt


@pytest.mark.slow
def test_the_cpus_kernels_are_built_once_into_the_folder(tmp_path: Path) -> None:
    first = megpt("kernels", "build", "--cache", str(tmp_path), "--json")
    assert first.returncode == 0, first.stderr
    build = json.loads(first.stdout)
    assert (build["what"], build["new"], build["folder"]) == ("cpu", 1, str(tmp_path / "native"))
    assert len(list((tmp_path / "native").glob("*.so"))) == 1
    again = megpt("kernels", "build", MEGPT_CACHE_DIR=str(tmp_path))
    assert again.returncode == 0 and again.stdout.startswith("cpu: nothing new in")


def test_a_compiler_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    done = megpt("kernels", "build", "--cache", str(tmp_path), CXX="no-such-compiler")
    assert done.returncode == 2 and "no C++ compiler found" in done.stderr


def test_a_wrong_option_is_told_before_anything_is_built(tmp_path: Path) -> None:
    done = megpt("kernels", "build", "demo", "--max-num-seqs", "0", "--cache", str(tmp_path))
    assert done.returncode == 2 and "max_num_seqs" in done.stderr
    assert not list(tmp_path.iterdir())


def test_options_of_a_model_without_a_model_are_refused(tmp_path: Path) -> None:
    done = megpt("kernels", "build", "--quantization", "int4", "--device", "cuda", "--cache", str(tmp_path))
    assert done.returncode == 2 and "--device, --quantization" in done.stderr and "MODEL" in done.stderr
    assert not list(tmp_path.iterdir())

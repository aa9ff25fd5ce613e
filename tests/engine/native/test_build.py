"""Compiling on first use: one build for many processes, a cache that is never wrong, reasons for failures."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from memory_efficient_gpt.native import build
from memory_efficient_gpt.native.build import NativeLibrary, Unavailable, build_library, load_library

SOURCE = """
#include "amx.h"
extern "C" __attribute__((visibility("default"))) const char* megpt_isa(void) {
    return megpt::instruction_set();
}
extern "C" __attribute__((visibility("default"))) int answer(void) { return ANSWER; }
"""


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MEGPT_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("MEGPT_NATIVE_ISA", raising=False)
    return tmp_path / "cache" / "native"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "source" / "answer.cpp"
    path.parent.mkdir()
    path.write_text(SOURCE.replace("ANSWER", "42"))
    return path


def built(source: Path, **options: build.Isa) -> NativeLibrary:
    library = build_library("answer", [source], **options)
    assert isinstance(library, NativeLibrary), library
    return library


def test_a_library_is_compiled_once_and_then_found(cache: Path, source: Path) -> None:
    first = built(source)
    assert first.cdll.answer() == 42
    stamp = first.path.stat().st_mtime_ns
    assert built(source).path == first.path
    assert first.path.stat().st_mtime_ns == stamp
    assert sorted(path.suffix for path in cache.iterdir()) == [".lock", ".so"]


def test_a_changed_source_or_header_is_another_library(cache: Path, source: Path) -> None:
    paths = [built(source).path]
    header = source.with_name("number.h")
    header.write_text("#define NUMBER 7\n")
    source.write_text('#include "number.h"\n' + SOURCE.replace("ANSWER", "NUMBER"))
    paths.append(built(source).path)
    header.write_text("#define NUMBER 8\n")
    changed = built(source)
    assert changed.cdll.answer() == 8
    assert len({*paths, changed.path}) == 3


def test_an_instruction_set_can_be_forced_below_the_cpus_own(cache: Path, source: Path) -> None:
    assert built(source, isa="portable").isa == "portable"
    best = built(source).isa
    for isa in ("amx", "avx512"):
        forced = build_library("answer", [source], isa=isa)
        if isinstance(forced, Unavailable):
            assert f"asks for {isa}" in forced.reason and best != isa
        else:
            assert forced.isa == isa and best in ("amx", isa)


def test_the_environment_forces_an_instruction_set(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MEGPT_NATIVE_ISA", "portable")
    assert build.requested_isa() == "portable"
    monkeypatch.setenv("MEGPT_NATIVE_ISA", "sse9")
    refused = load_library()
    assert isinstance(refused, Unavailable)
    assert "amx, avx512, avx2, portable" in refused.reason
    assert "'sse9'" in refused.reason


def test_the_compiler_of_the_environment_is_used(
    cache: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = build.find_compiler()
    assert not isinstance(real, Unavailable)
    wrapper = tmp_path / "my compiler"
    wrapper.write_text(f'#!/bin/sh\necho called >> "{tmp_path}/calls"\nexec {real[0]} "$@"\n')
    wrapper.chmod(0o755)
    monkeypatch.setenv("CXX", f"'{wrapper}' -DEXTRA")
    built(source)
    assert (tmp_path / "calls").read_text().startswith("called")


def test_without_a_compiler_the_reason_says_what_to_do(
    cache: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    refused = build_library("answer", [source])
    assert isinstance(refused, Unavailable)
    assert "no-such-compiler" in refused.reason
    assert "CXX" in refused.reason


def test_a_source_that_does_not_compile_gives_the_compilers_words(cache: Path, source: Path) -> None:
    source.write_text("this is not C++;")
    refused = build_library("answer", [source])
    assert isinstance(refused, Unavailable)
    assert "failed" in refused.reason
    assert not list(cache.glob("*.so"))
    assert not list(cache.glob("build-*"))


def test_a_folder_that_cannot_be_written_is_a_reason(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEGPT_CACHE_DIR", str(tmp_path / "file"))
    refused = build_library("answer", [source])
    assert isinstance(refused, Unavailable)
    assert "MEGPT_CACHE_DIR" in refused.reason


def test_a_damaged_library_is_a_reason_and_not_a_crash(cache: Path, source: Path) -> None:
    path = built(source).path
    other = path.with_name("other.so")
    other.write_bytes(b"not a library")
    result = build._open(other)
    assert isinstance(result, Unavailable)
    assert "other.so" in result.reason


def test_concurrent_processes_compile_once(cache: Path, source: Path, tmp_path: Path) -> None:
    real = build.find_compiler()
    assert not isinstance(real, Unavailable)
    wrapper = tmp_path / "cxx"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *answer.cpp*) echo compiled >> "{tmp_path}/calls";; esac\n'
        f'exec {real[0]} "$@"\n'
    )
    wrapper.chmod(0o755)
    script = f"""
        from pathlib import Path
        from memory_efficient_gpt.native.build import build_library
        print(build_library("answer", [Path({str(source)!r})]).cdll.answer())
    """
    environment = {**os.environ, "CXX": str(wrapper), "PYTHONPATH": os.pathsep.join(sys.path)}

    def run(_: int) -> str:
        command = [sys.executable, "-c", textwrap.dedent(script)]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True, timeout=100
        ).stdout

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(run, range(3))) == ["42\n"] * 3
    assert (tmp_path / "calls").read_text() == "compiled\n"


def test_the_library_needs_no_openmp_runtime() -> None:
    """A runtime of its own beside torch's would mean two pools of threads that spin against each other."""
    needed = subprocess.run(
        ["ldd", str(built_kernels())], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    assert "libstdc++" in needed or "libc++" in needed
    assert "omp" not in needed


def built_kernels() -> Path:
    library = load_library()
    assert isinstance(library, NativeLibrary), library
    return library.path


def test_importing_the_package_imports_no_torch() -> None:
    script = "import sys, memory_efficient_gpt.native.build; print('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert result.stdout == "False\n"

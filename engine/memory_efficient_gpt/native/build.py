"""Compile C++ sources to a shared library on first use, and load it.

Purpose: from source files to a `ctypes.CDLL`, cached on disk, built once by however many processes.
Does not know: what the functions compute, torch tensors.
Invariant: a library's file name is a hash of all that went into it, and it appears whole (by rename),
so a file that exists is right and is never rewritten.

The kernels have threads of their own instead of OpenMP's: at the end of every parallel region OpenMP waits
for all its threads to get a core, which on a busy machine takes 15 ms for work of 0.3 ms (see pool.cpp).

The cache folder is $MEGPT_CACHE_DIR/native, or ~/.cache/memory_efficient_gpt/native. $CXX names the
compiler. $MEGPT_NATIVE_ISA (amx, avx512, avx2, portable) forces an instruction set below the CPU's own.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast, get_args

logger = logging.getLogger(__name__)

Isa = Literal["amx", "avx512", "avx2", "portable"]

SOURCE_DIR: Final = Path(__file__).parent / "src"
SOURCES: Final = tuple(
    SOURCE_DIR / f"{name}.cpp"
    for name in (
        "attention",
        "experts",
        "kv_cache",
        "linear",
        "pool",
        "quantize",
        "quantized_linear",
        "replay",
        "rowwise",
    )
)
COMPILE_TIMEOUT_S: Final = 300

_FLAGS: Final = (
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fno-math-errno",
    "-fno-trapping-math",
    # Sums must round the same way in every instantiation of a template: fused only where written so.
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-w",  # what is read of the compiler's words is the reason of a failure
)
_ISA_FLAGS: Final[dict[Isa | None, tuple[str, ...]]] = {
    None: ("-march=native",),
    "amx": ("-march=native",),
    "avx512": ("-march=native", "-mno-amx-int8"),
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "portable": ("-DMEGPT_PORTABLE",),
}


@dataclass(frozen=True, slots=True)
class Unavailable:
    """Why there is no native library; the caller falls back to torch and says so."""

    reason: str


@dataclass(frozen=True, slots=True)
class NativeLibrary:
    """A loaded library. `isa` is what the compiler really used."""

    cdll: ctypes.CDLL
    path: Path
    isa: str


def load_library(isa: Isa | None = None) -> NativeLibrary | Unavailable:
    """This package's kernels, built if need be and loaded once for a process.

    isa: an instruction set to use; None takes $MEGPT_NATIVE_ISA, else the best that the CPU has.
    """
    try:
        return _load_once(isa or requested_isa())
    except ValueError as error:
        return Unavailable(str(error))


@functools.cache
def _load_once(isa: Isa | None) -> NativeLibrary | Unavailable:
    return build_library("kernels", SOURCES, isa=isa)


def requested_isa() -> Isa | None:
    """The instruction set of $MEGPT_NATIVE_ISA; None takes the CPU's best. Raises ValueError."""
    value = os.environ.get("MEGPT_NATIVE_ISA", "")
    if value and value not in get_args(Isa):
        raise ValueError(f"MEGPT_NATIVE_ISA must be one of {', '.join(get_args(Isa))}; got {value!r}.")
    return cast(Isa, value) if value else None


def build_library(
    name: str, sources: Sequence[Path], *, isa: Isa | None = None
) -> NativeLibrary | Unavailable:
    """Compile `sources` (or find them compiled) and load the result.

    The headers beside the sources and in SOURCE_DIR count into the hash. The library must export
    `const char* megpt_isa(void)`.
    """
    compiler = find_compiler()
    if isinstance(compiler, Unavailable):
        return compiler
    built = _build(name, sources, compiler, (*_FLAGS, *_ISA_FLAGS[isa]))
    library = built if isinstance(built, Unavailable) else _open(built)
    if isinstance(library, NativeLibrary) and isa is not None and library.isa != isa:
        return Unavailable(f"MEGPT_NATIVE_ISA asks for {isa}, this CPU and compiler give {library.isa}")
    return library


def find_compiler() -> list[str] | Unavailable:
    """The C++ compiler's command: $CXX (with its own flags), else the first of c++, g++, clang++."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    candidates = [chosen] if chosen else [["c++"], ["g++"], ["clang++"]]
    for command in candidates:
        if path := shutil.which(command[0]):
            return [path, *command[1:]]
    names = ", ".join(command[0] for command in candidates)
    return Unavailable(f"no C++ compiler found (looked for {names}); install one or set CXX")


def cache_root() -> Path:
    """Where everything is kept that is made once for a machine."""
    root = os.environ.get("MEGPT_CACHE_DIR")
    return Path(root) if root else Path.home() / ".cache" / "memory_efficient_gpt"


def cache_folder() -> Path:
    """Where compiled libraries are kept."""
    return cache_root() / "native"


def _build(
    name: str, sources: Sequence[Path], compiler: list[str], flags: tuple[str, ...]
) -> Path | Unavailable:
    """The compiled library's path, compiled now if it is not in the cache."""
    version = _compiler_version(tuple(compiler))
    key = _fingerprint(sources, [*compiler, version, _cpu_flags(), *flags])
    folder = cache_folder()
    target = folder / f"{name}-{key}.so"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(folder / f"{name}-{key}.lock"):
            return target if target.is_file() else _compile(sources, compiler, flags, target)
    except OSError as error:
        return Unavailable(f"cannot build in {folder}: {error}; set MEGPT_CACHE_DIR to a writable folder")


def _compile(
    sources: Sequence[Path], compiler: list[str], flags: tuple[str, ...], target: Path
) -> Path | Unavailable:
    """Compile the sources side by side, link, and rename into place. The caller holds the lock."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        objects = [Path(scratch) / f"{index}.o" for index in range(len(sources))]
        commands = [
            [*compiler, *flags, f"-I{SOURCE_DIR}", "-c", str(source), "-o", str(output)]
            for source, output in zip(sources, objects, strict=True)
        ]
        library = Path(scratch) / "library.so"
        link = [*compiler, *flags, "-shared", "-o", str(library), *map(str, objects)]
        if failure := _run_all(commands) or _run_all([link]):
            return failure
        library.replace(target)
    logger.info("compiled %s in %.1f s", target.name, time.monotonic() - started)
    return target


def _run_all(commands: Sequence[Sequence[str]]) -> Unavailable | None:
    """Run commands side by side; the first failure, or None."""
    processes = [
        subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for command in commands
    ]
    failure: Unavailable | None = None
    deadline = time.monotonic() + COMPILE_TIMEOUT_S
    for command, process in zip(commands, processes, strict=True):
        try:
            _, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            failure = failure or Unavailable(f"{command[0]} took more than {COMPILE_TIMEOUT_S} s")
            continue
        if process.returncode != 0:
            last = "; ".join(errors.strip().splitlines()[-3:])
            failure = failure or Unavailable(f"{command[0]} failed ({process.returncode}): {last}")
    return failure


def _open(path: Path) -> NativeLibrary | Unavailable:
    try:
        cdll = ctypes.CDLL(str(path))
        cdll.megpt_isa.restype = ctypes.c_char_p
        return NativeLibrary(cdll, path, cdll.megpt_isa().decode())
    except (OSError, AttributeError) as error:
        return Unavailable(f"cannot load {path.name}: {error}")


def _fingerprint(sources: Sequence[Path], words: Sequence[str]) -> str:
    """Hash of sources, their headers and the words, 20 hexadecimal digits."""
    digest = hashlib.sha256()
    folders = {SOURCE_DIR, *(source.parent for source in sources)}
    headers = {header for folder in folders for header in folder.glob("*.h")}
    for path in [*sources, *sorted(headers)]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    for word in words:
        digest.update(word.encode() + b"\0")
    return digest.hexdigest()[:20]


@functools.cache
def _compiler_version(compiler: tuple[str, ...]) -> str:
    result = subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False, timeout=60)
    return result.stdout


@functools.cache
def _cpu_flags() -> str:
    """What `-march=native` depends on: a cache folder may be shared by unlike machines."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
                return platform.machine() + line
    except OSError:
        pass
    return platform.machine() + platform.processor()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock between processes; the kernel drops it if the holder dies."""
    with path.open("a") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

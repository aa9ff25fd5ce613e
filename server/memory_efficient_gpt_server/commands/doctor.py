"""`megpt doctor`: what this machine offers, which settings hold, and what is wrong.

Purpose: one page to read before asking for help, and an exit code for scripts.
Does not know: how anything is repaired.
Invariant: a finding that stops `megpt serve` is a failure (exit 1); what only makes it slower is a warning.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final

from memory_efficient_gpt_server.commands.options import Commands, new_command

_EXAMPLES = """\
  megpt doctor
  megpt doctor --config configs/default.yaml    # also checks these settings
  megpt doctor --json
"""
_PACKAGES: Final = (
    "torch", "transformers", "tokenizers", "safetensors", "fastapi", "uvicorn", "pydantic", "msgpack",
)  # fmt: skip
_CPU_FLAGS: Final = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "avx_vnni",
    "amx_bf16",
    "amx_int8",
)


class Verdict(StrEnum):
    """What a finding means."""

    OK = "ok"
    WARNING = "warning"
    FAILURE = "failure"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the report."""

    section: str
    name: str
    value: str
    verdict: Verdict = Verdict.OK


def add_parser(commands: Commands[argparse.ArgumentParser]) -> None:
    """Describe the command."""
    parser = new_command(
        commands, "doctor", summary="show what this machine offers and what is wrong", examples=_EXAMPLES
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="YAML settings to check (default: $MEGPT_CONFIG)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Examine and print; 1 if anything stops the server."""
    findings = list(examine(args.config))
    failed = any(finding.verdict is Verdict.FAILURE for finding in findings)
    if args.json:
        print(json.dumps({"ok": not failed, "findings": [asdict(finding) for finding in findings]}))
    else:
        _print(findings)
    return 1 if failed else 0


def examine(config_file: Path | None) -> Iterator[Finding]:
    """All findings, in the order of the report."""
    yield from _versions()
    yield from _guarded("processor", _processor)
    yield from _guarded("torch", _torch)
    yield from _guarded("native kernels", _native_kernels)
    yield from _guarded("models", _models)
    yield from _settings(config_file)


def _guarded(section: str, examine_section: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from examine_section()
    except Exception as error:  # noqa: BLE001 - a report that dies of what it examines helps nobody
        yield Finding(section, "failed", f"{type(error).__name__}: {error}", Verdict.FAILURE)


def _versions() -> Iterator[Finding]:
    from importlib.metadata import PackageNotFoundError, version

    from memory_efficient_gpt import __version__

    yield Finding("versions", "megpt", __version__)
    yield Finding("versions", "python", f"{platform.python_version()} on {platform.platform()}")
    for name in _PACKAGES:
        try:
            yield Finding("versions", name, version(name))
        except PackageNotFoundError:
            yield Finding("versions", name, "not installed", Verdict.FAILURE)


def _processor() -> Iterator[Finding]:
    model, flags = _cpu_info()
    yield Finding("processor", "model", model)
    yield Finding("processor", "usable cores", f"{len(os.sched_getaffinity(0))} of {os.cpu_count()}")
    present = [flag for flag in _CPU_FLAGS if flag in flags]
    yield Finding("processor", "instructions", " ".join(present) or "none of those that help")


def _cpu_info() -> tuple[str, set[str]]:
    """The processor's name and flags; machine and nothing where /proc/cpuinfo is missing."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine(), set()
    fields: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())  # the first processor's; all are alike
    return fields.get("model name", platform.machine()), set(fields.get("flags", "").split())


def _torch() -> Iterator[Finding]:
    import torch

    from memory_efficient_gpt.hardware import free_memory_bytes
    from memory_efficient_gpt.triton_kernels.availability import binaries_folder

    yield Finding("torch", "threads", str(torch.get_num_threads()))
    yield Finding("torch", "free memory", f"{free_memory_bytes(torch.device('cpu')) / 2**30:.1f} GiB")
    if not torch.cuda.is_available():
        yield Finding("torch", "GPU", "none: models run on the CPU")
        return
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Finding("torch", f"GPU {index}", f"{name}, {free / 2**30:.1f} of {total / 2**30:.1f} GiB free")
    yield Finding("torch", "Triton's binaries", str(binaries_folder()))


def _native_kernels() -> Iterator[Finding]:
    from memory_efficient_gpt.native.build import Unavailable, cache_folder, find_compiler
    from memory_efficient_gpt.native.ops import load_kernels

    compiler = find_compiler()
    if isinstance(compiler, Unavailable):
        yield Finding("native kernels", "compiler", compiler.reason, Verdict.WARNING)
    else:
        yield Finding("native kernels", "compiler", " ".join(compiler))
    kernels = load_kernels()
    if isinstance(kernels, Unavailable):
        yield Finding(
            "native kernels", "state", f"not built, torch is used: {kernels.reason}", Verdict.WARNING
        )
        return
    yield Finding("native kernels", "state", f"built for {kernels.isa}")
    yield Finding("native kernels", "cache", str(cache_folder()))


def _models() -> Iterator[Finding]:
    from memory_efficient_gpt.errors import CheckpointError
    from memory_efficient_gpt.loading import bundled_models, check_checkpoint

    for name, folder in bundled_models().items():
        try:
            files = check_checkpoint(folder)
        except CheckpointError as error:
            yield Finding("models", name, str(error), Verdict.FAILURE)
            continue
        yield Finding(
            "models", name, f"{sum(file.stat().st_size for file in files) / 2**20:.1f} MiB of weights"
        )


def _settings(config_file: Path | None) -> Iterator[Finding]:
    from memory_efficient_gpt.errors import ConfigError
    from memory_efficient_gpt_server.settings import load_settings

    try:
        loaded = load_settings({}, os.environ, config_file)
    except ConfigError as error:
        for problem in error.problems:
            yield Finding("settings", "wrong", problem, Verdict.FAILURE)
        return
    for origin in loaded.explain():
        yield Finding("settings", origin.name, f"{origin.value}  ({origin.source})")


def _print(findings: list[Finding]) -> None:
    color = sys.stdout.isatty()
    marks = {
        Verdict.OK: "  ",
        Verdict.WARNING: "\033[33m! \033[0m" if color else "! ",
        Verdict.FAILURE: "\033[31mX \033[0m" if color else "X ",
    }
    section = ""
    for finding in findings:
        if finding.section != section:
            section = finding.section
            print(f"{section}")
        print(f"  {marks[finding.verdict]}{finding.name:<22} {finding.value}")
    counts = {v: sum(f.verdict is v for f in findings) for v in Verdict}
    print(f"{counts[Verdict.FAILURE]} failures, {counts[Verdict.WARNING]} warnings")

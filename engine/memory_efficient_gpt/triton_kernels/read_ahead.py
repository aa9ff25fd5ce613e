"""What Triton works out once in every process, worked out before processes are forked.

Purpose: spare a worker a second before its first kernel: a hash over Triton's own files (400 MB), another one
for each kernel's source, and what `ptxas --version` says.
Does not know: devices, which kernels a model will use.
Invariant: no CUDA call and no thread, so that the process may fork; where a Triton has no such thing, nothing
is done about it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from typing import Any, Final

import triton
from triton.runtime.jit import JITFunction

from memory_efficient_gpt import triton_kernels

_FINGERPRINTS: Final = ("triton.runtime.cache", "triton.compiler.compiler")
"""Where `triton_key` is, by version."""
_ARCHITECTURES: Final = (80, 86, 89, 90)
"""That Triton asks about, one by one; the process must not ask which GPU there is."""


def read_ahead() -> None:
    """Do it. Takes about two seconds, half of them for modules that workers would import as well."""
    for kernel in kernels():
        kernel.cache_key  # noqa: B018  # found once, and kept by the kernel
    for name in _FINGERPRINTS:
        fingerprint = getattr(importlib.import_module(name), "triton_key", None)
        if fingerprint is not None:
            fingerprint()
            break
    version: Any = getattr(triton.backends.nvidia.compiler, "get_ptxas_version", None)
    for architecture in _ARCHITECTURES if version is not None else ():
        version(architecture)


def kernels() -> Iterator[Any]:
    """Every kernel and kernel's function of this package."""
    for module in pkgutil.iter_modules(triton_kernels.__path__):
        found = vars(importlib.import_module(f"{triton_kernels.__name__}.{module.name}")).values()
        yield from (value for value in found if isinstance(value, JITFunction))

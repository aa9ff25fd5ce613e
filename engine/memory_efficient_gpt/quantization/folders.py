"""A folder that is written whole or not at all.

Purpose: check that a folder is free, write it, leave nothing behind when that fails.
Does not know: what is written.
Invariant: whatever ends the writing, a folder that was not there is not there, and an empty one is empty.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from memory_efficient_gpt.errors import ConfigError, MegptError


@contextmanager
def written_whole(folder: Path) -> Iterator[Path]:
    """Yields where to write; it becomes `folder` at the end. One that is there already is written in place.

    Raises ConfigError if it is a file or holds something, MegptError for what the system refuses.
    """
    from safetensors import SafetensorError

    require_free(folder)
    present = folder.exists()
    partial = folder if present else folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    written = False
    try:
        partial.mkdir(parents=True, exist_ok=True)
        yield partial
        if not present:
            partial.rename(folder)
        written = True
    except (OSError, SafetensorError) as error:
        raise MegptError(f"{folder} cannot be written: {_reason(error)}. Nothing was left there.") from error
    finally:
        if not written:
            _remove(partial, itself=not present)


def require_free(folder: Path) -> None:
    """Raises ConfigError if `folder` is a file or holds something."""
    if folder.is_dir():
        if any(folder.iterdir()):
            raise ConfigError([f"{folder} is not empty. Give a new folder, or empty it."])
    elif folder.exists():
        raise ConfigError([f"{folder} is a file. Give a new folder."])


def _reason(error: Exception) -> str:
    """What the system says; safetensors wraps it in words of its own."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    return str(error).rpartition("I/O error: ")[2].partition(" (os error")[0]


def _remove(folder: Path, *, itself: bool) -> None:
    if itself:
        shutil.rmtree(folder, ignore_errors=True)
        return
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)

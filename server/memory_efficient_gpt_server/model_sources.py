"""Where a model that is registered while the server runs may come from.

Purpose: from what an administrator names to what a checkpoint is loaded from, or a refusal.
Does not know: HTTP, checkpoints.
Invariant: no name leads to a folder outside `models_dir`, through links or otherwise; files of the machine
are the operator's matter, who has the settings, not that of whoever has a key.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt.loading import bundled_models
from memory_efficient_gpt_server.wording import clipped

_HUB_ID: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
_CHARACTERS: Final = 120


def allowed_source(name: str, models_dir: Path | None) -> str:
    """A bundled model's name, a hub id, or the whole path of a folder in `models_dir`.

    A folder may be named by its path or by its place in models_dir. Raises InvalidRequestError.
    """
    if name in bundled_models():
        return name
    folder = None if models_dir is None or "\0" in name else _folder_in(models_dir.resolve(), name)
    if folder is not None:
        return str(folder)
    if _HUB_ID.fullmatch(name) and not Path(name).is_dir():  # a folder where the server runs is not the hub's
        return name
    where = "this server has no models_dir" if models_dir is None else "no folder in models_dir is that model"
    raise InvalidRequestError(
        f"model {clipped(name, _CHARACTERS)!r} can't be registered: it is no bundled model "
        f"({', '.join(bundled_models())}) and no hub id (org/name), and {where}. Name other folders in the "
        "server's settings.",
        param="model",
    )


def _folder_in(root: Path, name: str) -> Path | None:
    """The checkpoint folder that `name` is, if it lies below `root` once all links are followed."""
    try:
        folder = (root / name).resolve()
        inside = folder != root and folder.is_relative_to(root)
        return folder if inside and (folder / "config.json").is_file() else None
    except (OSError, RuntimeError, ValueError):  # too long, a loop of links
        return None

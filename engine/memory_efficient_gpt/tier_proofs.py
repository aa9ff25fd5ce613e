"""Proofs that a model may run packed, kept on disk from one process to the next.

Purpose: remember what a probe found, by all that it depends on: config, libraries, the model's code and ours.
Does not know: how an architecture is proven.
Invariant: only success is kept, so a proof that is lost, damaged or of other sources costs time only.

They are in $MEGPT_CACHE_DIR/proofs, or ~/.cache/memory_efficient_gpt/proofs.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
import transformers

from memory_efficient_gpt.kv_cache.geometry import LayerKV, causal_model_class
from memory_efficient_gpt.native.build import cache_root

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

_MOST_FILES: Final = 512


@dataclass(frozen=True, slots=True)
class Proof:
    """layers: the KV geometry. error: largest relative difference between packed execution and plain."""

    layers: list[LayerKV]
    error: float


def recall(config: PreTrainedConfig) -> Proof | None:
    """The proof for models of that config, if one was kept."""
    path = _path_of(config)
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return Proof([LayerKV(**layer) for layer in kept["layers"]], float(kept["error"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logger.warning("%s is not used: %s", path, error)
        return None


def keep(config: PreTrainedConfig, proof: Proof) -> None:
    """Keep it for other processes. Where the folder can't be written the log says so."""
    path = _path_of(config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _forget_oldest(path.parent)
        with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
            json.dump(asdict(proof), file)
        os.replace(file.name, path)  # whole or not at all, whoever else writes it
    except OSError as error:
        logger.info("The proof for %s is not kept: %s", type(config).__name__, error)


def _path_of(config: PreTrainedConfig) -> Path:
    described = config.to_dict()
    described.pop("_name_or_path", None)
    model = causal_model_class(config)
    parts = (
        json.dumps(described, sort_keys=True, default=str),
        *(f"{kind.__module__}.{kind.__qualname__}" for kind in (type(config), model)),
        _stamp(Path(inspect.getfile(model))),
        *(torch.__version__, transformers.__version__),
        _own_sources(),
    )
    name = hashlib.sha256("\n".join(parts).encode()).hexdigest()
    return cache_root() / "proofs" / f"{name}.json"


@functools.cache
def _own_sources() -> str:
    """Changes whenever a file of this package does."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return hashlib.sha256("\n".join(map(_stamp, files)).encode()).hexdigest()


def _stamp(path: Path) -> str:
    told = path.stat()
    return f"{path} {told.st_size} {told.st_mtime_ns}"


def _forget_oldest(folder: Path) -> None:
    """Proofs of sources that have changed since are never asked for again."""
    files = list(folder.glob("*.json"))
    if len(files) >= _MOST_FILES:
        files.sort(key=lambda path: path.stat().st_mtime_ns)
        for path in files[: len(files) // 2]:
            path.unlink(missing_ok=True)

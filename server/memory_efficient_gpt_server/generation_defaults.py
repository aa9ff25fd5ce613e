"""What a checkpoint's makers recommend for sampling.

Purpose: generation_config.json to the sampling fields that stand in for those a request leaves out.
Does not know: requests, engines.
Invariant: only what a request could say itself is taken over.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, Final

from memory_efficient_gpt.errors import CheckpointError, InvalidRequestError
from memory_efficient_gpt.request import SamplingParams

logger = logging.getLogger(__name__)

_SAMPLING_DEFAULTS: Final = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")


def generation_defaults(folder: Path) -> dict[str, float]:
    """The sampling fields that a checkpoint's generation_config.json recommends. Raises CheckpointError."""
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read: {error}. Download the model again.") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object. Download the model again.")
    named = {name: raw[name] for name in _SAMPLING_DEFAULTS if raw.get(name) is not None}
    if named.get("top_k") == 0:  # transformers' way to say "all"
        del named["top_k"]
    return {name: value for name, value in named.items() if _usable(path, name, value)}


def _usable(path: Path, name: str, value: Any) -> bool:
    """Whether a recommendation is one that a request could make; a client must not be blamed for it."""
    try:
        SamplingParams(**{name: value}).validate(vocab_size=1)
    except InvalidRequestError as error:
        logger.warning("%s: %s is left out: %s", path, name, error.message)
        return False
    return True

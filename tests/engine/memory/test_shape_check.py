"""A config.json that belongs to other weights is found out before anything is loaded."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import CheckpointError
from memory_efficient_gpt.loading import bundled_models
from memory_efficient_gpt.memory import estimate


def test_a_config_of_another_size_is_named_with_both_shapes(tmp_path: Path) -> None:
    folder = tmp_path / "wrong"
    shutil.copytree(bundled_models()["demo"], folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    size = config["hidden_size"]
    path.write_text(json.dumps({**config, "hidden_size": 2 * size}))
    with pytest.raises(CheckpointError, match=rf"different models: .* {size}.* in the file and .*{2 * size}"):
        estimate(EngineConfig(model=str(folder), device="cpu"), free_bytes=1 << 40)

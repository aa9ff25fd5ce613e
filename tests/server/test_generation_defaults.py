"""What a checkpoint recommends for sampling."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from memory_efficient_gpt.errors import CheckpointError
from memory_efficient_gpt_server.generation_defaults import generation_defaults


def test_recommended_sampling_is_taken_over(tmp_path: Path) -> None:
    recommended = {"temperature": 0.7, "top_p": 0.9, "top_k": 0, "max_new_tokens": 10, "min_p": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(recommended))
    assert generation_defaults(tmp_path) == {"temperature": 0.7, "top_p": 0.9}


def test_impossible_recommendation_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "generation_config.json").write_text('{"temperature": 3.5, "top_p": true, "top_k": 40}')
    with caplog.at_level(logging.WARNING):
        assert generation_defaults(tmp_path) == {"top_k": 40}
    assert "temperature is left out" in caplog.text and "top_p is left out" in caplog.text


def test_no_file_means_no_recommendation_and_a_broken_one_is_named(tmp_path: Path) -> None:
    assert generation_defaults(tmp_path) == {}
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json"):
        generation_defaults(tmp_path)

"""Engine settings report every problem at once."""

from __future__ import annotations

import pytest

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import ConfigError


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="demo", max_num_seqs=0, block_size=0, kv_cache_bytes=10, num_kv_blocks=4)
    assert len(caught.value.problems) == 3
    assert "max_num_seqs must be at least 1, got 0." in caught.value.problems


def test_defaults_are_valid() -> None:
    assert EngineConfig(model="demo").max_model_len is None

"""Engine settings report every problem at once."""

from __future__ import annotations

from typing import Any

import pytest

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.errors import ConfigError


def test_all_problems_are_reported_together() -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="demo", max_num_seqs=0, block_size=0, kv_cache_bytes=10, num_kv_blocks=4)
    assert len(caught.value.problems) == 3
    assert "max_num_seqs must be at least 1, got 0." in caught.value.problems


def test_names_are_checked() -> None:
    wrong: dict[str, Any] = dict(dtype="float8", kv_cache_dtype="int4", tier="A")
    with pytest.raises(ConfigError) as caught:
        EngineConfig(model="demo", **wrong)
    assert caught.value.problems == (
        "dtype must be auto, float32, bfloat16, float16, got 'float8'.",
        "kv_cache_dtype must be auto, float32, bfloat16, float16, int8, fp8, got 'int4'.",
        "tier must be B, C, None, got 'A'.",
    )


def test_defaults_are_valid() -> None:
    assert EngineConfig(model="demo").max_model_len is None

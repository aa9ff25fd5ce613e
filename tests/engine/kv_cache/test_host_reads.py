"""Models that no longer look at token values from Python."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from memory_efficient_gpt.kv_cache.host_reads import remove_host_reads, rope_length_limit
from tests.engine.architectures.configs import CASES


@pytest.mark.parametrize("name", ["phi3_longrope", "llama_dynamic_rope"])
def test_a_long_neighbour_no_longer_changes_a_short_sequence(name: str) -> None:
    model = CASES[name].model()
    limit = rope_length_limit(model.config)
    assert limit is not None
    ids = torch.randint(4, 128, (1, 12))
    short, beyond = torch.arange(12)[None], torch.arange(12)[None] + limit + 40
    with torch.no_grad():
        alone = model(input_ids=ids, position_ids=short, use_cache=False).logits
        both_positions = torch.cat((short, beyond))
        disturbed = model(input_ids=ids.repeat(2, 1), position_ids=both_positions, use_cache=False).logits[:1]
        assert not torch.allclose(alone, disturbed, atol=1e-3)  # else this test would show nothing
        model = CASES[name].model()
        remove_host_reads(model)
        frozen = model(input_ids=ids.repeat(2, 1), position_ids=both_positions, use_cache=False).logits[:1]
    torch.testing.assert_close(frozen, alone, rtol=1e-5, atol=1e-5)


def test_ordinary_rope_has_no_limit() -> None:
    assert rope_length_limit(CASES["llama"].config()) is None
    assert rope_length_limit(CASES["llama_yarn_rope"].config()) is None
    assert rope_length_limit(CASES["gpt2"].config()) is None
    assert rope_length_limit(CASES["gemma3_text"].config()) is None


def test_limit_is_where_the_frequencies_begin_to_change() -> None:
    assert rope_length_limit(CASES["phi3_longrope"].config()) == 128
    assert rope_length_limit(CASES["llama_dynamic_rope"].config()) == 256


def test_padding_ids_in_a_packed_row_are_not_looked_at() -> None:
    model = CASES["gpt2"].model()
    remove_host_reads(model)
    ids = torch.full((1, 3), model.config.pad_token_id, device="meta")  # has no values to look at
    transformer: Any = model.get_submodule("transformer")
    transformer.warn_if_padding_and_no_attention_mask(ids, None)

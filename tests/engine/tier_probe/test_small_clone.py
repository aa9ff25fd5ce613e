"""Small clones keep every kind of layer."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, PreTrainedConfig

from memory_efficient_gpt.tier_probe.small_clone import CHUNK, SOFTCAP, VOCAB_SIZE, WINDOW, small_clones


def smallest(model_type: str, **settings: Any) -> PreTrainedConfig:
    return next(iter(small_clones(AutoConfig.for_model(model_type, **settings))))


def test_candidates_end_with_the_config_itself() -> None:
    config = AutoConfig.for_model("llama")
    clones = list(small_clones(config))
    assert [clone.num_hidden_layers for clone in clones] == [4, 4, 4, 32]
    assert [clone.hidden_size for clone in clones] == [256, 4096, 4096, 4096]
    assert clones[-1].to_dict() == config.to_dict()
    assert clones[-1] is not config


def test_config_without_attention_heads_still_has_clones() -> None:
    assert len(list(small_clones(AutoConfig.for_model("mamba")))) == 3


@pytest.mark.parametrize(
    ("heads", "kv_heads", "small"), [(32, 32, (2, 2)), (32, 8, (4, 2)), (16, 1, (2, 1)), (28, 4, (4, 2))]
)
def test_kind_of_heads_and_their_size_stay(heads: int, kv_heads: int, small: tuple[int, int]) -> None:
    clone = smallest("llama", hidden_size=heads * 80, num_attention_heads=heads, num_key_value_heads=kv_heads)
    assert (clone.num_attention_heads, clone.num_key_value_heads) == small
    assert clone.hidden_size == small[0] * 80


def test_every_kind_of_layer_is_kept_in_order() -> None:
    clone = smallest("gemma3_text")
    assert clone.layer_types == (["sliding_attention"] * 5 + ["full_attention"]) * 2
    late = smallest("qwen2", use_sliding_window=True, max_window_layers=28, sliding_window=4096)
    assert late.layer_types == ["full_attention", "sliding_attention"]
    assert late.sliding_window == WINDOW


def test_layers_that_share_their_cache_are_kept_with_those_they_share_with() -> None:
    clone = smallest("gemma3n_text")
    assert clone.num_hidden_layers == len(clone.layer_types)
    own = clone.layer_types[: -clone.num_kv_shared_layers]
    shared = clone.layer_types[-clone.num_kv_shared_layers :]
    assert set(own) == set(shared) == {"sliding_attention", "full_attention"}


def test_lists_of_layer_numbers_are_renumbered() -> None:
    clone = smallest("llama4_text", interleave_moe_layer_step=2)
    assert clone.moe_layers == [index for index in range(clone.num_hidden_layers) if index % 2]
    assert clone.attention_chunk_size == clone.floor_scale == CHUNK


def test_thresholds_fall_within_short_sequences() -> None:
    clone = smallest("gemma2")
    assert (clone.sliding_window, clone.attn_logit_softcapping) == (WINDOW, SOFTCAP)
    assert smallest("gemma2", attn_logit_softcapping=None).attn_logit_softcapping is None
    assert smallest("mistral", sliding_window=None).sliding_window is None


def test_special_ids_stay_within_the_small_vocabulary() -> None:
    clone = smallest("phi3")
    assert clone.vocab_size == VOCAB_SIZE
    assert clone.pad_token_id == clone.eos_token_id == 0
    assert clone.bos_token_id == 1

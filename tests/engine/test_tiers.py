"""Every architecture gets the tier it deserves, and the probe sees what must not pass."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import AutoConfig, BertConfig, LlamaConfig, PreTrainedConfig, T5Config

from memory_efficient_gpt.attention import interface
from memory_efficient_gpt.attention.context import AttentionOptions
from memory_efficient_gpt.attention.torch_backend import TorchBackend
from memory_efficient_gpt.errors import UnsupportedModelError
from memory_efficient_gpt.kv_cache import geometry
from memory_efficient_gpt.tiers import decide_tier
from tests.engine.architectures.configs import CASES, WINDOW, Case

# transformers 5.17 compiles a helper of gpt_bigcode with torch.jit at import.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_architecture_gets_its_tier(case: Case) -> None:
    decision = decide_tier(case.config())
    assert decision.tier == case.tier, decision.reason
    if case.tier == "B":
        assert decision.error is not None
        assert decision.error < 1e-5
        assert decision.layers is not None
        assert len(decision.layers) == case.config().num_hidden_layers


FULL_SIZE = {
    "llama": LlamaConfig(num_key_value_heads=8, max_position_embeddings=8192),
    "gemma2": AutoConfig.for_model("gemma2"),
    "mixtral": AutoConfig.for_model("mixtral"),
    "deepseek_v3": AutoConfig.for_model("deepseek_v3"),
    "gpt_oss": AutoConfig.for_model("gpt_oss"),
    "qwen2 with late windows": AutoConfig.for_model("qwen2", use_sliding_window=True, max_window_layers=28),
    "phi3": AutoConfig.for_model("phi3", sliding_window=2047),
}


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_configs_are_probed_without_their_size(name: str) -> None:
    config = FULL_SIZE[name]
    decision = decide_tier(config)
    assert decision.tier == "B", decision.reason
    assert decision.layers is not None
    assert len(decision.layers) == config.num_hidden_layers


class Forgetful(TorchBackend):
    """A backend that ignores one option."""

    ignored = ""

    def attend(self, query, cache, context, options):  # type: ignore[no-untyped-def]  # as its parent
        kept = {name: getattr(options, name) for name in AttentionOptions.__slots__ if name != self.ignored}
        return super().attend(query, cache, context, AttentionOptions(**kept))


@pytest.mark.parametrize(
    ("ignored", "architecture"),
    [("window", "mistral"), ("window", "phimoe_window"), ("softcap", "gemma2"), ("sinks", "gpt_oss")],
)
def test_backend_that_ignores_an_option_is_caught(
    ignored: str, architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Forgetful, "ignored", ignored)
    monkeypatch.setattr("memory_efficient_gpt.tier_probe.packed_replay.TorchBackend", Forgetful)
    decision = decide_tier(CASES[architecture].config())
    assert decision.tier == "C"
    assert "differs" in decision.reason
    assert decision.error is not None
    assert decision.error > 1e-2  # far beyond the tolerance: nothing hides in between


def test_window_that_only_the_mask_knows_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(geometry, "_config_window", lambda module: None)
    assert decide_tier(CASES["phimoe_window"].config()).tier == "C"
    monkeypatch.undo()
    decision = decide_tier(CASES["phimoe_window"].config())
    assert decision.layers is not None
    assert [layer.window for layer in decision.layers] == [WINDOW, WINDOW]


def test_positions_of_a_neighbour_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model call without explicit positions would number the packed row through."""

    def without_positions(model, input_ids, positions, context, logits_rows):  # type: ignore[no-untyped-def]
        return interface.forward_packed(model, input_ids, torch.arange(len(positions)), context, logits_rows)

    monkeypatch.setattr("memory_efficient_gpt.tier_probe.packed_replay.forward_packed", without_positions)
    assert decide_tier(CASES["llama"].config()).tier == "C"


@pytest.mark.parametrize(
    "config", [T5Config(), BertConfig(), AutoConfig.for_model("clip")], ids=lambda c: c.model_type
)
def test_models_that_do_not_generate_left_to_right_are_refused(config: PreTrainedConfig) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"encoder-decoder|left to right|no causal language model"
    ):
        decide_tier(config)


def test_length_dependent_rope_limits_the_context() -> None:
    config = CASES["phi3_longrope"].config()
    capped = decide_tier(config)
    assert (capped.tier, capped.max_model_len) == ("B", 128)
    assert "128" in capped.notes[0]
    assert decide_tier(config, max_model_len=128).tier == "B"
    longer = decide_tier(config, max_model_len=129)
    assert longer.tier == "C"
    assert "128" in longer.reason
    assert "129" in longer.reason


def test_forced_c_needs_no_probe() -> None:
    decision = decide_tier(CASES["llama"].config(), forced="C")
    assert (decision.tier, decision.layers) == ("C", None)


def test_forced_b_is_refused_with_the_probes_reason() -> None:
    with pytest.raises(UnsupportedModelError, match=r"tier B was asked for, but .*never calls"):
        decide_tier(CASES["bloom"].config(), forced="B")
    assert decide_tier(CASES["llama"].config(), forced="B").tier == "B"


def test_config_and_random_state_are_left_alone() -> None:
    config = CASES["gemma2"].config()
    before = config.to_dict()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    decide_tier(config)
    assert torch.equal(torch.get_rng_state(), state)
    assert config.to_dict() == before


def test_decision_is_logged_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="memory_efficient_gpt.tiers"):
        decide_tier(CASES["bloom"].config())
    assert "BloomConfig: tier C: BloomConfig never calls" in caplog.text

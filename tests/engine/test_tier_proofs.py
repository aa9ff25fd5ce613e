"""Proofs from one process to the next: found for the same model and sources, never for others."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from memory_efficient_gpt import tier_proofs, tiers
from memory_efficient_gpt.tier_proofs import keep, recall
from memory_efficient_gpt.tiers import TierDecision, decide_tier
from tests.engine.architectures.configs import CASES


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MEGPT_CACHE_DIR", str(tmp_path))
    return tmp_path / "proofs"


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The configs that were probed."""
    own, asked = tiers._packed_error, []

    def packed_error(config: Any) -> float:
        asked.append(config)
        return own(config)

    monkeypatch.setattr(tiers, "_packed_error", packed_error)
    return asked


def config_of(**changes: Any) -> LlamaConfig:
    config: Any = CASES["llama"].config()
    for name, value in changes.items():
        setattr(config, name, value)
    made: LlamaConfig = config
    return made


def decide(**changes: Any) -> TierDecision:
    return decide_tier(config_of(**changes), remembers=True)


def test_a_second_process_has_the_same_decision_without_a_probe(probed: list[Any]) -> None:
    first = decide()
    assert first.tier == "B" and first.layers and len(probed) == 1
    assert decide() == first and len(probed) == 1
    assert decide(_name_or_path="elsewhere") == first and len(probed) == 1


def test_another_config_is_probed(probed: list[Any]) -> None:
    decide()
    assert decide(num_hidden_layers=3).layers != decide().layers
    assert len(probed) == 2


@pytest.mark.parametrize("what", ["torch", "transformers", "model code", "own code"])
def test_another_version_is_probed(what: str, probed: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    decide()
    if what in ("torch", "transformers"):
        monkeypatch.setattr(f"memory_efficient_gpt.tier_proofs.{what}.__version__", "99")
    elif what == "model code":
        monkeypatch.setattr(tier_proofs, "_stamp", lambda path: f"{path} changed")
    else:
        monkeypatch.setattr(tier_proofs, "_own_sources", lambda: "changed")
    decide()
    assert len(probed) == 2


def test_a_change_of_any_source_changes_the_fingerprint(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text("1")
    before = tier_proofs._stamp(file)
    os.utime(file, ns=(1, 1))
    assert tier_proofs._stamp(file) != before


def test_nothing_is_remembered_unless_it_was_asked_for(probed: list[Any], folder: Path) -> None:
    decide_tier(config_of())
    assert not folder.exists()
    decide()
    decide_tier(config_of())
    assert len(probed) == 3


def test_a_failure_is_not_kept(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(tiers, "_packed_error", lambda config: 1.0)
        assert decide().tier == "C"
    assert not folder.exists()
    assert decide().tier == "B"


@pytest.mark.parametrize("damage", ["", "{", '{"layers": [{"odd": 1}], "error": 0}', '{"error": 0.0}'])
def test_a_damaged_proof_is_told_and_found_anew(
    damage: str, probed: list[Any], folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = decide()
    (path,) = folder.iterdir()
    path.write_text(damage)
    with caplog.at_level(logging.WARNING):
        assert decide() == first
    assert "is not used" in caplog.text and len(probed) == 2
    assert json.loads(path.read_text())["error"] == first.error


def test_where_nothing_can_be_written_each_process_probes(
    probed: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a file"
    file.write_text("")
    monkeypatch.setenv("MEGPT_CACHE_DIR", str(file))
    assert decide().tier == decide().tier == "B"
    assert len(probed) == 2


def test_old_proofs_make_room(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_proofs, "_MOST_FILES", 4)
    decision = decide()
    assert decision.layers is not None
    configs = [config_of(vocab_size=100 + number) for number in range(9)]
    for number, config in enumerate(configs):
        keep(config, tier_proofs.Proof(decision.layers, 0.0))
        os.utime(tier_proofs._path_of(config), ns=(number, number))
    assert len(list(folder.iterdir())) <= 4
    assert recall(configs[-1]) is not None and recall(configs[0]) is None

"""Kernels built ahead: the steps that are run, on what model, and where it is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.kernel_builds import build_for_model, random_engine, run_steps
from memory_efficient_gpt.loading import bundled_models
from memory_efficient_gpt.step_shape import ROWS, TOKENS
from tests.engine.architectures.configs import CASES

CPU = torch.device("cpu")


def ignore(what: str, share: float) -> None:
    """Progress that nobody sees."""


def test_every_number_of_rows_and_of_prompt_tokens_comes_up_and_both_in_one_step(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = EngineConfig(model="m", max_num_seqs=16, max_batched_tokens=64, num_kv_blocks=120)
    engine = Engine.from_model(CASES["llama"].model(), config)
    steps, launch = [], engine._runner.launch

    def watched(step: Any) -> Any:
        steps.append((step.num_tokens, step.num_decodes, len(step.chunks)))
        return launch(step)

    monkeypatch.setattr(engine._runner, "launch", watched)
    seen: list[float] = []
    run_steps(engine, config, lambda what, share: seen.append(share))
    assert not engine.has_work
    decodes = {decodes for tokens, decodes, chunks in steps if decodes == chunks}
    assert {rows for rows in ROWS if rows <= 16} <= decodes
    prompts = {tokens for tokens, decodes, chunks in steps if chunks == 1 and not decodes}
    assert {1, *(tokens for tokens in TOKENS if tokens <= 64)} <= prompts
    assert any(0 < decodes < chunks for _, decodes, chunks in steps)
    assert seen == sorted(seen) and seen[-1] == 1.0


def test_a_model_is_as_wide_as_the_real_one_with_few_layers_and_its_schemes(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()  # no weights
    settings = json.loads((bundled_models()["demo"] / "config.json").read_text())
    settings["num_hidden_layers"] = 48
    (folder / "config.json").write_text(json.dumps(settings))
    config = EngineConfig(model=str(folder), device="cpu", quantization="int8", num_kv_blocks=40)
    engine = random_engine(config, CPU, ignore)
    model: Any = engine._runner._model  # type: ignore[attr-defined]
    assert engine.info.quantization == "int8" and engine.info.vocab_size == settings["vocab_size"]
    assert model.config.hidden_size == settings["hidden_size"]
    assert len(model.model.layers) < 12


def test_a_quantized_checkpoint_needs_its_scheme_named(tmp_path: Path) -> None:
    shutil.copytree(bundled_models()["demo"], tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    settings = json.loads(path.read_text())
    settings["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    path.write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match="--quantization"):
        random_engine(EngineConfig(model=str(tmp_path / "model"), device="cpu"), CPU, ignore)


def test_without_a_gpu_it_says_that_cpu_kernels_need_no_model() -> None:
    with pytest.raises(ConfigError, match=r"on cpu\. .*leave the model out"):
        build_for_model(EngineConfig(model="demo", device="cpu"), ignore)

"""`megpt plan`: what models take, whether they fit, what would, and that nothing is loaded for it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from memory_efficient_gpt import assembly, loading
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.memory import SERVER_BYTES
from memory_efficient_gpt_server.cli import main

GIB = 1 << 30


@dataclass
class Done:
    """How the command ended."""

    code: int
    out: str
    err: str


PlanCommand = Callable[..., Done]


@pytest.fixture
def plan(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> PlanCommand:
    """Runs `megpt plan`; loading weights fails the test."""

    def load(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were loaded")

    monkeypatch.setattr(loading, "load_model", load)
    monkeypatch.setattr(assembly, "load_model", load)

    def run(*args: str) -> Done:
        code = main(["plan", "--device", "cpu", *args])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture
def hub_8b(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """The hub id of a model with the shape of Llama 3.1 8B, of which only config.json is ever asked for."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=131072, dtype="bfloat16",
    )  # fmt: skip
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: str(tmp_path))
    return "org/llama-8b"


def test_a_model_is_planned_as_it_will_be_loaded(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = main(["plan", "demo-draft", "--quantization", "int4", "--device", "cpu", "--json"])
    report = json.loads(capsys.readouterr().out)
    info = Engine.load(EngineConfig(model="demo-draft", quantization="int4", device="cpu")).info
    (model,) = report["models"]
    assert code == 0 and report["fits"] is True and report["would_fit"] == []
    assert (model["weights_bytes"], model["kv_cache_bytes"]) == (info.weights_bytes, info.kv_cache_bytes)
    assert (model["quantization"], model["max_model_len"]) == ("int4", info.max_model_len)
    kinds = [model[f"{kind}_bytes"] for kind in ("weights", "kv_cache", "workspace")]
    assert model["total_bytes"] == sum(kinds)
    assert report["needed_bytes"] == SERVER_BYTES + model["total_bytes"]


def test_several_models_must_fit_together(plan: PlanCommand) -> None:
    alone = json.loads(plan("demo", "--memory-budget", "2GiB", "--json").out)
    both = json.loads(plan("demo", "demo-mha", "--memory-budget", "2GiB", "--json").out)
    assert both["models"][0] == alone["models"][0]
    assert both["needed_bytes"] == alone["needed_bytes"] + both["models"][1]["total_bytes"]
    tight = json.loads(plan("demo", "--memory-budget", "318MiB", "--json").out)
    too_tight = json.loads(plan("demo", "demo-mha", "demo-draft", "--memory-budget", "318MiB", "--json").out)
    assert (tight["fits"], too_tight["fits"]) == (True, False)


def test_the_table_has_a_line_for_each_model_and_their_sum(
    plan: PlanCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory_efficient_gpt.hardware.free_memory_bytes", lambda _: 2 * GIB)
    done = plan("demo", "demo-draft")
    assert done.code == 0
    header, demo, draft, server, together, *_ = done.out.splitlines()
    assert header.split() == ["model", "weights", "KV", "cache", "workspace", "total", "context"]
    assert demo.startswith("demo ") and draft.startswith("demo-draft ") and "server itself" in server

    def total(line: str) -> float:
        number, unit = re.findall(r"([\d.]+) (MiB|GiB)", line)[-1]
        return float(number) * (1024 if unit == "GiB" else 1)

    assert total(together) == pytest.approx(sum(map(total, (demo, draft, server))), abs=6)  # rounded GiB
    assert re.search(r"^fits into 2\.00 GiB of memory \(cpu\); [\d.]+ [MG]iB stay free$", done.out, re.M)


def test_without_a_budget_the_machines_free_memory_counts(
    plan: PlanCommand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory_efficient_gpt.hardware.free_memory_bytes", lambda _: 3 * GIB)
    report = json.loads(plan("demo-draft", "--json").out)
    assert report["budget_bytes"] == 3 * GIB
    assert report["fits"] is True


def test_a_budget_is_for_models_alone_as_a_servers_is(plan: PlanCommand) -> None:
    words = ("demo", "--memory-budget", "400000000", "--kv-cache-bytes", "25190400", "--json")
    report = json.loads(plan(*words).out)
    assert report["fits"] and report["server_bytes"] == 0
    assert report["needed_bytes"] == report["models"][0]["total_bytes"]


def test_a_budget_below_a_model_names_what_is_missing(plan: PlanCommand) -> None:
    done = plan("demo", "--memory-budget", "60MiB")
    assert done.code == 1
    missing = re.search(
        r"^does not fit into 60\.0 MiB of memory \(cpu\): ([\d.]+) MiB too much$", done.out, re.M
    )
    assert missing is not None and 50 < float(missing[1]) < 150
    assert "no change that was tried would do" in done.out


def test_changes_that_would_do_are_named_with_their_options(plan: PlanCommand, hub_8b: str) -> None:
    for words, text in (
        (("demo", "demo-mha", "demo-draft", "--memory-budget", "348MiB"), "with at most"),
        ((hub_8b, "--max-model-len", "4096", "--memory-budget", "8GiB"), "with int4 weights"),
    ):
        report = json.loads(plan(*words, "--json").out)
        (change,) = [change for change in report["would_fit"] if change["text"].startswith(text)]
        again = plan(*words, *change["options"], "--json")
        assert again.code == 0
        assert json.loads(again.out)["needed_bytes"] == change["needed_bytes"]
        assert f"fits {change['text']}: " in plan(*words).out


def test_one_of_several_models_may_be_what_is_too_much(plan: PlanCommand, hub_8b: str) -> None:
    words = ("demo", hub_8b, "--max-model-len", "2048", "--memory-budget", "2GiB")
    texts = [change["text"] for change in json.loads(plan(*words, "--json").out)["would_fit"]]
    assert texts == [f"without {hub_8b}"]


def test_8b_fits_into_8_gib_with_int4(plan: PlanCommand, hub_8b: str) -> None:
    words = (hub_8b, "--max-model-len", "4096", "--memory-budget", "8GiB", "--json")
    done = plan(*words)
    report = json.loads(done.out)
    assert done.code == 1
    assert report["models"][0]["weights_bytes"] == 16_060_522_496
    (change,) = report["would_fit"]
    assert change["text"] == "with int4 weights"
    assert change["needed_bytes"] < 8 * GIB


def test_a_long_context_may_be_what_is_too_much(plan: PlanCommand, hub_8b: str) -> None:
    words = (hub_8b, "--quantization", "int4", "--memory-budget", "8GiB")
    done = plan(*words)
    assert done.code == 1
    assert re.search(r"gets [\d,]+ of its 131,072 tokens of context", done.out)
    assert "fits with a context of 4,096 tokens" in done.out
    report = json.loads(plan(*words, "--json").out)
    assert {"max_model_len", "wanted_model_len"} < report["models"][0].keys()
    assert ["--max-model-len", "4096"] in [change["options"] for change in report["would_fit"]]


def test_several_changes_together_are_the_last_resort(plan: PlanCommand, hub_8b: str) -> None:
    report = json.loads(plan(hub_8b, "--memory-budget", "8GiB", "--json").out)
    (change,) = report["would_fit"]
    assert change["text"].startswith("with int4 weights, an int8 KV cache and a context of")
    assert change["options"][:4] == ["--quantization", "int4", "--kv-cache-dtype", "int8"]


# ---- wrong use


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("no-such-model",), 1, "no-such-model"),
        (("demo", "--quantization", "int3"), 2, "scheme 'int3' is unknown"),
        (("demo", "--max-model-len", "5000"), 2, "this model's limit is 2,048"),
    ],
)
def test_wrong_use_is_told(plan: PlanCommand, words: tuple[str, ...], code: int, told: str) -> None:
    done = plan(*words)
    assert done.code == code
    assert told in done.err and done.out == ""


def test_a_budget_must_be_a_size(plan: PlanCommand, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        plan("demo", "--memory-budget", "much")
    assert "'much' is no size" in capsys.readouterr().err


def test_help_teaches_what_is_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    printed = capsys.readouterr().out
    for word in ("weights", "KV cache", "workspace", "--memory-budget 8GiB", "Exit code: 0 it fits"):
        assert word in printed

"""`megpt quantize`: plans, folders that load, nothing left behind."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from memory_efficient_gpt.api import LLM
from memory_efficient_gpt.loading import load_config, load_model, resolve_model
from memory_efficient_gpt.quantization.calibration import split_text
from memory_efficient_gpt.quantization.sensitivity import MEASURED_TOKENS, Reference
from memory_efficient_gpt.tokenizer import Tokenizer
from memory_efficient_gpt_server.commands import quantize_steps
from tests.server.quantize_runs import MODEL, QUICK, Quantize

WRITTEN = 2560


@pytest.fixture(autouse=True)
def short_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    """That the model writes unless a length is named."""
    monkeypatch.setattr(quantize_steps, "GPTQ_GENERATED_TOKENS", WRITTEN)


def schemes_in(folder: Path) -> dict[str, str]:
    config = json.loads((folder / "config.json").read_text())
    modules: dict[str, str] = config["quantization_config"]["modules"]
    return modules


# ---- what is written


def test_one_scheme_becomes_a_folder_that_loads(quantize: Quantize, tmp_path: Path) -> None:
    out = tmp_path / "small"
    done = quantize("--scheme", "int4", "--out", str(out))
    assert done.code == 0, done.err
    assert set(schemes_in(out).values()) == {"int4", "int8"}
    before = (resolve_model(MODEL) / "model.safetensors").stat().st_size
    after = (out / "model.safetensors").stat().st_size
    assert f"{before:,} bytes of weights became {after:,} bytes" in done.out
    assert f"megpt serve --model {out}" in done.out
    assert after < 0.5 * before
    assert [entry.name for entry in tmp_path.iterdir()] == ["small"], "nothing else is left"
    with LLM(out, progress=False) as llm:
        assert llm.info.dtype == "bfloat16"
        assert llm.generate("The old house", max_tokens=5, temperature=0.0).text


def test_a_budget_becomes_a_mix_that_fits_it(quantize: Quantize, tmp_path: Path) -> None:
    out = tmp_path / "mixed"
    done = quantize("--bits-per-weight", "6", "--out", str(out), "--json", *QUICK)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert 5.0 < report["bits_per_weight"] <= 6.0
    written = schemes_in(out)
    assert {name: scheme for name, scheme in written.items() if name != "lm_head"} == report["schemes"]
    assert len(set(written.values())) > 1
    assert report["bytes_after"] == (out / "model.safetensors").stat().st_size
    stored = sum(group["bytes"] for group in report["groups"])
    assert stored < report["bytes_after"] < 1.1 * stored + 20_000
    assert 0 < report["measured_kl"] < 10 * report["predicted_kl"]
    assert report["measured_tokens"] == 64


def test_what_is_measured_is_what_was_written(quantize: Quantize, tmp_path: Path) -> None:
    """Also: stored in the checkpoint's dtype, the model loses nothing that was not measured."""
    file, out = tmp_path / "text.txt", tmp_path / "out"
    file.write_text("The old house stood at the end of the lane. " * 40)
    words = ("--scheme", "int4", "--calibration", str(file), "--out", str(out), "--json")
    report = json.loads(quantize(*words).out)
    assert report["measured_on"] == str(file)

    def load(folder: Path) -> Any:
        return load_model(folder, load_config(folder), dtype=torch.float32, device=torch.device("cpu"))

    source = resolve_model(MODEL)
    reference = Reference(
        load(source), split_text(load_config(source), Tokenizer.load(source).encode(file.read_text()))
    )
    reference.model = load(out)
    assert reference.divergence() == pytest.approx(report["measured_kl"], rel=1e-3)


def test_calibration_changes_what_is_written(quantize: Quantize, tmp_path: Path) -> None:
    for name, more in (("plain", ()), ("calibrated", QUICK), ("again", QUICK)):
        assert quantize("--scheme", "int4", "--out", str(tmp_path / name), *more).code == 0
    plain, calibrated, again = (
        (tmp_path / name / "model.safetensors").read_bytes() for name in ("plain", "calibrated", "again")
    )
    assert plain != calibrated
    assert calibrated == again, "the same seed gives the same text"


def test_a_text_makes_gptq_the_rounding_unless_another_is_named(quantize: Quantize, tmp_path: Path) -> None:
    kl: dict[str, float] = {}
    for name, more in (("gptq", ()), ("search", ("--rounding", "search"))):
        words = ("--scheme", "int4-g128", "--calibrate-tokens", "4096", "--json", *more)
        report = json.loads(quantize(*words, "--out", str(tmp_path / name)).out)
        assert set(report["rounded"]) == {name} and report["measured_on_other_texts"]
        kl[name] = report["measured_kl"]
    assert kl["gptq"] < 0.75 * kl["search"], "on texts that it was not rounded with"
    done = quantize("--scheme", "int4", "--out", str(tmp_path / "plain"))
    assert "rounded by search (15 layers)" in done.out


def test_gptq_alone_lets_the_model_write_a_text(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantize_steps, "GPTQ_GENERATED_TOKENS", 640)
    out = tmp_path / "out"
    done = quantize("--scheme", "int4", "--rule", "*.down_proj=fp8", "--rounding", "gptq", "--out", str(out))
    assert done.code == 0, done.err
    assert "measured on 768 tokens of a text the model wrote" in done.out
    assert "weights were rounded with the same tokens" in done.out
    assert "rounded by gptq (13 layers), nearest (2 layers); 2 layers not by gptq: fp8 has no integers" in (
        done.out.splitlines()
    )


def test_a_plan_is_what_would_be_written(quantize: Quantize, tmp_path: Path) -> None:
    budget = ("--bits-per-weight", "5", "--json")
    plan = json.loads(quantize(*budget, "--plan").out)
    written = json.loads(quantize(*budget, "--out", str(tmp_path / "out")).out)
    assert plan["schemes"] == written["schemes"]
    assert plan["predicted_kl"] == pytest.approx(written["predicted_kl"], rel=1e-6)
    assert plan["calibration_tokens"] == written["calibration_tokens"] == WRITTEN
    assert written["measured_kl"] < plan["predicted_kl"], (
        "gptq loses less than the search by which plans are made"
    )
    assert "predicted for codes found by search" in quantize(*budget[:2], "--plan", *QUICK).out


def test_rules_and_rounding_reach_the_weights(quantize: Quantize, tmp_path: Path) -> None:
    out = tmp_path / "out"
    rules = ("--rule", "*.down_proj=int8", "--rule", "*.0.*=int4-asym-g64")
    done = quantize("--scheme", "int4-g128", *rules, "--rounding", "hqq", "--out", str(out))
    assert done.code == 0, done.err
    schemes = schemes_in(out)
    assert schemes["model.layers.0.mlp.down_proj"] == "int8"
    assert schemes["model.layers.0.mlp.up_proj"] == "int4-asym-g64"
    assert schemes["model.layers.1.mlp.up_proj"] == "int4-g128"


def test_the_folder_is_told_without_detours(quantize: Quantize, tmp_path: Path) -> None:
    (tmp_path / "some").mkdir()
    done = quantize("--scheme", "int8", "--out", str(tmp_path / "some" / ".." / "out"))
    assert done.out.endswith(f"serve it: megpt serve --model {tmp_path.resolve() / 'out'}\n")


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="a file system that takes no folders")
def test_where_no_folder_can_be_made_is_told_before_anything_is_loaded(
    quantize: Quantize, unloadable: None
) -> None:
    done = quantize("--scheme", "int8", "--out", "/proc/megpt")
    assert done.code == 2 and "--out /proc/megpt cannot be made: /proc is not a folder that" in done.err


def test_an_empty_folder_may_be_given(quantize: Quantize, tmp_path: Path) -> None:
    assert quantize("--scheme", "int8", "--out", str(tmp_path)).code == 0
    assert (tmp_path / "config.json").is_file()


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        OSError(28, "No space left on device"),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
    ids=["interrupted", "by the system", "by safetensors"],
)
@pytest.mark.parametrize("present", [False, True], ids=["new", "an empty folder"])
def test_what_ends_writing_leaves_nothing(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, present: bool
) -> None:
    out = tmp_path / "out"
    if present:
        out.mkdir()

    def half(_: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        assert file.parent.parent == (out.parent if not present else tmp_path)
        raise error

    monkeypatch.setattr("safetensors.torch.save_file", half)
    done = quantize("--scheme", "int8", "--out", str(out))
    assert done.code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert list(tmp_path.rglob("*")) == ([out] if present else [])
    if not isinstance(error, KeyboardInterrupt):
        assert done.err == (
            f"megpt: {out} cannot be written: No space left on device. Nothing was left there.\n"
        )


def test_how_much_of_a_text_is_compared_is_told(quantize: Quantize, tmp_path: Path) -> None:
    words = ("--scheme", "int8", "--calibrate-tokens", "2048", "--seed", "3")
    done = quantize(*words, "--out", str(tmp_path / "out"))
    assert "measured on 1,024 of 2,048 tokens of a text the model wrote" in done.out
    done = quantize(*words[:3], "64", "--out", str(tmp_path / "other"))
    assert "measured on 64 tokens of a text the model wrote" in done.out
    assert str(MEASURED_TOKENS) == "1024", "as --help says"


# ---- plans


def test_a_plan_is_a_table_and_writes_nothing(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = quantize("--bits-per-weight", "5", "--tied", "--plan", *QUICK)
    assert done.code == 0, done.err
    lines = done.out.splitlines()
    head = ("group", "scheme", "bits", "bytes", "t^2", "sensitivity", "predicted", "KL")
    assert tuple(lines[0].split()) == head
    (row,) = [line.split() for line in lines if "layers.0.mlp.gate_proj+up_proj" in line]
    assert len(row) == 7
    assert row[1] in ("int4-g128", "int4", "int8")
    assert "bits per weight" in done.out and "nats per token" in done.out
    assert list(tmp_path.iterdir()) == []
    assert len({len(line) for line in lines[1:10]}) == 1, "columns are aligned"


def test_a_plan_as_json_adds_up(quantize: Quantize) -> None:
    report = json.loads(quantize("--bits-per-weight", "5", "--plan", "--json", *QUICK).out)
    groups = report["groups"]
    assert report["predicted_kl"] == pytest.approx(sum(group["predicted_kl"] for group in groups))
    assert sorted(report["schemes"]) == sorted(name for group in groups for name in group["layers"])
    assert report["out"] is report["bytes_after"] is report["measured_kl"] is None
    assert all(g["predicted_kl"] == pytest.approx(g["sensitivity"] * g["error"]) for g in groups)


def test_a_plan_of_one_scheme_tells_what_it_costs(quantize: Quantize) -> None:
    report = json.loads(quantize("--scheme", "int4", "--plan", "--json", *QUICK).out)
    assert {group["scheme"] for group in report["groups"]} == {"int4", "int8"}
    assert report["predicted_kl"] > 0


def test_more_bits_are_predicted_to_cost_less(quantize: Quantize) -> None:
    kl = [
        json.loads(quantize("--bits-per-weight", bits, "--plan", "--json", *QUICK).out)["predicted_kl"]
        for bits in ("4.3", "5", "7")
    ]
    assert kl[0] > kl[1] > kl[2]


def test_layers_that_fused_kernels_want_alike_are_tied_on_demand(quantize: Quantize) -> None:
    words = ("--bits-per-weight", "5", "--plan", "--json", "--exact", *QUICK)
    apart, tied = (json.loads(quantize(*words, *more).out)["groups"] for more in ((), ("--tied",)))
    assert all(len(group["layers"]) == 1 for group in apart)
    assert {len(group["layers"]) for group in tied} == {1, 2, 3}


def test_progress_is_shown_on_a_terminal(
    quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    done = quantize("--bits-per-weight", "5", "--out", str(tmp_path / "out"), *QUICK)
    for phase in ("loading", "calibrating", "measuring", "quantizing", "writing"):
        assert phase in done.err


@pytest.mark.parametrize("width", [80, 140])
def test_a_table_fits_its_terminal(quantize: Quantize, monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    printed = quantize("--bits-per-weight", "5", "--tied", "--plan", *QUICK).out
    lines = re.sub(r"\x1b\[[0-9;]*m", "", printed).splitlines()
    assert max(map(len, lines)) <= width
    row = next(line for line in lines if "gate_proj+up_proj" in line)
    assert ("model.layers.0.mlp" in row) == (width == 140), "whole names where there is room, else two lines"

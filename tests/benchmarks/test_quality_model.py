"""The whole command on a small corpus and a tiny model: train, export, quantize in every way, records."""

from __future__ import annotations

import json
import lzma
import random
from pathlib import Path

import pytest
import torch

from benchmarks import quality, quality_model
from benchmarks.quality_model import CONFIG, main, read_corpus
from benchmarks.quality_rows import BITSANDBYTES, GPTQ, UNIFORM, Books, Quality
from memory_efficient_gpt.loading import resolve_model
from training.architectures import make_model, num_parameters
from training.corpus import read_books
from training.scoring import Score
from training.settings import read_run

CONFIG_TEXT = """
name: tiny-quality
model: {layers: 2, hidden_size: 64, heads: 2, kv_heads: 1, intermediate_size: 128, max_positions: 64}
recipe: {steps: 25, phases: [{length: 64, rows: 4}], chat_share: 0}
"""


def made_up_book(seed: int) -> str:
    rng = random.Random(seed)
    words = ("the", "a", "dog", "king", "ship", "old", "green", "house", "went", "saw", "found", "and")
    return "\n\n".join(" ".join(rng.choices(words, k=10)).capitalize() + "." for _ in range(60))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    for number, (split, count) in enumerate({"train": 4, "valid": 1, "test": 2}.items()):
        text = "\n<|endoftext|>\n".join(made_up_book(10 * number + book) for book in range(count))
        (folder / f"{split}.txt.xz").write_bytes(lzma.compress(text.encode()))
    return folder


def test_trains_a_model_and_measures_every_scheme(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quality, "machine_facts", lambda threads: {"cpu": "made up"})
    (tmp_path / "tiny.yaml").write_text(CONFIG_TEXT)
    arguments = ["--corpus", corpus, "--out", tmp_path / "out", "--config", tmp_path / "tiny.yaml"]
    options = ["--device", "cpu", "--tokens-per-book", "129", "--budgets", "5", "6", "--commit", "abc"]
    assert main([*map(str, arguments), *options]) == 0

    training = json.loads((tmp_path / "out" / "quality_model.json").read_text())
    assert (training["steps"], training["tokens"], training["commit"]) == (25, 25 * 4 * 64, "abc")
    assert training["curve"][-1]["valid_bits_per_byte"] > 0
    record = json.loads((tmp_path / "out" / "quantization_quality.json").read_text())
    assert (record["split"], record["tokens"], record["commit"]) == ("test", 256, "abc")
    assert "float32" in record["arithmetic"] and "not rounded" in record["arithmetic"]
    names = [row["name"] for row in record["rows"]]
    ours = ["bf16", *(f"{scheme}, {rounding}" for scheme, rounding in UNIFORM), "int4, weighted search"]
    ours += [f"{scheme}, gptq" for scheme in GPTQ]
    assert names[: len(ours) + 2] == [*ours, "mixed, 5 bits", "mixed, 6 bits"]
    theirs = {f"bitsandbytes {kind}" for kind in BITSANDBYTES}
    assert set(names[len(ours) + 2 :]) | set(record["left_out"]) == theirs
    rows = {row["name"]: row for row in record["rows"]}
    assert rows["int8, search"]["perplexity"] == pytest.approx(rows["bf16"]["perplexity"], rel=0.01)
    assert rows["mixed, 5 bits"]["bits"] <= 5 < 6 <= rows["int4, search"]["bits"]
    assert rows["int4, search"]["bytes"] < rows["int8, search"]["bytes"] < rows["bf16"]["bytes"]
    assert capsys.readouterr().out.splitlines()[-len(rows)].startswith("| bf16 | 16.000 |")


def test_training_reads_no_test_book(corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def reading(folder: Path, split: str) -> list[str]:
        read.append(split)
        return read_books(folder, split)

    monkeypatch.setattr(quality_model, "read_books", reading)
    found = read_corpus(corpus, resolve_model("demo"), torch.device("cpu"))
    assert read == ["train", "valid"]
    assert len(found.streams.chat) == 0
    assert len(found.calibration) == 4


def test_the_model_has_at_least_100_million_parameters_in_groups_without_rest() -> None:
    settings = read_run(CONFIG).model
    with torch.device("meta"):
        assert num_parameters(make_model(settings, seed=0)) >= 100_000_000
    assert settings.hidden_size % 128 == settings.intermediate_size % 128 == 0


def test_without_kernels_rows_score_the_dequantized_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    scored: list[torch.Tensor] = []

    def remember(books: Books, model: torch.nn.Module) -> Score:
        ids = books.parts[0][None].long()
        with torch.no_grad():
            scored.append(model(ids).logits)
        return Score(1.0, 1, 1, 1)

    monkeypatch.setattr(Books, "score", remember)
    part = torch.arange(6, 40, dtype=torch.int32)
    text = torch.arange(6, 262)[None]
    rows = Quality(resolve_model("demo-draft"), Books([part], 1), lambda _: text)
    for measure in (rows.unquantized, lambda: rows.uniform("int8", "search"), lambda: rows.weighted("int4")):
        measure()
    exact, eight, four = scored
    assert 0 < float((eight - exact).norm() / exact.norm()) < 0.02
    assert float((eight - exact).norm()) < float((four - exact).norm()) < 0.5 * float(exact.norm())

"""Which rows get measured, what is on disk meanwhile, and what calibration reads."""

from __future__ import annotations

import json
import lzma
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.quality import held_out, markdown, measure_rows, middles, write_record
from benchmarks.quality_rows import Books, Quality, Row
from memory_efficient_gpt.loading import resolve_model
from training.tokenizer import load_tokenizer


def row(name: str, perplexity: float = 10.0) -> Row:
    return Row(name, 16.0, 1_000_000, perplexity, 0.5, 0.1)


def failing(error: Exception) -> Row:
    raise error


class Scripted(Quality):
    """Rows that were measured before."""

    def __init__(self, rows: dict[str, Callable[[], Row]]) -> None:
        super().__init__(Path(), Books([], 1), lambda _: torch.zeros(1, 1))
        self._rows = rows

    def rows(self, budgets: Sequence[float]) -> dict[str, Callable[[], Row]]:
        return self._rows


def test_a_failed_row_is_left_out_with_its_reason_and_the_others_are_measured(tmp_path: Path) -> None:
    quality = Scripted({
        "bf16": partial(row, "bf16"),
        "broken": partial(failing, RuntimeError("out of memory")),
        "absent": partial(failing, ModuleNotFoundError("No module named 'bitsandbytes'")),
        "int4": partial(row, "int4", 11.0),
    })  # fmt: skip
    path = tmp_path / "record.json"
    measured = measure_rows(quality, (), {"model": "m"}, partial(write_record, path))
    record = json.loads(path.read_text())
    assert [each.name for each in measured] == ["bf16", "int4"] == [each["name"] for each in record["rows"]]
    assert record["left_out"] == {
        "broken": "RuntimeError: out of memory", "absent": "No module named 'bitsandbytes'",
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


def test_the_record_is_saved_after_every_row() -> None:
    saved: list[dict[str, Any]] = []
    measure_rows(Scripted({name: partial(row, name) for name in "abc"}), (), {}, saved.append)
    assert [len(record["rows"]) for record in saved] == [1, 2, 3, 3]


def test_rows_after_the_deadline_are_left_out() -> None:
    saved: list[dict[str, Any]] = []
    quality = Scripted({name: partial(row, name) for name in "ab"})
    assert measure_rows(quality, (), {}, saved.append, until=time.monotonic() - 1) == []
    assert saved[-1]["left_out"] == dict.fromkeys("ab", "no time was left")


def test_nothing_is_measured_without_the_row_that_others_are_compared_with() -> None:
    quality = Scripted({"bf16": partial(failing, RuntimeError("broken")), "int4": partial(row, "int4")})
    with pytest.raises(RuntimeError, match="broken"):
        measure_rows(quality, (), {}, lambda _: None)


def test_products_are_exact_after_training_allowed_tf32() -> None:
    torch.set_float32_matmul_precision("high")
    measure_rows(Scripted({"bf16": partial(row, "bf16")}), (), {}, lambda _: None)
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_table_compares_with_the_first_row() -> None:
    lines = markdown([row("bf16"), row("int4", 11.0)]).splitlines()[2:]
    assert [line.split(" | ")[4] for line in lines] == ["+0.00%", "+10.00%"]


def test_calibration_reads_the_middles_of_books_evenly_spread() -> None:
    folder = resolve_model("demo")
    books = [f"{'Title. ' * 900} king {word} " * 2 for word in ("zero", "one", "two", "three", "four")]
    pieces = middles(books, folder, 3 * 256)
    assert pieces.shape == (3, 256)
    encoder = load_tokenizer(folder)
    whole = [encoder.encode(book[len(book) // 2 :]).ids[:256] for book in (books[0], books[2], books[4])]
    assert pieces.tolist() == whole


def test_short_books_give_pieces_of_one_length() -> None:
    assert len(middles(["A king. " * 9, "A king. " * 40], resolve_model("demo"), 4096)) == 2


def test_held_out_books_are_cut_to_so_many_tokens(tmp_path: Path) -> None:
    text = f"{'A king went. ' * 50}\n<|endoftext|>\nShort."
    (tmp_path / "test.txt.xz").write_bytes(lzma.compress(text.encode()))
    books = held_out(tmp_path, "test", resolve_model("demo"), 33)
    assert len(books.parts[0]) == 33
    assert books.num_tokens == 32 + len(books.parts[1]) - 1

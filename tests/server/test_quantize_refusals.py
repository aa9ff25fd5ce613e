"""`megpt quantize`, used wrongly: told before weights are read, every problem at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.server.quantize_runs import QUICK, Quantize


@pytest.mark.usefixtures("unloadable")
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ((), "give either --scheme"),
        (("--scheme", "int4", "--bits-per-weight", "5"), "not both"),
        (("--scheme", "int3"), "scheme 'int3' is unknown"),
        (("--bits-per-weight", "5", "--mix", "int4,int9"), "scheme 'int9' is unknown"),
        (("--scheme", "int4", "--mix", "int4,int8"), "--mix says what --bits-per-weight may"),
        (("--scheme", "int4", "--exact"), "--exact is about measuring"),
        (("--scheme", "int4", "--tied"), "--tied is about mixes"),
        (("--scheme", "int4", "--rule", "down_proj"), "must be PATTERN=SCHEME"),
        (("--scheme", "int4", "--rule", "*.dwn=int8"), "'*.dwn' matches no layer"),
        (("--scheme", "int4", "--rounding", "best"), "rounding 'best' is unknown"),
        (("--scheme", "int4", "--rounding", "hqq"), "hqq finds zero points"),
        (("--scheme", "fp8", "--rounding", "gptq"), "gptq chooses integers, and fp8 has none"),
        (
            ("--bits-per-weight", "5", "--mix", "int4,bnb-nf4"),
            "bnb-nf4 is for linear layers that bitsandbytes",
        ),
        (("--bits-per-weight", "5", "--rounding", "hqq"), "hqq finds zero points"),
        (("--bits-per-weight", "3"), "takes from 4.128 to 8.117"),
        (("--bits-per-weight", "9"), "takes from 4.128 to 8.117"),
        (("--bits-per-weight", "nan"), "takes from 4.128 to 8.117"),
        (("--bits-per-weight", "4.2", "--rule", "*.down_proj=int8"), "int8 and the rules this model takes"),
        (("--bits-per-weight", "5", "--mix", "int8"), "--bits-per-weight is 5; with int8 this"),
        (("--scheme", "int4", "--rule", "a=int4", "--rule", "a=int8"), "pattern 'a' has two rules, int4 and"),
        (("--scheme", "int4", "--plan"), "--plan writes nothing, so that --out"),
        (("--scheme", "int4", "--seed", "5"), "--seed is of the text that the model writes itself, and none"),
        (("--scheme", "int4", "--seed", "5", "--calibration", __file__), "--seed is of the text that the"),
        (("--scheme", "int4", "--calibrate-tokens", "5"), "--calibrate-tokens is 5; at least 64"),
        (("--scheme", "int4", "--calibration", "no-such-file"), "--calibration no-such-file cannot be read"),
    ],
)
def test_wrong_use_is_told_before_anything_is_loaded(
    quantize: Quantize, tmp_path: Path, words: tuple[str, ...], told: str
) -> None:
    done = quantize(*words, "--out", str(tmp_path / "out"))
    assert done.code == 2
    assert told in done.err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("unloadable")
def test_every_problem_is_told_at_once(quantize: Quantize, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("text")
    done = quantize("--scheme", "int3", "--rule", "x", "--calibration", "none", "--out", str(tmp_path))
    assert done.code == 2
    assert len(done.err.splitlines()) == 5
    for part in ("is not empty", "int3", "PATTERN=SCHEME", "--calibration none"):
        assert part in done.err


@pytest.mark.usefixtures("unloadable")
def test_folders_that_cannot_be_written_are_refused(quantize: Quantize, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    assert "is a file" in quantize("--scheme", "int4", "--out", str(file)).err
    assert f"{file} is not a folder" in quantize("--scheme", "int4", "--out", str(file / "x")).err
    assert "--out DIR is needed" in quantize("--scheme", "int4").err


@pytest.mark.usefixtures("unloadable")
def test_texts_that_are_of_no_use_are_refused(quantize: Quantize, tmp_path: Path) -> None:
    binary, short = tmp_path / "binary", tmp_path / "short"
    binary.write_bytes(b"text \xff\xfe")
    short.write_text("Too short.")
    words = ("--bits-per-weight", "5", "--out", str(tmp_path / "out"))
    done = quantize(*words, "--calibration", str(binary))
    assert done.code == 2
    assert "is not text in UTF-8 (byte 0xff at 5)" in done.err
    done = quantize(*words, "--calibration", str(short))
    assert done.code == 2
    assert "tokens; at least 64 are needed" in done.err
    assert "not both" in quantize(*words, "--calibration", str(short), *QUICK).err


def test_a_quantized_model_is_not_quantized_again(quantize: Quantize, tmp_path: Path) -> None:
    first = tmp_path / "first"
    assert quantize("--scheme", "int8", "--out", str(first)).code == 0
    done = quantize("--scheme", "int4", "--out", str(tmp_path / "second"), model=str(first))
    assert done.code == 2
    assert f"{first} is quantized already" in done.err
    assert not (tmp_path / "second").exists()


def test_a_model_that_is_not_there_is_told(quantize: Quantize, tmp_path: Path) -> None:
    done = quantize("--scheme", "int4", "--out", str(tmp_path / "out"), model="no-such-model")
    assert done.code == 1
    assert "no-such-model" in done.err

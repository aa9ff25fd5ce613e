"""Names of schemes: read, printed, refused."""

from __future__ import annotations

import pytest

from memory_efficient_gpt.errors import ConfigError
from memory_efficient_gpt.quantization.scheme import FP8, INT4, INT8, UNQUANTIZED, Scheme, parse_scheme

NAMES = [
    "int4", "int4-g64", "int4-g128", "int4-asym", "int4-asym-g64", "int4-asym-g128", "int4-channel",
    "int4-asym-channel", "int4-tensor", "int8", "int8-asym", "int8-g32", "int8-g64", "int8-g128",
    "int8-tensor", "int8-asym-tensor", "fp8", "bf16",
    "bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-fp4-dq", "bnb-int8",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_name_comes_back(name: str) -> None:
    assert str(parse_scheme(name)) == name


def test_short_names_are_the_defaults() -> None:
    assert parse_scheme("int4") == INT4 == parse_scheme("int4-g32") == parse_scheme(" INT4-sym ")
    assert parse_scheme("int8") == INT8 == parse_scheme("int8-channel")
    assert parse_scheme("fp8") == FP8
    assert parse_scheme("none") == UNQUANTIZED


@pytest.mark.parametrize(
    "name", ["", "int3", "int4-", "int4-g", "int4g32", "int4-g32-asym", "nf4x", "int16", "nf4", "bnb-int8-dq"]
)
def test_an_unknown_name_is_refused_with_what_would_do(name: str) -> None:
    with pytest.raises(ConfigError, match="Use int4, int8, fp8"):
        parse_scheme(name)


def test_an_unsupported_group_size_is_refused_with_those_that_are() -> None:
    with pytest.raises(ConfigError, match=r"group size 48 in 'int4-g48'.*32, 64, 128"):
        parse_scheme("int4-g48")


@pytest.mark.parametrize(
    ("name", "bits"),
    [("int4", 4.5), ("int4-g128", 4.125), ("int4-asym-g64", 4.5), ("int8", 8 + 16 / 1024), ("bf16", 16.0),
     ("int8-tensor", 8 + 16 / (512 * 1024)), ("fp8", 8 + 16 / 1024)],
)  # fmt: skip
def test_bits_count_scales_and_offsets(name: str, bits: float) -> None:
    assert parse_scheme(name).bits_per_weight(512, 1024) == pytest.approx(bits)


def test_a_short_last_group_has_a_scale_of_its_own() -> None:
    assert INT4.num_groups(33) == 2
    assert Scheme("int", 8).num_groups(33) == 1

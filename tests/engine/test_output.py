"""Text that grows token by token: whole characters, the exact text, exact stops."""

from __future__ import annotations

import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memory_efficient_gpt.loading import bundled_models
from memory_efficient_gpt.output import TextAssembler, TextDelta
from memory_efficient_gpt.tokenizer import Tokenizer
from tests.engine.small_tokenizers import FAMILIES, tokenizer

INTRICATE = "naïve cafe\u0301 東京の空 👍🏽👨‍👩‍👧 \u0e19\u0e49\u0e33 Straße ¡hola! ﷽ \U00010348"
texts = st.text(max_size=40).filter(lambda text: "\x00" not in text)
indices = st.lists(st.integers(0, 10**6), max_size=40)


def assembled(
    ours: Tokenizer, ids: Sequence[int], stop: Sequence[str] = (), **options: bool
) -> list[TextDelta]:
    assembler = TextAssembler(ours, stop, **options)
    return [assembler.push([token_id]) for token_id in ids] + [assembler.finish()]


def joined(deltas: Sequence[TextDelta]) -> str:
    return "".join(delta.text for delta in deltas)


# ---------------------------------------------------------------- the text


@settings(deadline=None, max_examples=300)
@given(indices)
def test_deltas_of_any_tokens_join_to_the_decoded_text(numbers: list[int]) -> None:
    """Random tokens of a byte-level vocabulary: mostly invalid UTF-8."""
    ours = tokenizer("byte_level")
    ids = [number % (ours.vocab_size + 2) for number in numbers]
    assert joined(assembled(ours, ids)) == ours.decode(ids)


@pytest.mark.parametrize("family", FAMILIES)
@settings(deadline=None, max_examples=80)
@given(text=texts)
def test_deltas_of_encoded_text_join_to_the_decoded_text(family: str, text: str) -> None:
    ours = tokenizer(family)
    ids = ours.encode(text)
    assert joined(assembled(ours, ids)) == ours.decode(ids)


@pytest.mark.parametrize("family", ["unigram", "wordpiece", "word_suffix"])
@settings(deadline=None, max_examples=80)
@given(numbers=indices)
def test_deltas_of_any_tokens_without_bytes_join_to_the_decoded_text(family: str, numbers: list[int]) -> None:
    ours = tokenizer(family)
    ids = [number % ours.vocab_size for number in numbers]
    assert joined(assembled(ours, ids)) == ours.decode(ids)


@pytest.mark.parametrize("family", ["byte_level", "sentencepiece", "sentencepiece_first"])
def test_no_delta_ends_inside_a_character(family: str) -> None:
    ours = tokenizer(family)
    ids = ours.encode(INTRICATE, add_special_tokens=False)
    deltas = assembled(ours, ids)
    assert all("\ufffd" not in delta.text for delta in deltas)
    assert joined(deltas) == INTRICATE
    assert len(ids) > len(INTRICATE)  # some characters do take several tokens


def test_bundled_tokenizer_streams_exactly() -> None:
    ours = Tokenizer.load(bundled_models()["demo"])
    ids = ours.encode(INTRICATE)
    assert joined(assembled(ours, ids)) == INTRICATE


@pytest.mark.parametrize("family", ["byte_level", "sentencepiece"])
def test_text_that_ends_inside_a_character_ends_with_a_replacement(family: str) -> None:
    ours = tokenizer(family)
    ids = ours.encode("wind \U00010348", add_special_tokens=False)[:-1]
    deltas = assembled(ours, ids)
    assert joined(deltas[:-1]) == "wind "
    assert deltas[-1].text == "\ufffd"


def test_endless_invalid_bytes_are_not_held_back() -> None:
    ours = tokenizer("byte_level")
    (token_id,) = (i for i in range(ours.vocab_size) if ours.token_bytes(i) == b"\x80")
    deltas = assembled(ours, [token_id] * 50)
    assert all(delta.text == "\ufffd" for delta in deltas[:-1])


def test_space_before_the_first_word_is_kept_only_in_a_continuation() -> None:
    ours = tokenizer("sentencepiece")
    ids = ours.encode("the wind", add_special_tokens=False)
    assert joined(assembled(ours, ids)) == "the wind"
    assert joined(assembled(ours, ids, continues=True)) == " the wind"


def test_special_tokens_are_left_out_unless_asked_for() -> None:
    ours = tokenizer("byte_level")
    ids = ours.apply_chat_template([{"role": "user", "content": "wind"}])
    assert joined(assembled(ours, ids)) == "wind"
    assert joined(assembled(ours, ids, skip_special_tokens=False)) == "<|user|>wind<|end|><|assistant|>"


@pytest.mark.parametrize("family", ["byte_level", "wordpiece"])
def test_cost_of_a_token_does_not_grow_with_the_text(family: str) -> None:
    ours = tokenizer(family)
    ids = ours.encode("the wind was in the trees " * 700, add_special_tokens=False)
    assembler = TextAssembler(ours, ["zzz"])

    def seconds(part: Sequence[int]) -> float:
        rounds = []
        for start in range(0, len(part), 100):
            began = time.perf_counter()
            assembler.push(part[start : start + 100])
            rounds.append(time.perf_counter() - began)
        return min(rounds)

    early = seconds(ids[:1000])
    assembler.push(ids[1000:-1000])
    assert seconds(ids[-1000:]) < 5 * early + 1e-3


# ---------------------------------------------------------------- stop strings


def test_a_stop_string_counts_only_in_the_text_after_min_tokens() -> None:
    ours = tokenizer("byte_level")
    ids = ours.encode("stop and go, stop and go, stop", add_special_tokens=False)
    first = len(ours.encode("stop and", add_special_tokens=False))
    for pieces in ([ids], [[i] for i in ids]):
        assembler = TextAssembler(ours, ("stop",), min_tokens=first, continues=True)
        text = "".join(assembler.push(piece).text for piece in pieces) + assembler.finish().text
        assert text == "stop and go, "


def reference_stop(text: str, stop: Sequence[str]) -> tuple[str, str | None]:
    """Character by character: the first moment at which the text ends with a stop string."""
    for end in range(1, len(text) + 1):
        ending = [s for s in stop if text[:end].endswith(s)]
        if ending:
            longest = max(ending, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(deadline=None, max_examples=300)
@given(
    st.text(st.sampled_from("ab\né😀"), max_size=30),
    st.lists(st.text(st.sampled_from("ab\né😀"), min_size=1, max_size=5), min_size=1, max_size=4),
    st.booleans(),
)
def test_stop_strings_end_the_text_wherever_tokens_divide_it(
    text: str, stop: list[str], include_stop: bool
) -> None:
    ours = tokenizer("byte_level")
    expected, found = reference_stop(text, stop)
    if include_stop and found is not None:
        expected += found
    whole = ours.encode(text)
    by_byte = [ours.encode(character) for character in text]  # other boundaries
    for ids in (whole, [i for part in by_byte for i in part]):
        deltas = assembled(ours, ids, stop, include_stop=include_stop)
        assert joined(deltas) == expected
        assert [d.stop_string for d in deltas if d.stop_string is not None] == ([found] if found else [])


@settings(deadline=None, max_examples=200)
@given(
    st.text(st.sampled_from("ab"), max_size=20), st.lists(st.text("ab", min_size=1, max_size=5), min_size=1)
)
def test_only_what_may_begin_a_stop_string_is_held_back(text: str, stop: list[str]) -> None:
    ours = tokenizer("byte_level")
    assembler = TextAssembler(ours, stop)
    shown = ""
    for number, character in enumerate(text, 1):
        delta = assembler.push(ours.encode(character))
        shown += delta.text
        if delta.stop_string is not None:
            return
        held = text[len(shown) : number]
        assert not held or any(s.startswith(held) for s in stop)


def test_nothing_follows_a_stop_string() -> None:
    ours = tokenizer("byte_level")
    assembler = TextAssembler(ours, ["\n\n"])
    ids = [i for part in ("wind", "\n", "\n", "trees") for i in ours.encode(part)]
    delta = assembler.push(ids)
    assert (delta.text, delta.stop_string) == ("wind", "\n\n")
    assert delta.num_tokens == len(ids) - len(ours.encode("trees"))
    assert assembler.stopped
    assert assembler.push(ids) == TextDelta()
    assert assembler.finish() == TextDelta()


def test_held_text_is_released_at_the_end() -> None:
    ours = tokenizer("byte_level")
    assembler = TextAssembler(ours, ["<STOP>"])
    assert assembler.push(ours.encode("wind <STO")).text == "wind "
    assert assembler.finish() == TextDelta("<STO")


# ---------------------------------------------------------------- offsets


@settings(deadline=None, max_examples=100)
@given(st.text(st.sampled_from("the wind é東😀"), max_size=20), st.integers(1, 5))
def test_offsets_say_where_each_tokens_text_begins(text: str, size: int) -> None:
    ours = tokenizer("byte_level")
    ids = ours.encode(text)
    assembler = TextAssembler(ours, ["zz"])
    offsets: list[int] = []
    for start in range(0, len(ids), size):
        offsets += assembler.push(ids[start : start + size]).offsets
    raw = [b"".join(ours.token_bytes(i) for i in ids[:n]) for n in range(len(ids))]
    assert offsets == [len(part.decode(errors="ignore")) for part in raw]

"""Conversations out of novels."""

import random

from training.chat import conversations, spoken_words

BOOK = """A door opened.

"Well," said he, "what now?"

"Nothing," she answered. "Go home and sleep until the morning comes."

They went home.

"A speech that goes on

"in the next paragraph.\""""


def test_spoken_words_drop_the_narration() -> None:
    assert spoken_words('"Yes," said he. "Come in."') == "Yes. Come in."
    assert spoken_words('"I know," said she,') == "I know."
    assert spoken_words("He said nothing.") is None


def test_spoken_words_refuse_an_open_quotation() -> None:
    assert spoken_words('"A speech that goes on') is None


def test_conversation_alternates_and_ends_with_the_assistant() -> None:
    (text,) = conversations(BOOK, random.Random(1))
    turns = text.replace("<|system|>A door opened.<|end|>", "")
    assert turns == (
        "<|user|>Well, what now?<|end|>"
        "<|assistant|>Nothing. Go home and sleep until the morning comes.<|end|>"
    )

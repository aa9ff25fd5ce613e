"""Turns the dialogue of novels into conversations, and defines the chat format.

Purpose: a model trained on prose alone never learns to end a turn. Runs of spoken paragraphs
    ("Well," said he, "what now?") become alternating user and assistant messages, with the
    narration before them as the system message, so that the chat template below is a format
    which the model has seen.
Doesn't know: token ids (the markers are strings), training.
Invariant: every word of a conversation stands in the book, in the same order.
"""

import random
import re
from collections.abc import Iterator

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SYSTEM = "<|system|>"
USER = "<|user|>"
ASSISTANT = "<|assistant|>"
END = "<|end|>"
SPECIAL_TOKENS = (END_OF_TEXT, PAD, SYSTEM, USER, ASSISTANT, END)

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] in ('system', 'developer') -%}{{ '<|system|>' }}
{%- elif message['role'] == 'user' -%}{{ '<|user|>' }}
{%- elif message['role'] == 'assistant' -%}{{ '<|assistant|>' }}
{%- else -%}{{ raise_exception("role must be system, developer, user or assistant, not " + message['role']) }}
{%- endif -%}
{%- if message['content'] is string -%}{{ message['content'] | trim }}
{%- else -%}{%- for part in message['content'] -%}{{ part['text'] | trim }}{%- endfor -%}
{%- endif -%}{{ '<|end|>' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|assistant|>' }}{%- endif -%}
"""

_QUOTED = re.compile(r'"([^"]+)"')
_MAX_TURNS = 12
_MAX_NARRATION_CHARS = 400


def spoken_words(paragraph: str) -> str | None:
    """What is said in a spoken paragraph, without the narration between; None if nobody speaks.

    A paragraph with an odd number of quotation marks (a speech that goes on in the next one) is None.
    """
    if not paragraph.startswith('"') or paragraph.count('"') % 2:
        return None
    parts = [part.strip() for part in _QUOTED.findall(paragraph)]
    words = " ".join(part for part in parts if part)
    words = re.sub(r",(?= [A-HJ-Z])|,$", ".", words)  # "Yes," said he. "Come in."
    return words or None


def _render(turns: list[str], narration: str, rng: random.Random) -> str:
    """One conversation; the longer speaker is the assistant, narration is kept half of the time."""
    if sum(map(len, turns[0::2])) > sum(map(len, turns[1::2])):
        turns = turns[1:]
    if len(turns) % 2:
        turns = turns[:-1]
    if not turns:
        return ""
    short = narration and len(narration) <= _MAX_NARRATION_CHARS
    text = f"{SYSTEM}{narration}{END}" if short and rng.random() < 0.5 else ""
    for index, turn in enumerate(turns):
        text += f"{ASSISTANT if index % 2 else USER}{turn}{END}"
    return text


def conversations(book: str, rng: random.Random) -> Iterator[str]:
    """Every run of two or more spoken paragraphs of a book as one rendered conversation."""
    narration, turns = "", list[str]()
    for paragraph in [*book.split("\n\n"), ""]:
        words = spoken_words(paragraph.strip())
        if words is not None and len(turns) < _MAX_TURNS:
            turns.append(words)
            continue
        if len(turns) >= 2 and (text := _render(turns, narration, rng)):
            yield text
        turns = [] if words is None else [words]
        narration = paragraph.strip() if words is None else ""

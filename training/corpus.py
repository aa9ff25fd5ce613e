"""Reads the prose corpus: three xz-compressed UTF-8 files of whole books.

Purpose: turn `train.txt.xz`, `valid.txt.xz` and `test.txt.xz` into lists of books.
Doesn't know: tokens, models, chat.
Invariant: a book is stripped of surrounding blank lines and never contains the separator line.
"""

import lzma
from pathlib import Path

SPLITS = ("train", "valid", "test")
SEPARATOR = "<|endoftext|>"


def read_books(corpus: Path, split: str) -> list[str]:
    """The books of one split, in file order.

    Raises: ValueError for an unknown split; FileNotFoundError with the name of the missing file.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    path = corpus / f"{split}.txt.xz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; --corpus must name the folder with {split}.txt.xz")
    with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
        text = file.read()
    lines = f"\n{text}\n".split(f"\n{SEPARATOR}\n")
    return [book for book in (part.strip() for part in lines) if book]


def num_bytes(books: list[str]) -> int:
    """UTF-8 bytes of all books together: the denominator of bits per byte."""
    return sum(len(book.encode()) for book in books)

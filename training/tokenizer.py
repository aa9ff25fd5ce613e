"""Trains the byte-level BPE tokenizer that all bundled models share.

Purpose: 4,096 tokens (special tokens included) from the train split, saved as one tokenizer.json.
Doesn't know: the models; the chat format comes from `training.chat`.
Invariant: decoding the ids of any UTF-8 text gives that text back, byte for byte.
"""

import argparse
import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from training import chat
from training.corpus import read_books

VOCAB_SIZE = 4096
# Line breaks in a token of their own; a word, a number or punctuation takes the space before it.
SPLIT_PATTERN = r"\n+|'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]+|\s+"


def train_tokenizer(books: list[str], vocab_size: int = VOCAB_SIZE) -> Tokenizer:
    """A byte-level BPE over the given books; the special tokens take the first ids."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(chat.SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=True,
    )
    tokenizer.train_from_iterator(books, trainer, length=len(books))
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write tokenizer.json without indentation: it is repeated in every bundled folder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tokenizer.json"
    compact = json.dumps(json.loads(tokenizer.to_str()), ensure_ascii=False, separators=(",", ":"))
    path.write_text(compact, encoding="utf-8")
    return path


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer saved in a folder."""
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def main() -> None:
    """Command line: train on the train split and save."""
    parser = argparse.ArgumentParser(prog="python -m training.tokenizer", description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder with train.txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="folder for tokenizer.json")
    parser.add_argument("--vocab-size", type=int, default=VOCAB_SIZE, help="tokens, special ones included")
    args = parser.parse_args()
    save_tokenizer(train_tokenizer(read_books(args.corpus, "train"), args.vocab_size), args.out)


if __name__ == "__main__":
    main()

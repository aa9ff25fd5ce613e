"""Token streams: prepares them once from the corpus, and samples training windows from them.

Purpose: `train.bin`, `chat.bin` (conversations out of the train books) and `valid.bin`, each a flat
    uint16 array in which END_OF_TEXT stands before every book or conversation and at the end.
Doesn't know: models, losses. Letters: B rows, T tokens of a row.
Invariant: an epoch visits every window of a stream once, from a new random shift.
"""

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer

from training import chat
from training.corpus import num_bytes, read_books
from training.tokenizer import load_tokenizer

END_OF_TEXT_ID = chat.SPECIAL_TOKENS.index(chat.END_OF_TEXT)
STREAMS = ("train", "chat", "valid")


def encode_stream(tokenizer: Tokenizer, texts: list[str]) -> np.ndarray:
    """END_OF_TEXT, text, END_OF_TEXT, text, ... END_OF_TEXT as uint16 [tokens]."""
    parts: list[int] = [END_OF_TEXT_ID]
    for encoding in tokenizer.encode_batch_fast(texts, add_special_tokens=False):
        parts.extend(encoding.ids)
        parts.append(END_OF_TEXT_ID)
    return np.array(parts, dtype=np.uint16)


def prepare(corpus: Path, tokenizer: Tokenizer, out: Path, seed: int) -> dict[str, dict[str, int]]:
    """Write the streams and meta.json (tokens and UTF-8 bytes of each); returns the same numbers."""
    rng = random.Random(seed)
    books = {split: read_books(corpus, split) for split in ("train", "valid")}
    dialogues = [text for book in books["train"] for text in chat.conversations(book, rng)]
    rng.shuffle(dialogues)
    meta = {}
    out.mkdir(parents=True, exist_ok=True)
    for name, texts in {"train": books["train"], "chat": dialogues, "valid": books["valid"]}.items():
        tokens = encode_stream(tokenizer, texts)
        tokens.tofile(out / f"{name}.bin")
        meta[name] = {"tokens": len(tokens), "bytes": num_bytes(texts)}
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")
    return meta


@dataclass(frozen=True)
class Streams:
    """The token streams on one device, int32 [tokens] each, and the bytes of the validation books."""

    train: torch.Tensor
    chat: torch.Tensor
    valid: torch.Tensor
    valid_bytes: int


def load_streams(folder: Path, device: torch.device) -> Streams:
    """Read what `prepare` wrote."""
    meta = json.loads((folder / "meta.json").read_text())
    arrays = {name: np.fromfile(folder / f"{name}.bin", dtype=np.uint16) for name in STREAMS}
    tensors = {name: torch.from_numpy(array.astype(np.int32)).to(device) for name, array in arrays.items()}
    return Streams(tensors["train"], tensors["chat"], tensors["valid"], int(meta["valid"]["bytes"]))


class WindowSampler:
    """Start offsets of windows over the concatenation train + chat, epoch after epoch.

    Each batch holds `chat_rows` windows of the chat stream, the others of the train stream. Not thread-safe.
    """

    def __init__(self, streams: Streams, rows: int, chat_rows: int, length: int, seed: int) -> None:
        if not 0 <= chat_rows < rows:
            raise ValueError(f"chat_rows is {chat_rows}; it must be from 0 to {rows - 1} (rows less one)")
        self._generator = torch.Generator().manual_seed(seed)
        self._length = length
        train, dialogue = len(streams.train), len(streams.chat)
        self._parts = [(0, train, rows - chat_rows), (train, dialogue, chat_rows)]
        self._queues = [torch.empty(0, dtype=torch.long) for _ in self._parts]
        self._device = streams.train.device

    def _epoch(self, base: int, size: int) -> torch.Tensor:
        """Shuffled starts of every window of one stream, from a random shift."""
        span = size - self._length - 1
        if span <= 0:
            raise ValueError(f"a stream has {size} tokens; windows need {self._length + 2} or more")
        shift = int(torch.randint(min(self._length, span), (1,), generator=self._generator))
        starts = torch.arange(base + shift, base + span + 1, self._length)
        return starts[torch.randperm(len(starts), generator=self._generator)]

    def next_batch(self) -> torch.Tensor:
        """Start offsets, int64 [B] on the streams' device."""
        chosen = []
        for index, (base, size, count) in enumerate(self._parts):
            while len(self._queues[index]) < count:
                self._queues[index] = torch.cat([self._queues[index], self._epoch(base, size)])
            chosen.append(self._queues[index][:count])
            self._queues[index] = self._queues[index][count:]
        return torch.cat(chosen).to(self._device)


def main() -> None:
    """Command line: tokenize the train and valid splits."""
    parser = argparse.ArgumentParser(prog="python -m training.data", description=__doc__)
    parser.add_argument(
        "--corpus", type=Path, required=True, help="folder with train.txt.xz and valid.txt.xz"
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder with tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="folder for the .bin files and meta.json")
    parser.add_argument("--seed", type=int, default=0, help="order of the conversations (default 0)")
    args = parser.parse_args()
    meta = prepare(args.corpus, load_tokenizer(args.tokenizer), args.out, args.seed)
    for name, numbers in meta.items():
        tokens, size = numbers["tokens"], numbers["bytes"]
        print(f"{name:6} {tokens:>12,} tokens {size:>12,} bytes {size / tokens:.3f} bytes/token")


if __name__ == "__main__":
    main()

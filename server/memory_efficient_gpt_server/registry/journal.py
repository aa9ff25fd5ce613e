"""What happened lately, for any number of readers.

Purpose: one bounded buffer that everybody reads at their own pace, and continues reading where they were.
Does not know: what happenings mean, HTTP.
Invariant: adding never waits; a reader costs nothing but its place, and learns how many entries it has
missed. An id of another server's life is never taken for one of this.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Final

from memory_efficient_gpt_server.registry.happenings import Happening

MOST_ENTRIES: Final = 1024
_ID: Final = re.compile(r"([0-9a-f]{8})-([0-9]{1,15})")


@dataclass(frozen=True, slots=True)
class Entry:
    """A happening, its number (they count up from 1 without gaps) and its Unix time in seconds."""

    number: int
    time_s: float
    happening: Happening


@dataclass(frozen=True, slots=True)
class News:
    """What a reader gets next. `missed`: entries before the first of these that are gone."""

    missed: int
    entries: tuple[Entry, ...]


class Journal:
    """The last `most_entries` happenings. Used from one event loop. clock: Unix time in seconds."""

    def __init__(self, most_entries: int = MOST_ENTRIES, clock: Callable[[], float] = time.time) -> None:
        self._entries: deque[Entry] = deque(maxlen=most_entries)
        self._clock = clock
        self._life = secrets.token_hex(4)
        self._wakeup = asyncio.Event()
        self.last = 0

    def add(self, happenings: Iterable[Happening]) -> None:
        """Note what has happened, and wake whoever waits for it."""
        before = self.last
        for happening in happenings:
            self.last += 1
            self._entries.append(Entry(self.last, self._clock(), happening))
        if self.last > before:
            self._wakeup.set()
            self._wakeup = asyncio.Event()

    def id_of(self, number: int) -> str:
        """An entry's id for readers."""
        return f"{self._life}-{number}"

    def number_of(self, entry_id: str) -> int | None:
        """The number of an entry that was read earlier; None if no entry of this life has that id.

        Raises ValueError for what is no id at all.
        """
        found = _ID.fullmatch(entry_id)
        if found is None:
            raise ValueError(f"{entry_id[:80]!r} is no id of an event")
        number = int(found[2])
        return number if found[1] == self._life and number <= self.last else None

    async def after(self, number: int) -> News:
        """Everything after the entry `number`; waits until there is something."""
        while self.last <= number:
            await self._wakeup.wait()
        entries = tuple([entry for entry in self._entries if entry.number > number])
        return News(entries[0].number - number - 1, entries)

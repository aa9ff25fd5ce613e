"""Who owns every byte of every device: an immutable ledger.

Purpose: reserve before a load, reconcile with what was measured, release once a process is gone.
Does not know: states, plans, why bytes are wanted.
Invariant: a byte has one owner. Reservations never take more than budget minus headroom; only a measurement
can go beyond, and then `overcommitted_bytes` tells how far.

    reserve -> RESERVED --reconcile--> MEASURED --begin_freeing--> FREEING --release--> gone
                                                                      --lose--> LEAKED --forget_leaks--> gone

FREEING bytes still count as used: a process that is told to end has not ended yet.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Final, TypeAlias

from memory_efficient_gpt_server.registry.variants import MEASURED_KINDS, Amount, Kind, VariantKey

Owner: TypeAlias = VariantKey | str
"""A variant, or the name of something else that holds memory."""


class LedgerError(Exception):
    """The ledger was asked for something impossible: a bug of the caller, or a reservation too large."""


class Stage(StrEnum):
    """How sure an entry's bytes are, and whether they are about to go."""

    RESERVED = "reserved"
    MEASURED = "measured"
    FREEING = "freeing"
    LEAKED = "leaked"


@dataclass(frozen=True, slots=True)
class Budget:
    """Bytes of a device that may be used. `headroom_bytes` of them are kept for what estimates missed."""

    total_bytes: int
    headroom_bytes: int = 0

    @property
    def reservable_bytes(self) -> int:
        """What reservations may take together."""
        return self.total_bytes - self.headroom_bytes


@dataclass(frozen=True, slots=True)
class LedgerEntry:
    """Bytes of one kind that one owner has on one device."""

    owner: Owner
    device: str
    kind: Kind
    stage: Stage
    bytes: int


_Entries: TypeAlias = tuple[LedgerEntry, ...]
_NONE: Final[_Entries] = ()


@dataclass(frozen=True, slots=True)
class Ledger:
    """All entries of all devices. Every method returns a new ledger; none changes this one.

    used, freeing: sums by device that `check_integrity` proves; build a ledger with `empty`.
    """

    budgets: Mapping[str, Budget]
    entries: Mapping[Owner, _Entries]
    used: Mapping[str, int]
    freeing: Mapping[str, int]

    @classmethod
    def empty(cls, budgets: Mapping[str, Budget]) -> Ledger:
        """A ledger of these devices in which nobody owns anything."""
        zero = dict.fromkeys(budgets, 0)
        return cls(dict(budgets), {}, zero, zero)

    # ---- what there is

    def available_bytes(self, device: str) -> int:
        """What can be reserved now. Negative after a measurement that went into the headroom."""
        return self._budget(device).reservable_bytes - self.used[device]

    def overcommitted_bytes(self, device: str) -> int:
        """By how much the device's entries exceed its budget; 0 if they don't."""
        return max(0, self.used[device] - self._budget(device).total_bytes)

    def of(self, owner: Owner) -> _Entries:
        """The owner's entries; none if it has nothing."""
        return self.entries.get(owner, _NONE)

    def held_bytes(self, owner: Owner, device: str) -> int:
        """What the owner has on the device and what is not leaked, freeing bytes included."""
        return self.held_by_device(owner).get(device, 0)

    def held_by_device(self, owner: Owner) -> dict[str, int]:
        """The same for each device: what ending the owner's process gives back."""
        held: dict[str, int] = {}
        for e in self.of(owner):
            if e.stage is not Stage.LEAKED:
                held[e.device] = held.get(e.device, 0) + e.bytes
        return held

    def leaked_bytes(self, device: str) -> int:
        """What stayed on the device after its processes were gone."""
        return sum(
            e.bytes
            for entries in self.entries.values()
            for e in entries
            if e.stage is Stage.LEAKED and e.device == device
        )

    # ---- changes

    def reserve(self, owner: Owner, amounts: Iterable[Amount]) -> Ledger:
        """Book bytes before they are used. Raises LedgerError if a device has not that many left."""
        added = tuple([LedgerEntry(owner, a.device, a.kind, Stage.RESERVED, a.bytes) for a in amounts])
        ledger = self._with(owner, self.of(owner) + added)
        for entry in added:
            if ledger.available_bytes(entry.device) < 0:
                raise LedgerError(
                    f"{owner} can't reserve {entry.bytes} bytes of {entry.device}: "
                    f"{self.available_bytes(entry.device)} are left"
                )
        return ledger

    def reconcile(self, owner: Owner, amounts: Iterable[Amount]) -> Ledger:
        """Replace what the owner had by what was measured, even if the device is overcommitted by it.

        Kinds that nobody measures stay as sure as they were: reserved.
        """
        kept = [e for e in self.of(owner) if e.stage is Stage.LEAKED]
        kept += [LedgerEntry(owner, a.device, a.kind, _stage_of(a.kind), a.bytes) for a in amounts if a.bytes]
        return self._with(owner, tuple(kept))

    def measure(self, owner: Owner, kind: Kind, device: str, size: int) -> Ledger:
        """Replace what the owner had of one kind by `size` measured bytes."""
        kept = [e for e in self.of(owner) if (e.kind, e.device) != (kind, device)]
        if size:
            kept.append(LedgerEntry(owner, device, kind, Stage.MEASURED, size))
        return self._with(owner, tuple(kept))

    def begin_freeing(self, owner: Owner, kinds: Collection[Kind] | None = None) -> Ledger:
        """Mark the owner's entries (of these kinds; None: all) as about to go. They still count as used."""
        return self._with(
            owner,
            tuple(
                [
                    replace(e, stage=Stage.FREEING)
                    if e.stage is not Stage.LEAKED and (kinds is None or e.kind in kinds)
                    else e
                    for e in self.of(owner)
                ]
            ),
        )

    def finish_freeing(self, owner: Owner) -> Ledger:
        """Drop what the living owner has freed."""
        return self._with(owner, tuple([e for e in self.of(owner) if e.stage is not Stage.FREEING]))

    def release(self, owner: Owner) -> Ledger:
        """The owner's process is gone: only earlier leaks remain."""
        return self._with(owner, tuple([e for e in self.of(owner) if e.stage is Stage.LEAKED]))

    def lose(self, owner: Owner) -> Ledger:
        """The owner's process could not be ended: what it holds is leaked, on top of earlier leaks."""
        left = self.held_by_device(owner)
        for entry in self.of(owner):
            if entry.stage is Stage.LEAKED:
                left[entry.device] = left.get(entry.device, 0) + entry.bytes
        return self._with(
            owner,
            tuple([LedgerEntry(owner, d, Kind.LEAKED, Stage.LEAKED, n) for d, n in left.items() if n > 0]),
        )

    def forget_leaks(self, owner: Owner) -> Ledger:
        """The owner's leaked bytes turned out to be free."""
        return self._with(owner, tuple([e for e in self.of(owner) if e.stage is not Stage.LEAKED]))

    def grow(self, owner: Owner, device: str, kind: Kind, change_bytes: int) -> Ledger:
        """Add to (or with a negative number take from) what a living owner has of a kind.

        Never fails for lack of room: callers check `available_bytes`, or report what has happened already.
        Raises LedgerError if the owner has less than is taken.
        """
        had = [e for e in self.of(owner) if (e.kind, e.device) == (kind, device)]
        size = sum([e.bytes for e in had]) + change_bytes
        if size < 0:
            raise LedgerError(f"{owner} has {size - change_bytes} bytes of {kind}, not {-change_bytes}")
        stage = had[0].stage if had else Stage.RESERVED
        kept = [e for e in self.of(owner) if (e.kind, e.device) != (kind, device)]
        if size:
            kept.append(LedgerEntry(owner, device, kind, stage, size))
        return self._with(owner, tuple(kept))

    def with_budget(self, device: str, budget: Budget) -> Ledger:
        """Other limits for a device. Less than is used shows as overcommitted."""
        self._budget(device)
        return replace(self, budgets={**self.budgets, device: budget})

    def check_integrity(self) -> None:
        """Prove the sums and that no entry is negative or in another's name. Raises AssertionError."""
        used, freeing = dict.fromkeys(self.budgets, 0), dict.fromkeys(self.budgets, 0)
        for owner, entries in self.entries.items():
            assert entries, f"{owner} is listed without entries"
            seen = set()
            for e in entries:
                assert e.owner == owner and e.bytes > 0, f"wrong entry {e}"
                seen.add((e.device, e.kind))
                used[e.device] += e.bytes
                if e.stage is Stage.FREEING:
                    freeing[e.device] += e.bytes
            assert len(seen) == len(entries), f"{owner} has two entries for the same bytes"
        assert used == self.used and freeing == self.freeing, "the ledger's sums are wrong"

    def _budget(self, device: str) -> Budget:
        try:
            return self.budgets[device]
        except KeyError:
            raise LedgerError(f"there is no device {device!r}; known: {', '.join(self.budgets)}") from None

    def _with(self, owner: Owner, entries: _Entries) -> Ledger:
        used, freeing = dict(self.used), dict(self.freeing)
        for sign, group in ((-1, self.of(owner)), (1, entries)):
            for e in group:
                if e.device not in used:
                    self._budget(e.device)
                used[e.device] += sign * e.bytes
                if e.stage is Stage.FREEING:
                    freeing[e.device] += sign * e.bytes
        table = {o: old for o, old in self.entries.items() if o != owner}
        if entries:
            table[owner] = entries
        return Ledger(self.budgets, table, used, freeing)


def _stage_of(kind: Kind) -> Stage:
    return Stage.MEASURED if kind in MEASURED_KINDS else Stage.RESERVED

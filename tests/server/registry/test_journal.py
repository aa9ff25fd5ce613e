"""A bounded buffer with any number of readers."""

from __future__ import annotations

import asyncio

import pytest

from memory_efficient_gpt_server.registry.happenings import Happening, HappeningKind
from memory_efficient_gpt_server.registry.journal import Journal


def happening(number: int) -> Happening:
    return Happening(HappeningKind.STATE, {"number": number})


def numbers(news: object) -> list[int]:
    return [entry.number for entry in news.entries]  # type: ignore[attr-defined]


async def test_a_reader_gets_what_comes_after_its_place_with_its_time() -> None:
    journal = Journal(clock=lambda: 1234.5)
    journal.add([happening(1), happening(2)])
    journal.add([happening(3)])
    news = await journal.after(1)
    assert (news.missed, numbers(news)) == (0, [2, 3])
    assert news.entries[0].time_s == 1234.5 and news.entries[0].happening.facts == {"number": 2}


async def test_every_reader_is_woken_and_nothing_is_lost_in_between() -> None:
    journal = Journal()
    readers = [asyncio.create_task(journal.after(0)) for _ in range(3)]
    await asyncio.sleep(0)
    journal.add([happening(1)])
    journal.add([happening(2)])  # before they run
    assert [numbers(await reader) for reader in readers] == [[1, 2]] * 3
    waiting = asyncio.create_task(journal.after(2))
    journal.add([])
    await asyncio.sleep(0.01)
    assert not waiting.done()
    journal.add([happening(3)])
    assert numbers(await waiting) == [3]


async def test_a_slow_reader_learns_how_many_it_has_missed() -> None:
    journal = Journal(most_entries=4)
    journal.add(happening(n) for n in range(10))
    news = await journal.after(2)
    assert (news.missed, numbers(news)) == (4, [7, 8, 9, 10])
    assert (await journal.after(6)).missed == 0


def test_ids_lead_back_to_numbers_of_this_life_only() -> None:
    journal, other = Journal(), Journal()
    journal.add([happening(1), happening(2)])
    other.add([happening(1), happening(2)])
    assert journal.number_of(journal.id_of(2)) == 2 and journal.number_of(journal.id_of(0)) == 0
    assert journal.number_of(other.id_of(2)) is None
    assert journal.number_of(journal.id_of(3)) is None, "it has not happened yet"


@pytest.mark.parametrize(
    "nonsense", ["", "7", "x-1", "00000000-", "00000000--1", "00000000-1\n", "0" * 10_000]
)
def test_what_is_no_id_is_refused(nonsense: str) -> None:
    with pytest.raises(ValueError, match="is no id of an event") as refused:
        Journal().number_of(nonsense)
    assert len(str(refused.value)) < 200

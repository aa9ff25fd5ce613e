"""Who owns the bytes."""

from __future__ import annotations

import random

import pytest

from memory_efficient_gpt_server.registry.ledger import Budget, Ledger, LedgerError, Stage
from memory_efficient_gpt_server.registry.variants import HOST, Amount, Kind

GPU = "cuda:0"


def _ledger(total: int = 100, headroom: int = 10) -> Ledger:
    return Ledger.empty({GPU: Budget(total, headroom), HOST: Budget(50)})


def _weights(size: int, device: str = GPU) -> tuple[Amount, ...]:
    return (Amount(device, Kind.WEIGHTS, size),)


def test_reservations_leave_the_headroom_alone() -> None:
    ledger = _ledger().reserve("a", _weights(90))
    assert ledger.available_bytes(GPU) == 0
    with pytest.raises(LedgerError, match="0 are left"):
        ledger.reserve("b", _weights(1))


def test_a_reservation_that_fails_on_one_device_takes_nothing_of_another() -> None:
    ledger = _ledger()
    with pytest.raises(LedgerError):
        ledger.reserve("a", _weights(10) + _weights(51, HOST))
    assert ledger == _ledger()


def test_a_measurement_beyond_the_budget_is_shown() -> None:
    ledger = _ledger().reserve("a", _weights(60)).reconcile("a", _weights(95))
    assert (ledger.available_bytes(GPU), ledger.overcommitted_bytes(GPU)) == (-5, 0)  # the headroom took it
    ledger = ledger.reconcile("a", _weights(120))
    assert ledger.overcommitted_bytes(GPU) == 20
    assert [e.stage for e in ledger.of("a")] == [Stage.MEASURED]


def test_freeing_bytes_count_until_the_process_is_gone() -> None:
    ledger = _ledger().reserve("a", _weights(60)).begin_freeing("a")
    assert (ledger.used[GPU], ledger.freeing[GPU]) == (60, 60)
    assert ledger.release("a").used[GPU] == 0


def test_what_a_lost_process_holds_stays_booked_adds_up_and_can_be_cleared() -> None:
    ledger = _ledger().reserve("a", _weights(5)).begin_freeing("a").lose("a")
    assert ledger.leaked_bytes(GPU) == ledger.used[GPU] == 5 and ledger.freeing[GPU] == 0
    ledger = ledger.reserve("a", _weights(2)).lose("a")
    assert ledger.leaked_bytes(GPU) == 7
    ledger = ledger.reserve("b", _weights(10)).reserve("c", _weights(3, HOST)).lose("c")
    assert (ledger.leaked_bytes(GPU), ledger.leaked_bytes(HOST)) == (7, 3)
    assert ledger.forget_leaks("a").forget_leaks("c").release("b") == _ledger()


def test_a_new_load_of_a_leaking_owner_keeps_the_leak_apart() -> None:
    ledger = _ledger().reserve("a", _weights(5)).lose("a").reserve("a", _weights(20))
    assert ledger.reconcile("a", _weights(21)).used[GPU] == 26
    assert ledger.held_bytes("a", GPU) == 20
    assert ledger.begin_freeing("a").freeing[GPU] == 20
    assert ledger.release("a").used[GPU] == 5


def test_a_sleeping_owner_frees_only_some_kinds() -> None:
    amounts = (Amount(GPU, Kind.WEIGHTS, 40), Amount(GPU, Kind.CONTEXT, 3))
    ledger = _ledger().reserve("a", amounts).begin_freeing("a", {Kind.WEIGHTS}).finish_freeing("a")
    assert ledger.used[GPU] == 3
    assert ledger.measure("a", Kind.CONTEXT, GPU, 4).used[GPU] == 4
    assert ledger.measure("a", Kind.CONTEXT, GPU, 0).of("a") == ()


def test_bytes_of_a_kind_grow_and_shrink_but_not_below_none() -> None:
    ledger = _ledger().reserve("a", (Amount(GPU, Kind.KV, 30),))
    assert [ledger.grow("a", GPU, Kind.KV, n).used[GPU] for n in (12, -12, -30)] == [42, 18, 0]
    with pytest.raises(LedgerError, match="has 30 bytes"):
        ledger.grow("a", GPU, Kind.KV, -31)


def test_a_smaller_budget_shows_as_overcommitted() -> None:
    ledger = _ledger().reserve("a", _weights(60)).with_budget(GPU, Budget(50))
    assert ledger.overcommitted_bytes(GPU) == 10


def test_an_unknown_device_is_an_error() -> None:
    with pytest.raises(LedgerError, match="no device 'cuda:7'"):
        _ledger().reserve("a", _weights(1, "cuda:7"))
    with pytest.raises(LedgerError, match="no device"):
        _ledger().available_bytes("cuda:7")
    with pytest.raises(LedgerError, match="no device"):
        _ledger().with_budget("cuda:7", Budget(1))


def test_random_operations_keep_the_sums() -> None:
    rng = random.Random(1)
    ledger, before = _ledger(1000, 50), _ledger(1000, 50)
    for _ in range(2000):
        owner, size = rng.choice("abcde"), rng.randint(1, 90)
        old_used = dict(ledger.used)
        before = ledger
        match rng.randrange(7):
            case 0 if not ledger.of(owner) and ledger.available_bytes(GPU) >= size:
                ledger = ledger.reserve(owner, _weights(size))
            case 1:
                ledger = ledger.reconcile(owner, (*_weights(size), Amount(GPU, Kind.KV, size)))
            case 2:
                ledger = ledger.begin_freeing(owner)
            case 3:
                ledger = ledger.release(owner)
            case 4:
                ledger = ledger.lose(owner)
            case 5:
                ledger = ledger.forget_leaks(owner)
            case _:
                ledger = ledger.grow(owner, GPU, Kind.KV, size)
        ledger.check_integrity()
        assert dict(before.used) == old_used, "an old ledger was changed"


def test_the_integrity_check_sees_a_wrong_sum_and_a_second_owner() -> None:
    ledger = _ledger().reserve("a", _weights(60))
    ledger.check_integrity()
    with pytest.raises(AssertionError, match="sums"):
        Ledger(ledger.budgets, ledger.entries, {GPU: 59, HOST: 0}, ledger.freeing).check_integrity()
    with pytest.raises(AssertionError, match="wrong entry"):
        Ledger(ledger.budgets, {"b": ledger.of("a")}, ledger.used, ledger.freeing).check_integrity()

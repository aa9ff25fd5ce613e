"""Order and bounds of waiting, and the brakes."""

from __future__ import annotations

from memory_efficient_gpt_server.registry.load_queue import ChurnGuard, FailureRule, LoadQueue, Waiter
from memory_efficient_gpt_server.registry.variants import VariantKey

A, B = VariantKey("A"), VariantKey("B")


def _queue(*asks: tuple[VariantKey, float]) -> LoadQueue:
    queue = LoadQueue()
    for number, (key, asked_s) in enumerate(asks):
        queue = queue.join(key, Waiter(number, asked_s, asked_s + 30.0))
    return queue


def test_asks_for_one_variant_form_a_group() -> None:
    queue = _queue((A, 0), (B, 1), (A, 2), (B, 3))
    assert [w.id for w in queue.of(A)] == [0, 2]
    assert len(queue) == 4
    assert queue.in_order(4.0, 10.0, lambda key: 0) == [A, B]


def test_priority_comes_first_until_patience_is_over() -> None:
    queue = _queue((A, 0), (B, 1))
    prefer_b = {A: 0, B: 1}
    assert queue.in_order(4.0, 10.0, prefer_b.__getitem__) == [B, A]
    assert queue.in_order(10.5, 10.0, prefer_b.__getitem__) == [A, B]
    assert queue.in_order(11.0, 10.0, prefer_b.__getitem__) == [A, B]  # both impatient: who came first


def test_a_group_vanishes_with_its_last_waiter() -> None:
    queue = _queue((A, 0), (A, 1)).leave(A, 0)
    assert A in queue
    assert A not in queue.leave(A, 1)
    assert queue.leave(A, 99) is queue
    assert A not in queue.without(A)


def test_waiters_expire_at_their_own_deadlines() -> None:
    queue = _queue((A, 0), (B, 5))
    assert [w.id for _, w in queue.expired(30.0)] == [0]
    assert [w.id for _, w in queue.expired(35.0)] == [0, 1]


def test_the_churn_guard_opens_when_the_window_has_passed() -> None:
    guard = ChurnGuard(most_swaps=2, window_s=10.0).swapped(0.0, 1)
    assert guard.wait_s(1.0) == 0.0
    guard = guard.swapped(3.0, 1)
    assert guard.wait_s(4.0) == 6.0
    assert guard.wait_s(10.0) == 0.0


def test_many_swaps_at_once_close_it_until_enough_of_them_are_old() -> None:
    guard = ChurnGuard(most_swaps=2, window_s=10.0).swapped(0.0, 1).swapped(5.0, 2)
    assert guard.wait_s(6.0) == 9.0


def test_pauses_double_and_the_third_strike_lasts_until_one_expires() -> None:
    rule = FailureRule(most=3, expiry_s=900.0)
    strikes: tuple[float, ...] = ()
    pauses = []
    for now_s in (0.0, 10.0, 20.0):
        strikes = rule.struck(strikes, now_s)
        pauses.append(rule.retry_at_s(strikes, now_s) - now_s)
    assert pauses == [1.0, 2.0, 880.0]
    assert rule.out(strikes, 899.0)
    assert not rule.out(strikes, 900.0)


def test_old_failures_are_forgotten() -> None:
    rule = FailureRule(most=3, expiry_s=900.0)
    assert rule.struck((0.0, 10.0), 905.0) == (10.0, 905.0)

"""The waiting queue: fair between clients, first come first served within one."""

from __future__ import annotations

from memory_efficient_gpt.request import Request
from memory_efficient_gpt.sequence import Sequence
from memory_efficient_gpt.waiting import WaitingQueue


def sequence(client: str, order: int) -> Sequence:
    return Sequence(Request(id=f"{client}{order}", prompt_token_ids=(1,), client=client), 0, 0, 9, [1], order)


def queue_of(*sequences: Sequence) -> WaitingQueue:
    queue = WaitingQueue()
    for seq in sequences:
        queue.arrived(seq.request.client, 1)
        queue.add(seq)
    return queue


def drain(queue: WaitingQueue, cost: int) -> list[str]:
    names = []
    while (seq := queue.peek()) is not None:
        names.append(seq.request.id)
        queue.remove(seq)
        queue.charge(seq.request.client, prompt_tokens=cost)
    return names


def test_one_client_is_served_in_order() -> None:
    assert drain(queue_of(*(sequence("a", i) for i in range(3))), cost=5) == ["a0", "a1", "a2"]


def test_clients_take_turns_by_what_they_were_served() -> None:
    queue = queue_of(*(sequence("a", i) for i in range(3)), *(sequence("b", i) for i in range(3, 6)))
    assert drain(queue, cost=5) == ["a0", "b3", "a1", "b4", "a2", "b5"]


def test_a_newcomer_has_no_credit_for_its_idle_past() -> None:
    queue = queue_of(sequence("a", 0), sequence("a", 1), sequence("a", 2))
    queue.charge("a", output_tokens=500)
    late = sequence("b", 3)
    queue.arrived("b", 1)
    queue.add(late)
    assert drain(queue, cost=5)[:2] in (["a0", "b3"], ["b3", "a0"])


def test_counters_of_idle_clients_are_dropped_once_they_change_nothing() -> None:
    queue = queue_of(*(sequence(f"visitor{i}", i) for i in range(100)), sequence("steady", 100))
    queue.charge("steady", output_tokens=10)
    queue.charge("visitor99", output_tokens=500)
    for i in range(100):
        queue.finished(f"visitor{i}")
    assert set(queue._served) == {"steady", "visitor99"}  # that one has had more: it counts if it comes back
    queue.finished("steady")
    assert not queue._served


def test_preempted_sequences_go_first_oldest_first() -> None:
    queue = queue_of(sequence("a", 5))
    for order in (3, 1):
        queue.add_preempted(sequence("b", order))
    assert [s.request.id for s in queue] == ["b1", "b3", "a5"]
    assert drain(queue, cost=1)[0] == "b1"

"""What a request costs its engine: every figure against one that was worked out by hand or another way."""

from __future__ import annotations

import random

import pytest

from memory_efficient_gpt.kv_meter import KvMeter
from memory_efficient_gpt.request import Cost, Request, SamplingParams, SequenceEvent
from tests.engine.scheduler_harness import Harness, prompts
from tests.engine.test_core import make_engine, prompt


class Clock:
    """Stands still until it is set forward."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s

    def wait(self, seconds: float) -> None:
        self.now_s += seconds


def test_memory_is_added_up_over_time() -> None:
    clock = Clock()
    meter = KvMeter(10, clock=clock)
    clock.wait(2)  # in the queue
    meter.started()
    meter.take([1, 2, 3])
    clock.wait(4)  # 3 blocks for 4 s
    meter.give([3])
    clock.wait(1)  # 2 for 1 s
    meter.take([3, 4])
    clock.wait(0.5)  # 4 for half a second
    meter.give([1, 2, 3, 4])
    clock.wait(50)
    assert meter.cost() == Cost(queue_s=2, kv_peak_bytes=40, kv_byte_seconds=10 * (12 + 2 + 2))


def test_blocks_of_several_sequences_count_once() -> None:
    clock = Clock()
    meter = KvMeter(1, clock=clock)
    meter.take([1, 2])
    meter.take([1, 2, 3])
    clock.wait(1)
    meter.give([1, 2])  # the first sequence ends; the second still holds both
    clock.wait(1)
    assert meter.cost().kv_peak_bytes == 3 and meter.cost().kv_byte_seconds == 6


def test_the_queue_is_left_once_and_lasts_until_then() -> None:
    clock = Clock()
    meter = KvMeter(1, clock=clock)
    clock.wait(1)
    assert meter.cost().queue_s == 1
    meter.started()
    clock.wait(5)
    meter.started()  # again after a preemption
    assert meter.cost().queue_s == 1


def test_blocks_that_stand_for_no_memory_give_no_figures() -> None:
    meter = KvMeter(0)
    meter.take([1, 2])
    assert (meter.cost().kv_peak_bytes, meter.cost().kv_byte_seconds) == (None, None)


@pytest.mark.parametrize(("depth", "window", "blocks"), [(0, None, 24), (1, None, 24), (0, 6, 12)])
def test_figures_are_those_of_looking_at_every_block_table_at_every_step(
    depth: int, window: int | None, blocks: int
) -> None:
    """Few blocks, so that sequences are preempted; shared prompts, forks, copies on write, a window."""
    rng = random.Random(depth)
    harness = Harness(num_blocks=blocks, depth=depth, window=window, max_num_seqs=6)
    clock = Clock()
    meters = {f"r{i}": KvMeter(1, clock=clock) for i in range(12)}
    for (name, meter), text in zip(meters.items(), prompts(rng, 12), strict=True):
        harness.submit(name, text, max_tokens=rng.randint(1, 12), n=rng.randint(1, 3), meter=meter)
    seen_seconds, seen_peak = dict.fromkeys(meters, 0.0), dict.fromkeys(meters, 0)
    while harness.scheduler.has_work or harness.pending:
        harness.turn()
        held: dict[str, set[int]] = {name: set() for name in meters}
        for seq in harness.scheduler._running:
            held[seq.request.id] |= set(seq.blocks) - {0}
        clock.wait(1)
        for name, mine in held.items():
            seen_seconds[name] += len(mine)
            seen_peak[name] = max(seen_peak[name], len(mine))
    assert harness.scheduler.stats.num_preemptions > 0
    costs = {name: meter.cost() for name, meter in meters.items()}
    assert {name: cost.kv_byte_seconds for name, cost in costs.items()} == seen_seconds
    for name, cost in costs.items():  # within a step it may be more than between steps
        assert cost.kv_peak_bytes is not None and cost.kv_peak_bytes >= seen_peak[name] > 0


def run_one(metered: bool, tier: str | None = None, **fields: object) -> list[SequenceEvent]:
    engine = make_engine(overlap=False, tier=tier)
    params = SamplingParams(max_tokens=4, ignore_eos=True)
    engine.submit(
        Request(id="r", prompt_token_ids=prompt(1, 10), params=params, metered=metered, **fields)  # type: ignore[arg-type]
    )
    events: list[SequenceEvent] = []
    while engine.has_work:
        events += engine.step()
    return events


def test_an_engine_tells_the_costs_of_those_who_ask() -> None:
    engine = make_engine(overlap=False)
    info = engine.info
    block_bytes = info.kv_cache_bytes // (info.num_kv_blocks + 1)
    costs = [event.cost for event in run_one(metered=True)]
    last = costs[-1]
    assert last is not None and last.kv_byte_seconds is not None and last.kv_byte_seconds > 0
    assert last.kv_peak_bytes == -(-13 // info.block_size) * block_bytes  # the last token needs no place
    assert last.queue_s >= 0 and not last.resumed
    assert {event.cost for event in run_one(metered=False)} == {None}


def test_a_resumed_request_says_so() -> None:
    costs = [event.cost for event in run_one(metered=True, resumed_token_ids=((5, 6),))]
    assert costs and all(cost is not None and cost.resumed for cost in costs)


def test_where_transformers_holds_the_cache_no_memory_is_claimed() -> None:
    costs = [event.cost for event in run_one(metered=True, tier="C")]
    assert costs and all(cost is not None and cost.kv_peak_bytes is None for cost in costs)

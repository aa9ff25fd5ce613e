"""The scheduler against a model that shows every wrong block (scheduler_harness.py)."""

from __future__ import annotations

import random

import pytest

from memory_efficient_gpt.request import FinishReason
from memory_efficient_gpt.sequence import StepOutcome
from tests.engine.scheduler_harness import VOCAB, Harness, alone, prompts


@pytest.mark.parametrize("depth", [0, 1])
def test_a_sequence_ends_at_its_stop_token_or_its_length(depth: int) -> None:
    harness = Harness(depth=depth)
    for number in range(12):
        harness.submit(f"r{number}", [number + 1, 5], max_tokens=25)
    harness.run()
    for number in range(12):
        expected = alone([number + 1, 5], 0, 27)
        assert harness.outputs[f"r{number}", 0] == expected
        reason = FinishReason.LENGTH if len(expected) == 25 else FinishReason.STOP
        assert harness.reasons[f"r{number}", 0] is reason
    assert {FinishReason.LENGTH, FinishReason.STOP} == set(harness.reasons.values())


def test_no_step_exceeds_the_token_budget_and_decodes_go_first() -> None:
    harness = Harness(budget=8, num_blocks=100)
    first = next(t for t in range(1, VOCAB) if len(alone([t, 2], 0, 32)) == 30)
    harness.submit("short", [first, 2], max_tokens=30)
    harness.turn()
    harness.submit("long", [7] * 60, max_tokens=3)
    harness.run()
    assert max(step.num_tokens for step in harness.steps) <= 8
    mixed = [s for s in harness.steps if len(s.chunks) == 2]
    assert mixed and all(s.chunks[0].seq.request.id == "short" for s in mixed)


def test_seen_prompt_is_taken_from_the_prefix_cache_but_for_its_last_token() -> None:
    harness = Harness(budget=100)
    prompt = [3] * 16
    harness.submit("first", prompt, max_tokens=2)
    harness.run()
    harness.submit("second", prompt, max_tokens=2)
    harness.run()
    assert [e.num_cached_tokens for e in harness.first_events] == [0, 12]
    assert harness.outputs["first", 0] == harness.outputs["second", 0]
    assert harness.scheduler.stats.prefix_hits_tokens == 12


def test_cache_salt_keeps_prefixes_apart() -> None:
    harness = Harness(budget=100)
    for name in ("alice", "bob"):
        harness.submit(name, [3] * 16, max_tokens=2, salt=name)
        harness.run()
    assert [e.num_cached_tokens for e in harness.first_events] == [0, 0]


def test_n_sequences_share_the_prompt_and_compute_it_once() -> None:
    harness = Harness(budget=100, prefix_cache=False)
    harness.submit("r", [9] * 18, max_tokens=10, n=4)
    harness.run()
    assert sum(c.num_tokens for s in harness.steps for c in s.chunks if c.start == 0) == 18
    assert sum(len(s.copies) for s in harness.steps) == 3  # the half-full block; its last owner keeps it
    for index in range(4):
        assert harness.outputs["r", index] == alone([9] * 18, index, 28)


def test_a_pool_too_small_for_all_preempts_and_still_gives_every_answer() -> None:
    harness = Harness(num_blocks=16, budget=32)
    for number in range(6):
        harness.submit(f"r{number}", [number + 1] * 9, max_tokens=40)
    harness.run()
    assert harness.scheduler.stats.num_preemptions > 0
    for number in range(6):
        assert harness.outputs[f"r{number}", 0] == alone([number + 1] * 9, 0, 49)


def test_a_heavy_client_does_not_starve_a_light_one() -> None:
    harness = Harness(max_num_seqs=2, budget=64, num_blocks=200)
    for number in range(20):
        harness.submit(f"heavy{number}", [number + 1] * 20, max_tokens=20, client="heavy")
    for _ in range(5):
        harness.turn()
    harness.submit("light", [8, 8], max_tokens=5, client="light")
    while ("light", 0) not in harness.reasons:
        harness.turn()
    served = sum(1 for key in harness.reasons if key[0].startswith("heavy"))
    assert served <= 4
    harness.run()


def chunks_of(harness: Harness, step: int) -> dict[str, int]:
    return {chunk.seq.request.id: chunk.num_tokens for chunk in harness.steps[step].chunks}


def test_prompts_of_one_length_are_computed_one_after_the_other() -> None:
    harness = Harness(budget=64, num_blocks=200)
    for name in ("a", "b", "c"):
        harness.submit(name, [3 + ord(name)] * 64, max_tokens=1)
    harness.run()
    assert [chunks_of(harness, step) for step in range(3)] == [{"a": 64}, {"b": 64}, {"c": 64}]


@pytest.mark.parametrize("waits", [True, False])
def test_a_long_prompt_leaves_room_for_short_ones_and_keeps_a_quarter(waits: bool) -> None:
    harness = Harness(budget=64, num_blocks=400)
    harness.submit("long", [7] * 300, max_tokens=1)
    if not waits:
        harness.turn()
    harness.submit("short", [8] * 10, max_tokens=1)
    harness.submit("middling", [9] * 100, max_tokens=1)
    harness.submit("longer", [10] * 280, max_tokens=1)
    harness.turn()
    assert chunks_of(harness, -1) == {"long": 16, "short": 10, "middling": 38}
    harness.run()
    ends = [event.request_id for event in harness.first_events]
    assert ends.index("short") < ends.index("middling") < ends.index("long")
    assert all(harness.outputs[name, 0] for name in ("long", "short", "middling", "longer"))


def test_a_long_prompt_takes_a_quarter_of_a_step_beside_decodes() -> None:
    harness = Harness(budget=64, num_blocks=100)
    harness.submit("short", [9], max_tokens=30)
    harness.turn()
    harness.submit("long", [7] * 150, max_tokens=1)
    harness.turn()
    assert [c.num_tokens for c in harness.steps[1].chunks] == [1, 16]


def test_waiting_for_room_does_not_hash_the_prompt_in_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    harness = Harness(num_blocks=32, budget=200)
    first = next(t for t in range(1, VOCAB) if len(alone([t] * 60, 0, 100)) == 40)
    harness.submit("first", [first] * 60, max_tokens=40)
    harness.turn()
    harness.submit("second", [5] * 90, max_tokens=2)
    match, lookups = harness.allocator.match, []

    def counted(root: bytes, tokens: list[int]) -> list[tuple[int, bytes]]:
        lookups.append(tokens)
        return match(root, tokens)

    monkeypatch.setattr(harness.allocator, "match", counted)
    for _ in range(20):
        harness.turn()
    assert len(lookups) == 1 and not harness.outputs["second", 0]
    harness.run()
    assert harness.outputs["second", 0] == alone([5] * 90, 0, 92)


def test_prompts_are_charged_when_admitted_so_that_clients_take_turns() -> None:
    harness = Harness(budget=24, max_num_seqs=2, num_blocks=200)
    for number in range(4):
        harness.submit(f"heavy{number}", [number + 1] * 90, max_tokens=2, client="heavy")
    harness.submit("light", [8] * 90, max_tokens=2, client="light")
    harness.run()
    order = list(dict.fromkeys(c.seq.request.id for s in harness.steps for c in s.chunks))
    assert order == ["heavy0", "light", "heavy1", "heavy2", "heavy3"]


def test_unusable_values_are_not_left_in_the_prefix_cache() -> None:
    harness = Harness(budget=100)
    harness.submit("bad", [3] * 16, max_tokens=2)
    step = harness.scheduler.plan()
    assert step is not None
    (event,) = harness.scheduler.commit(step, StepOutcome([1], [False], [None]))
    assert event.finish_reason is FinishReason.ERROR
    harness.submit("good", [3] * 16, max_tokens=2)
    harness.run()
    assert harness.first_events[-1].num_cached_tokens == 0


def test_cache_statistics_count_a_prompt_once_and_only_if_it_may_use_the_cache() -> None:
    harness = Harness(num_blocks=16, budget=32)
    for number in range(6):
        harness.submit(f"r{number}", [number + 1] * 9, max_tokens=40)
    harness.run()
    assert harness.scheduler.stats.num_preemptions > 0
    assert harness.scheduler.stats.prefix_queries_tokens == 6 * 9
    without = Harness(prefix_cache=False)
    without.submit("r", [1] * 9, max_tokens=2)
    without.run()
    assert without.scheduler.stats.prefix_queries_tokens == 0


def test_blocks_outside_the_window_are_freed() -> None:
    harness = Harness(window=6, num_blocks=64, prefix_cache=False)
    harness.submit("r", [4] * 40, max_tokens=1000 // 25)
    most = 0
    while harness.scheduler.has_work:
        harness.turn()
        if harness.outputs["r", 0]:
            most = max(most, 63 - harness.allocator.num_free)
    assert 0 < most <= 4
    assert harness.outputs["r", 0] == alone([4] * 40, 0, 80, window=6)


@pytest.mark.parametrize("index", [None, 0, 1])
@pytest.mark.parametrize("turns", range(6))
def test_abort_frees_blocks_at_once(turns: int, index: int | None) -> None:
    harness = Harness(depth=1, prefix_cache=False, budget=8)
    harness.submit("r", [9] * 18, max_tokens=30, n=3)
    for _ in range(turns):
        harness.turn()
    harness.scheduler.abort("r", index)
    harness.scheduler.check_integrity()
    if index is None:
        assert harness.allocator.num_free == 63 and not harness.scheduler.has_work
    harness.run()
    for other in range(3):
        if index is not None and other != index:
            assert harness.outputs["r", other] == alone([9] * 18, other, 48)


@pytest.mark.parametrize("seed", range(60))
def test_random_traffic_gives_what_each_sequence_gives_alone(seed: int) -> None:
    rng = random.Random(seed)
    window = rng.choice([None, None, 7])
    harness = Harness(
        num_blocks=rng.randint(26, 60),
        block_size=rng.choice([2, 4, 8]),
        max_num_seqs=rng.randint(1, 8),
        budget=rng.randint(1, 40),
        depth=rng.randint(0, 1),
        window=window,
        prefix_cache=rng.random() < 0.7,
    )
    expected: dict[tuple[str, int], list[int]] = {}
    scored: dict[str, list[int]] = {}
    aborted: set[tuple[str, int]] = set()
    for number, prompt in enumerate(prompts(rng, 30, longest=min(30, harness.allocator.block_size * 12))):
        n = rng.choice([1, 1, 1, 2, 4])
        max_tokens = rng.randint(1, 18)
        if len(prompt) + max_tokens > (harness.allocator.num_blocks - 1) * harness.allocator.block_size:
            continue
        name = f"r{number}"
        if rng.random() < 0.3:
            scored[name] = prompt
        harness.submit(name, prompt, max_tokens, n, client=rng.choice("abc"), scored=name in scored)
        for index in range(n):
            expected[f"r{number}", index] = alone(prompt, index, len(prompt) + max_tokens, window)
        for _ in range(rng.randint(0, 6)):
            harness.turn()
        if rng.random() < 0.15:
            request_id, index = rng.choice(list(expected))
            harness.scheduler.abort(request_id, index)
            if (request_id, index) not in harness.reasons:
                aborted.add((request_id, index))
    harness.run()
    for key, tokens in expected.items():
        if key in aborted:
            assert harness.outputs[key] == tokens[: len(harness.outputs[key])]
        else:
            assert harness.outputs[key] == tokens, key
    assert harness.allocator.num_free == harness.allocator.num_blocks - 1
    for name, prompt in scored.items():
        if name in harness.scored:
            got = [entry and (entry.token_id, entry.logprob) for entry in harness.scored[name]]
            assert got == [None, *((prompt[p], -float(p)) for p in range(1, len(prompt)))]
        else:
            assert (name, 0) in aborted

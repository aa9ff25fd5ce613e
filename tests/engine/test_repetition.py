"""Steps planned as repetitions are those that a full plan gives, at random traffic; their layouts, too."""

from __future__ import annotations

import random
import zlib
from typing import Any

import numpy as np
import pytest

from memory_efficient_gpt.repetition import Repetition
from memory_efficient_gpt.sequence import Step, StepOutcome
from memory_efficient_gpt.step_layout import StepLayout, StepTables
from tests.engine.scheduler_harness import FakeRunner, Harness, prompts


class LayingOut(FakeRunner):
    """Keeps what each step is, as it is when it is launched."""

    def __init__(self, max_num_seqs: int, *sizes: Any) -> None:
        super().__init__(*sizes)
        self.tables = StepTables(max_num_seqs, 64, self.size)
        self.steps: list[tuple[Any, ...]] = []
        self.layouts: list[StepLayout] = []
        self.repeated = 0

    def run(self, step: Step) -> StepOutcome:
        self.layouts.append(self.tables.lay_out(step))
        self.repeated += step.first is not None
        chunks = [
            (c.seq.request.id, c.seq.index, c.start, c.num_tokens, c.epoch, tuple(c.seq.blocks))
            for c in step.chunks
        ]
        samples = [(s.seq.request.id, s.seq.index, s.chunk, s.output_index) for s in step.samples]
        self.steps.append((chunks, samples, step.copies, step.num_tokens, step.num_decodes))
        outcome = super().run(step)
        outcome.ok = [zlib.crc32(repr(sample).encode()) % 150 > 0 for sample in samples]  # unusable logits
        return outcome


def traffic(seed: int) -> LayingOut:
    """Random requests until all is done; aborts, unusable logits, limits of memory that move, lost steps."""
    rng = random.Random(seed)
    options: dict[str, Any] = dict(
        num_blocks=rng.randint(26, 60), block_size=rng.choice([2, 4, 8]), max_num_seqs=rng.randint(1, 8),
        budget=rng.randint(4, 40), depth=rng.randint(0, 1), window=rng.choice([None, None, 7]),
        prefix_cache=rng.random() < 0.7,
    )  # fmt: skip
    harness = Harness(**options)
    runner = LayingOut(
        options["max_num_seqs"], options["num_blocks"], options["block_size"], options["window"]
    )
    harness.runner = runner
    for number, prompt in enumerate(prompts(rng, 20, longest=20)):
        n = rng.choice([1, 1, 2, 4])
        harness.submit(
            f"r{number}", prompt, rng.randint(1, 30), n, client=rng.choice("abc"), scored=rng.random() < 0.2
        )
        for _ in range(rng.choice([0, 0, 1, 5, 15])):
            harness.turn()
        if rng.random() < 0.15:
            harness.scheduler.abort(f"r{rng.randint(0, number)}", rng.choice([None, 0]))
        if rng.random() < 0.3:
            allocator = harness.allocator
            allocator.set_limit(max(rng.randint(25, allocator.num_blocks - 1), allocator.num_used))
        if rng.random() < 0.05:  # there was no memory to compute it: all that is open fails
            harness.scheduler.plan()
            harness.scheduler.abort_all()
    harness.run()
    return runner


@pytest.mark.parametrize("seed", range(40))
def test_repeated_steps_are_those_of_a_full_plan(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    quick = traffic(seed)
    with monkeypatch.context() as without:
        without.setattr(Repetition, "next", lambda self: None)
        plain = traffic(seed)
    assert quick.repeated > 5 and plain.repeated == 0
    assert quick.steps == plain.steps
    for ours, theirs in zip(quick.layouts, plain.layouts, strict=True):
        for name in StepLayout.__slots__:
            one, other = getattr(ours, name), getattr(theirs, name)
            assert one.dtype == other.dtype and np.array_equal(one, other), name

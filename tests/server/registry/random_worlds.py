"""What a simulated registry is made of, at random: models, what they take and are really like, policies.

Purpose: the beginnings of random lives.
Does not know: what happens in them.
Invariant: whatever the generator of random numbers says, the values are ones that the registry may be given.
"""

from __future__ import annotations

import random
from dataclasses import replace

from memory_efficient_gpt_server.registry.load_queue import FailureRule
from memory_efficient_gpt_server.registry.records import Policy
from memory_efficient_gpt_server.registry.variants import HOST, Estimate, ModelEntry
from tests.server.registry.fake_workers import Nature


def random_entry(rng: random.Random, model_id: str) -> ModelEntry:
    """A model's settings."""
    return ModelEntry(
        id=model_id,
        source=model_id,
        pinned=rng.random() < 0.1,
        ttl_s=rng.choice((None, None, 8.0, 30.0)),
        min_residency_s=rng.choice((0.0, 0.0, 2.0, 10.0)),
        priority=rng.choice((0, 0, 0, 1, 2)),
        kv_soft_limit_bytes=rng.choice((None, 2, 8)),
        kv_hard_limit_bytes=rng.choice((None, None, 30)),
    )


def random_estimate(rng: random.Random, device: str) -> Estimate:
    """What a variant is thought to take."""
    kv_bytes, moves = rng.randint(0, 25), rng.random() < 0.7
    return Estimate(
        device=device,
        weights_bytes=rng.randint(5, 90),
        kv_bytes=kv_bytes,
        kv_least_bytes=rng.randint(0, kv_bytes) if moves else None,
        kv_most_bytes=kv_bytes + rng.randint(0, 100) if moves else None,
        workspace_bytes=rng.randint(0, 8),
        graphs_bytes=rng.randint(0, 4) if device != HOST else 0,
        context_bytes=rng.randint(1, 5) if device != HOST else 0,
        host_bytes=rng.randint(0, 6),
        can_sleep=(device != HOST or kv_bytes > 0) and rng.random() < 0.8,
    )


def relimited(estimate: Estimate, soft: int | None, hard: int | None) -> Estimate:
    """What the variant takes when it is loaded under these limits."""
    least, most = estimate.kv_least_bytes, estimate.kv_most_bytes
    if least is None or most is None:
        return estimate
    most = max(least, most if hard is None else min(most, hard))
    kv_bytes = min(max(least, estimate.kv_bytes if soft is None else soft), most)
    return replace(estimate, kv_bytes=kv_bytes, kv_most_bytes=max(most, kv_bytes))


def random_nature(rng: random.Random, estimate: Estimate) -> Nature:
    """What it is really like."""
    weights = int(estimate.weights_bytes * rng.choice((0.9, 1.0, 1.0, 1.0, 1.3)))
    return Nature(
        size=replace(estimate, weights_bytes=weights),
        load_s=rng.uniform(0.1, 9.0),
        fails=rng.choice((0.0, 0.0, 0.0, 0.05, 0.05, 0.3, 1.0 if rng.random() < 0.2 else 0.1)),
        crashes=rng.choice((0.0, 0.0, 0.05, 0.2)),
        leaks=rng.choice((0.0, 0.0, 0.2)),
        swells=rng.choice((0.0, 0.0, 0.1, 0.5)),
        frail=rng.choice((0.0, 0.0, 0.05, 0.6)),
    )


def random_policy(rng: random.Random) -> Policy:
    """Bounds and rates."""
    return Policy(
        max_wait_s=rng.choice((10.0, 40.0, 90.0, 300.0)),
        patience_s=rng.choice((0.0, 3.0, 10.0)),
        max_waiters=rng.choice((6, 100)),
        max_loads=rng.choice((1, 2, 4)),
        most_swaps=rng.choice((1, 3, 20)),
        churn_window_s=rng.choice((5.0, 20.0)),
        most_records=rng.choice((2, 256, 256)),
        failures=FailureRule(expiry_s=rng.choice((20.0, 200.0))),
        load_bytes_per_s=10.0,
    )

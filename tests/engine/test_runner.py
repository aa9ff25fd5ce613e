"""Steps that are computed call by call: where calls wait for the next one, and that it changes nothing."""

from __future__ import annotations

from typing import Any

import pytest

from memory_efficient_gpt.fusion.apply import fuse
from memory_efficient_gpt.native.deferral import DeferredKind
from tests.engine.fusion.joining_kernels import JoiningBackend, JoiningKernels
from tests.engine.test_padded_steps import PARAMS, make_engine, run

KINDS: frozenset[DeferredKind] = frozenset(("sums", "turns", "head_norms"))


@pytest.mark.parametrize(("least", "joined"), [(1, "all"), (20, "long steps"), (1000, "none")])
def test_calls_wait_in_large_steps_only_and_tokens_are_the_same(least: float, joined: str) -> None:
    names = list(PARAMS)
    expected = run(make_engine("llama", max_batched_tokens=24), names)
    engine, kernels, backend = make_engine("llama", max_batched_tokens=24), JoiningKernels(), JoiningBackend()
    runner: Any = engine._runner
    fuse(runner._model, kernels)
    runner._backend, runner._defers, runner._defers_from = backend, KINDS, least
    before = kernels.calls["sum_rms_norm"], kernels.calls["rms_norm"]
    assert run(engine, names) == expected
    sums, norms = (
        kernels.calls[name] - count for name, count in zip(("sum_rms_norm", "rms_norm"), before, strict=True)
    )
    most = norms * 4 // 5  # all but the first norm of a pass
    assert sums == 2 * backend.turned
    assert {"all": sums == most, "long steps": 0 < sums < most, "none": sums == 0}[joined]


def test_steps_are_large_by_the_weights_of_a_layer() -> None:
    runner: Any = make_engine("llama")._runner
    weights = sum(p.numel() for p in runner._model.parameters() if p.ndim == 2)
    assert runner._defers_from == pytest.approx(1.5e12 * 2 / weights)

"""Recorded decoding steps: the same tokens and bits as call by call, for every packed architecture."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import load_kernels
from memory_efficient_gpt.request import Request, SamplingParams
from memory_efficient_gpt.step_recordings import MOST_ROWS
from tests.engine.architectures.configs import CASES, VOCAB_SIZE

pytestmark = pytest.mark.skipif(isinstance(load_kernels(), Unavailable), reason="no native kernels")

PACKED = [name for name, case in CASES.items() if case.tier == "B"]


def make_engine(name: str, dtype: torch.dtype = torch.float32, **options: Any) -> Engine:
    settings: dict[str, Any] = dict(num_kv_blocks=500, block_size=4, max_num_seqs=MOST_ROWS + 4)
    model = CASES[name].model()
    torch.nn.Module.to(model, dtype)
    return Engine.from_model(model, EngineConfig(model=name, prefix_cache=False, **(settings | options)))


def replays_of(engine: Engine) -> Any:
    runner: Any = engine._runner
    return runner._replays


def run(
    engine: Engine, requests: int, tokens: int = 14, seed: int = 0, **params: Any
) -> dict[str, list[Any]]:
    """Tokens and logprobs of each request; some join while others decode."""
    rng, results = random.Random(0), dict[str, list[Any]]()
    waiting = [
        Request(
            id=str(number),
            prompt_token_ids=tuple(rng.randrange(3, VOCAB_SIZE) for _ in range(rng.randrange(1, 9))),
            params=SamplingParams(
                max_tokens=tokens + number, ignore_eos=True, logprobs=2, seed=number, **params
            ),
        )
        for number in range(requests)
    ]
    turn = 0
    while engine.has_work or waiting:
        if waiting and (turn % 3 == 0 or not engine.has_work):
            engine.submit(waiting.pop())
        for event in engine.step():
            assert event.error is None, event.error
            results.setdefault(event.request_id, []).append((event.token_ids, event.logprobs))
        turn += 1
    return results


@pytest.mark.parametrize("name", PACKED)
def test_every_architecture_gives_what_it_gives_call_by_call(name: str) -> None:
    expected = run(make_engine(name, record_steps=False), 3, temperature=0.0)
    engine = make_engine(name)
    assert run(engine, 3, temperature=0.0) == expected
    replays = replays_of(engine)
    assert replays.obstacle is None and replays.replayed > 10, replays.obstacle
    assert any("recorded" in note for note in engine.info.notes)


@pytest.mark.parametrize(
    "options", [{"kv_cache_dtype": "int8"}, {"overlap": True}, {"max_batched_tokens": 8}], ids=str
)
def test_settings_change_nothing(options: dict[str, Any]) -> None:
    expected = run(make_engine("llama", torch.bfloat16, record_steps=False, **options), 6, temperature=0.8)
    engine = make_engine("llama", torch.bfloat16, **options)
    assert run(engine, 6, temperature=0.8) == expected
    assert replays_of(engine).replayed > 10


def test_more_sequences_than_are_recorded_are_computed_call_by_call() -> None:
    engine, count = make_engine("llama"), MOST_ROWS + 3
    expected = run(make_engine("llama", record_steps=False), count, tokens=60, temperature=0.0)
    assert run(engine, count, tokens=60, temperature=0.0) == expected
    assert max(kind.step.shape.rows for kind in replays_of(engine)._entries) == MOST_ROWS


def test_a_model_that_decides_by_numbers_it_reads_is_not_recorded() -> None:
    engine = make_engine("llama")
    layer: Any = replays_of(engine)._steps._model.model.layers[1].mlp
    own = type(layer).forward
    layer.forward = lambda x: own(layer, x) if float(x.sum()) > 0 else -own(layer, x)
    replays_of(engine).forget()
    results = run(engine, 3, temperature=0.0)
    assert replays_of(engine).obstacle is not None
    assert len(results) == 3


def test_a_replay_that_differs_is_noticed_before_it_is_used() -> None:
    """Numbers that reach Python by ways that torch does not tell of."""
    expected = run(make_engine("llama", record_steps=False), 2, temperature=0.0)
    engine = make_engine("llama")
    layer: Any = replays_of(engine)._steps._model.model.layers[0].mlp
    own = type(layer).forward
    calls = iter(range(1000))
    layer.forward = lambda x: own(layer, x) + 0.0 * next(calls)  # the same, but never the same call
    replays_of(engine).forget()
    assert run(engine, 2, temperature=0.0) == expected
    layer.forward = lambda x: own(layer, x) * (1.0 + next(calls))
    replays_of(engine).forget()
    run(engine, 2, temperature=0.0)
    assert replays_of(engine).obstacle == "a replay gave other logits than the model's code"


def test_sleep_and_switching_off_drop_what_was_recorded() -> None:
    expected = run(make_engine("llama", record_steps=False), 2, temperature=0.0)
    engine = make_engine("llama")
    assert run(engine, 2, temperature=0.0) == expected
    engine.sleep()
    assert not replays_of(engine)._entries
    engine.wake()
    assert run(engine, 2, temperature=0.0) == expected
    assert replays_of(make_engine("llama", record_steps=False)) is None

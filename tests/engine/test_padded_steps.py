"""Padded steps, which CUDA graphs capture, give what the steps themselves give: tokens, logprobs, draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.fusion.apply import fuse
from memory_efficient_gpt.native.deferral import DeferredKind
from memory_efficient_gpt.padded_steps import PaddedSteps, StepKind
from memory_efficient_gpt.request import Request, SamplingParams
from memory_efficient_gpt.runner import PackedRunner
from memory_efficient_gpt.step_layout import StepLayout
from memory_efficient_gpt.step_shape import Choice, RowsToSample, shape_of
from tests.engine.fusion.joining_kernels import JoiningBackend, JoiningKernels

SIZES: dict[str, Any] = dict(
    vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
)  # fmt: skip
PARAMS = {
    "greedy": {"temperature": 0.0},
    "drawn": {"temperature": 0.9, "seed": 5},
    "filtered": {"temperature": 1.2, "seed": 6, "top_k": 20, "top_p": 0.8},
    "penalized": {"temperature": 0.0, "repetition_penalty": 1.3},
    "held": {"temperature": 0.8, "seed": 9, "min_tokens": 4},
    "with logprobs": {"temperature": 0.7, "seed": 8, "logprobs": 2},
}


class Uncaptured:
    """Stands in for StepGraphs: the same padded steps, call by call."""

    chooses = True

    def __init__(self, steps: PaddedSteps) -> None:
        self.steps = steps
        self.kinds: set[StepKind] = set()

    def run(self, layout: StepLayout, samples: RowsToSample, choice: Choice | None) -> torch.Tensor:
        shape = shape_of(layout)
        assert shape is not None
        kind = StepKind(shape, choice)
        self.kinds.add(kind)
        self.steps.load(layout, samples, shape)
        self.steps.compute(kind)
        return self.steps.result(kind, len(samples.logit_rows)).clone()


def make_engine(kind: str, **options: Any) -> Engine:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any
        if kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**SIZES))
        else:
            model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=8))
    settings: dict[str, Any] = dict(num_kv_blocks=200, block_size=4, max_num_seqs=6, native_kernels=False)
    return Engine.from_model(model, EngineConfig(model=kind, **(settings | options)))


def padded(engine: Engine, defers: frozenset[DeferredKind] = frozenset()) -> Any:
    """Let the engine compute padded steps."""
    runner: Any = engine._runner
    assert isinstance(runner, PackedRunner)
    steps = PaddedSteps(
        runner._model, runner._backend, last_tokens=runner._last_tokens, block_size=4, max_blocks=64,
        defers=defers,
    )  # fmt: skip
    stand_in: Any = Uncaptured(steps)
    runner._replays = stand_in
    return stand_in


def run(engine: Engine, names: list[str]) -> list[list[Any]]:
    for number, name in enumerate(names):
        engine.submit(
            Request(
                id=str(number),
                prompt_token_ids=tuple(range(3, 5 + 7 * number)),
                params=SamplingParams(max_tokens=9 + number, ignore_eos=True, **PARAMS[name]),  # type: ignore[arg-type]
            )
        )
    got: list[list[Any]] = [[] for _ in names]
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            got[int(event.request_id)] += event.token_ids
    return got


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("kind", ["llama", "mistral"])
@pytest.mark.parametrize(
    "names", [["greedy"] * 5, ["greedy", "drawn", "filtered", "drawn"], list(PARAMS)], ids=str
)
def test_padded_steps_give_the_same_tokens(kind: str, names: list[str], overlap: bool) -> None:
    options = {"overlap": overlap, "max_batched_tokens": 24, "debug_checks": True}
    expected = run(make_engine(kind, **options), names)
    engine = make_engine(kind, **options)
    stand_in = padded(engine)
    assert run(engine, names) == expected
    assert {k.shape.decode for k in stand_in.kinds} == {True, False}
    assert any(k.shape.rows > len(names) for k in stand_in.kinds) or len(names) in (1, 2, 4)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_padded_steps_whose_calls_wait_give_the_same_tokens(kind: str) -> None:
    expected = run(make_engine(kind), list(PARAMS))
    engine, kernels, backend = make_engine(kind), JoiningKernels(), JoiningBackend()
    runner: Any = engine._runner
    fuse(runner._model, kernels)
    kernels.calls = dict.fromkeys(kernels.calls, 0)
    runner._backend = backend
    padded(engine, frozenset(("sums", "turns", "head_norms")))
    assert run(engine, list(PARAMS)) == expected
    assert kernels.calls["sum_rms_norm"] == 2 * backend.turned > 0
    assert kernels.calls["rms_norm"] == kernels.calls["sum_rms_norm"] * 5 // 4  # each within one; one alone


def test_each_way_to_choose_is_taken() -> None:
    engine = make_engine("llama")
    stand_in = padded(engine)
    for names in (["greedy"], ["drawn", "filtered", "greedy"], ["penalized"]):
        run(engine, names)
    assert {kind.choice for kind in stand_in.kinds} == {Choice.GREEDY, Choice.DRAW, None}


def test_broken_logits_end_their_request_only() -> None:
    engine = make_engine("llama")
    padded(engine)
    runner: Any = engine._runner
    weight = runner._model.model.embed_tokens.weight
    with torch.no_grad():
        weight[7] = torch.nan
    for name, prompt in (("sound", (3, 4)), ("broken", (7, 4))):
        params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True, logit_bias={7: -100})
        engine.submit(Request(id=name, prompt_token_ids=prompt, params=params))
    failed = set()
    while engine.has_work:
        failed |= {event.request_id for event in engine.step() if event.error is not None}
    assert failed == {"broken"}


def test_several_texts_of_one_prompt_begin_in_a_step_of_one_row() -> None:
    def texts(engine: Engine) -> list[list[int]]:
        got: list[list[int]] = [[] for _ in range(4)]
        for name in "ab":  # the second time the prompt is in the prefix cache but for its last token
            params = SamplingParams(seed=3, n=4, max_tokens=5, ignore_eos=True)
            engine.submit(Request(id=name, prompt_token_ids=tuple(range(3, 12)), params=params))
            while engine.has_work:
                for event in engine.step():
                    assert event.error is None
                    got[event.index] += event.token_ids
        return got

    engine = make_engine("llama")
    padded(engine)
    assert texts(engine) == texts(make_engine("llama"))

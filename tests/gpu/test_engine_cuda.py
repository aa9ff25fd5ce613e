"""The engine on a CUDA device: same tokens as on the CPU, and no hidden waits for the device.

Run on a machine with a GPU: python -m pytest -m gpu tests/gpu
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.request import Request, SamplingParams

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = dict(
    vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
)  # fmt: skip


def make_engine(kind: str, device: str, **options: Any) -> Engine:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any
        if kind == "llama":
            model = LlamaForCausalLM(LlamaConfig(**SHAPE))
        else:
            model = Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=16))
    config = EngineConfig(model=kind, num_kv_blocks=60, debug_checks=True, **options)
    return Engine.from_model(model.to(device).eval(), config)


def requests() -> list[Request]:
    rng = random.Random(0)
    return [
        Request(
            id=str(number),
            prompt_token_ids=tuple(rng.randint(2, 95) for _ in range(5 + 23 * number)),
            params=SamplingParams(
                temperature=0.0, max_tokens=24, ignore_eos=True, repetition_penalty=1.0 + 0.1 * (number % 2)
            ),
        )
        for number in range(8)
    ]


def run(engine: Engine) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for request in requests():
        engine.submit(request)
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            tokens.setdefault(event.request_id, []).extend(event.token_ids)
    return tokens


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("overlap", [True, False])
def test_greedy_tokens_equal_the_cpu_reference(kind: str, overlap: bool) -> None:
    expected = run(make_engine(kind, "cpu", native_kernels=False))
    engine = make_engine(kind, "cuda", overlap=overlap, max_batched_tokens=64)
    assert engine.info.device == "cuda:0"
    assert engine.info.attention_backend == "triton" and "CUDA graphs" in engine.info.notes
    assert run(engine) == expected
    assert run(engine) == expected  # by graphs that the first run has captured
    assert run(make_engine(kind, "cuda", overlap=overlap, cuda_graphs=False)) == expected
    assert run(make_engine(kind, "cuda", overlap=overlap, native_kernels=False)) == expected


def test_all_but_the_first_step_of_a_shape_are_replayed() -> None:
    engine = make_engine("llama", "cuda")
    graphs: Any = engine._runner._replays  # type: ignore[attr-defined]
    run(engine)
    before, steps = graphs.replayed, engine.stats().steps
    run(engine)
    assert (
        graphs.replayed - before >= engine.stats().steps - steps - 2
    )  # some shapes come up for the first time


def test_a_model_that_reads_the_device_is_computed_without_graphs(caplog: pytest.LogCaptureFixture) -> None:
    expected = run(make_engine("llama", "cuda"))
    engine = make_engine("llama", "cuda")
    layer: Any = engine._runner._model.model.layers[1].mlp  # type: ignore[attr-defined]
    own = type(layer).forward
    layer.forward = lambda x: own(layer, x) if float(x.float().abs().sum()) >= 0 else x
    assert run(engine) == expected
    assert "No CUDA graphs" in caplog.text
    assert torch.randn(8, device="cuda").isfinite().all()  # the failed capture has left nothing behind


def test_small_pool_preempts_and_changes_nothing() -> None:
    expected = run(make_engine("llama", "cpu", native_kernels=False))
    engine = make_engine("llama", "cuda", block_size=4, max_model_len=220)
    assert run(engine) == expected
    assert engine.stats().num_preemptions > 0


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_launch_never_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine("llama", "cuda")
    run(engine)  # kernels are loaded
    for request in requests():
        engine.submit(request)
    launch = engine._runner.launch

    def watched(step: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return launch(step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(engine._runner, "launch", watched)
    while engine.has_work:
        engine.step()


def test_bundled_model_writes_text_in_bfloat16() -> None:
    engine = Engine.load(EngineConfig(model="demo", device="cuda"))
    engine.submit(
        Request(
            id="r", prompt_token_ids=(5, 6, 7), params=SamplingParams(seed=1, max_tokens=32, ignore_eos=True)
        )
    )
    count = 0
    while engine.has_work:
        count += sum(len(event.token_ids) for event in engine.step())
    assert count == 32 and engine.info.dtype == "bfloat16"

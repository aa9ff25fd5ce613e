"""Engines on a CUDA device that sleep: the device is empty meanwhile, and nothing is different afterwards.

Run on a machine with a GPU: python -m pytest -m gpu -s tests/gpu/test_sleep_cuda.py
"""

from __future__ import annotations

import gc
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.parking import ParkedStorages
from memory_efficient_gpt.quantization import QuantizedModel
from memory_efficient_gpt.request import Request, SamplingParams

pytestmark = pytest.mark.gpu

SHAPE: dict[str, Any] = dict(
    vocab_size=4096, hidden_size=1024, intermediate_size=2816, num_hidden_layers=6, num_attention_heads=16,
    num_key_value_heads=4, max_position_embeddings=2048, initializer_range=0.1,
)  # fmt: skip
PROMPTS = tuple(range(5, 300)), (7, 8, 9), tuple(range(2000, 1500, -1))
NEARLY_NOTHING = 16 << 20
"""Bytes: what the runner keeps between steps, and workspaces of kernels."""
FEW_BLOCKS = 128 << 20
"""Bytes of torch's blocks (20 MiB each, where tensors are of a few) that such things may lie in."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16()
    model.save_pretrained(made)
    del model
    free()
    return made


def free() -> None:
    """So that what is allocated is what engines hold."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    torch.cuda.empty_cache()


def run(engine: Engine) -> list[tuple[list[int], list[float]]]:
    """Greedy tokens and the log probabilities of the twenty likeliest, to the last bit."""
    told: dict[str, tuple[list[int], list[float]]] = {str(n): ([], []) for n in range(len(PROMPTS))}
    for number, prompt in enumerate(PROMPTS):
        params = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, logprobs=20)
        engine.submit(Request(id=str(number), prompt_token_ids=prompt, params=params))
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            told[event.request_id][0].extend(event.token_ids)
            for entry in event.logprobs or ():
                told[event.request_id][1].extend(logprob for _, logprob in entry.top)
    return list(told.values())


CASES: list[dict[str, Any]] = [
    {},
    {"overlap": False},
    {"quantization": "int4-g128"},
    {"quantization": "int8", "kv_cache_dtype": "int8"},
    {"quantization": "fp8-dynamic", "kv_cache_dtype": "fp8"},
    {"quantization": "int4-g128", "native_kernels": False},
    {"quantization": "bnb-nf4-dq"},
    {"quantization": "bnb-int8"},
    {"tier": "C"},
]


@pytest.mark.parametrize("options", CASES, ids=str)
def test_the_device_is_empty_while_it_sleeps_and_nothing_differs_afterwards(
    options: dict[str, Any], folder: Path
) -> None:
    if str(options.get("quantization")).startswith("bnb"):
        pytest.importorskip("bitsandbytes")
    free()
    others = torch.cuda.memory_allocated()
    sizes: dict[str, Any] = {} if options.get("tier") == "C" else {"kv_cache_bytes": 64 << 20}
    engine = Engine.load(
        EngineConfig(
            model=str(folder), device="cuda", max_model_len=1024, prefix_cache=False, **sizes, **options
        )
    )
    try:
        before = run(engine)
        free()
        awake = torch.cuda.memory_allocated() - others
        assert awake >= engine.info.weights_bytes + engine.info.kv_cache_bytes
        report = engine.sleep()
        left = torch.cuda.memory_allocated() - others
        assert left < NEARLY_NOTHING, f"{left:,} of {awake:,} bytes are still on the device"
        assert report.parked_bytes >= engine.info.weights_bytes and report.pinned
        assert report.device_bytes == torch.cuda.memory_reserved()
        began = time.perf_counter()
        engine.wake()
        wake_s = time.perf_counter() - began
        assert abs(torch.cuda.memory_allocated() - others - awake) < NEARLY_NOTHING
        after = run(engine)
        if engine.info.tier == "C":  # torch chooses its products anew, which may round differently
            first, again = ([row[1][0] for row in rows] for rows in (before, after))
            assert again == pytest.approx(first, abs=0.05)
        else:
            assert after == before, "it computes something else"
        took = f"slept in {report.seconds:.3f} s, woke in {wake_s:.3f} s"
        Console().print(f"\n{options}: {awake:,} bytes awake, {left:,} asleep; {took}")
    finally:
        engine.close()
        del engine
        free()


@pytest.fixture(scope="module")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A model whose weights are many of torch's blocks: 0.9 GB, 0.2 GB in int4."""
    made = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_hidden_layers": 40})).bfloat16()
    model.save_pretrained(made)
    del model
    free()
    yield made
    shutil.rmtree(made)


@pytest.mark.parametrize("way", ["as they are", "quantized at load", "quantized before"])
def test_torch_keeps_little_more_than_a_model_takes_awake_and_nearly_nothing_asleep(
    way: str, deep_folder: Path, tmp_path: Path
) -> None:
    """What torch has reserved is gone for others, whether or not anything lies in it."""
    from memory_efficient_gpt.triton_kernels import linear

    folder = deep_folder
    options: dict[str, Any] = {"quantization": "int4-g128"} if way == "quantized at load" else {}
    if way == "quantized before":
        quantized = QuantizedModel.from_pretrained(str(folder), scheme="int4-g128", device="cuda")
        folder = tmp_path / "int4"
        quantized.save_pretrained(folder)
        del quantized
    linear._workspaces.clear()  # as in a new process: where they are made is what matters
    free()
    others = torch.cuda.memory_reserved()
    engine = Engine.load(
        EngineConfig(model=str(folder), device="cuda", max_model_len=1024, kv_cache_bytes=64 << 20, **options)
    )
    try:
        run(engine)
        free()
        taken = engine.info.weights_bytes + engine.info.kv_cache_bytes
        awake = torch.cuda.memory_reserved() - others
        report = engine.sleep()
        left = torch.cuda.memory_reserved() - others
        Console().print(f"\n{taken:,} bytes of weights and cache; reserved {awake:,} awake, {left:,} asleep")
        assert report.device_bytes == torch.cuda.memory_reserved()
        assert awake <= taken + 2 * FEW_BLOCKS
        assert left <= FEW_BLOCKS
    finally:
        engine.close()
        del engine
        free()


def test_host_memory_is_unlocked_also_if_nobody_restores() -> None:
    """Memory that is freed while it is page-locked makes later copies from its addresses fail."""
    parked = ParkedStorages([torch.zeros(1 << 22, device="cuda").untyped_storage()])
    assert parked.pinned
    host, cudart = parked._host, torch.cuda.cudart()
    del parked
    gc.collect()
    assert int(cudart.cudaHostRegister(host.data_ptr(), host.numel(), 0)) == 0, "it is locked still"
    assert int(cudart.cudaHostUnregister(host.data_ptr())) == 0


def test_the_prefix_cache_is_not_believed_after_a_sleep(folder: Path) -> None:
    free()
    engine = Engine.load(
        EngineConfig(model=str(folder), device="cuda", max_model_len=1024, kv_cache_bytes=64 << 20)
    )
    before = run(engine)
    engine.sleep()
    assert engine.stats().num_cached_blocks == 0
    engine.wake()
    assert [tokens for tokens, _ in run(engine)] == [tokens for tokens, _ in before]
    engine.close()
    del engine
    free()


def test_many_sleeps_leave_nothing_behind(folder: Path) -> None:
    free()
    engine = Engine.load(
        EngineConfig(model=str(folder), device="cuda", max_model_len=1024, kv_cache_bytes=64 << 20)
    )
    engine.sleep()
    engine.wake()
    awake, resident = torch.cuda.memory_allocated(), _resident_bytes()
    for _ in range(5):
        engine.sleep()
        engine.wake()
    assert torch.cuda.memory_allocated() == awake
    assert _resident_bytes() - resident < engine.info.weights_bytes, "the host keeps copies"
    engine.close()
    del engine
    free()


def _resident_bytes() -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024

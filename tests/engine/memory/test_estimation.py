"""What is predicted is what EngineInfo says after a load."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from memory_efficient_gpt import assembly, loading
from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.engine_info import EngineInfo
from memory_efficient_gpt.errors import (
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from memory_efficient_gpt.loading import load_config, load_model, resolve_model
from memory_efficient_gpt.memory import MemoryEstimate, estimate, estimate_config
from memory_efficient_gpt.memory.workspace import WORKER_BYTES
from memory_efficient_gpt.quantization.checkpoint import save_quantized
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import quantize_model
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.scheme import parse_scheme
from tests.engine.architectures.configs import PACKED, UNPACKED, Case

BUNDLED = ("demo", "demo-mha", "demo-draft")
SMALL = ("llama", "llama_bias_tied", "qwen3", "gpt2", "gemma3_text", "mistral", "mixtral", "gpt_oss")
SCHEMES = (None, "int4", "int8", "int4-g128")
CASES = {case.name: case for case in (*PACKED, *UNPACKED)}

Saved = Callable[[str], str]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The folder of a small model of `architectures/configs.py`, written once."""
    folders: dict[str, str] = {}

    def folder_of(name: str) -> str:
        if name not in folders:
            folder = tmp_path_factory.mktemp(name)
            _model(CASES[name]).save_pretrained(folder)
            folders[name] = str(folder)
        return folders[name]

    return folder_of


def _model(case: Case) -> Any:
    return case.model().bfloat16()


def both(config: EngineConfig) -> tuple[MemoryEstimate, EngineInfo]:
    predicted = estimate(config)
    engine = Engine.load(config)
    engine.close()
    return predicted, engine.info


def assert_equal(predicted: MemoryEstimate, info: EngineInfo) -> None:
    """Exactly, not only within the 5% that users may count on."""
    assert predicted.weights_bytes == info.weights_bytes
    assert predicted.kv_cache_bytes == info.kv_cache_bytes
    assert (predicted.tier, predicted.dtype, predicted.device) == (info.tier, info.dtype, info.device)
    assert predicted.max_model_len == info.max_model_len
    assert predicted.kv_cache_dtype == info.kv_cache_dtype
    assert predicted.quantization == info.quantization


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "int8"])
@pytest.mark.parametrize("quantization", SCHEMES)
@pytest.mark.parametrize("model", BUNDLED)
def test_bundled_models_take_what_was_predicted(model: str, quantization: Any, kv_cache_dtype: Any) -> None:
    config = EngineConfig(
        model=model, quantization=quantization, kv_cache_dtype=kv_cache_dtype, max_num_seqs=4
    )
    assert_equal(*both(config))


@pytest.mark.parametrize("quantization", [*SCHEMES, "int4-asym-g64", "int8-asym", "fp8"])
@pytest.mark.parametrize("name", SMALL)
def test_small_models_take_what_was_predicted(saved: Saved, name: str, quantization: Any) -> None:
    kv_cache_dtype: Any = "int8" if quantization in ("int4", "fp8") else "auto"
    config = EngineConfig(
        model=saved(name), quantization=quantization, kv_cache_dtype=kv_cache_dtype, max_num_seqs=4
    )
    assert_equal(*both(config))


@pytest.mark.parametrize("quantization", [None, "int4"])
@pytest.mark.parametrize("name", ["bloom", "gptj", "mamba"])
def test_models_that_run_unpacked_have_their_cache_in_the_workspace(
    saved: Saved, name: str, quantization: Any
) -> None:
    predicted, info = both(EngineConfig(model=saved(name), quantization=quantization))
    assert_equal(predicted, info)
    assert predicted.kv_cache_bytes == 0 and predicted.tier == "C"
    assert predicted.workspace_bytes > 0


@pytest.mark.parametrize("options", [
    {"num_kv_blocks": 50}, {"kv_cache_bytes": 1 << 20}, {"block_size": 32, "max_num_seqs": 3},
    {"max_model_len": 100}, {"dtype": "float32"}, {"native_kernels": False, "quantization": "int4"},
    {"tier": "C", "quantization": "int4"}, {"kv_cache_bytes": 1 << 16},
])  # fmt: skip
def test_every_option_that_sizes_something_counts(options: dict[str, Any]) -> None:
    predicted, info = both(EngineConfig(model="demo-draft", **options))
    assert_equal(predicted, info)


@pytest.mark.parametrize("scheme", ["int4", "int8-g64", "int4-asym-g64"])
@pytest.mark.parametrize("name", ["demo-draft", "gpt2", "llama", "mixtral"])
def test_saved_quantized_folders_take_what_was_predicted(
    saved: Saved, tmp_path: Path, name: str, scheme: str
) -> None:
    source = Path(saved(name)) if name in CASES else resolve_model(name)
    model = load_model(source, load_config(source), dtype=torch.bfloat16, device=torch.device("cpu"))
    quantize_model(model, uniform_plan(find_layers(model), parse_scheme(scheme)))
    save_quantized(model, tmp_path / "out", source=source)
    config = EngineConfig(model=str(tmp_path / "out"), max_num_seqs=4)
    assert_equal(*both(config))
    again = EngineConfig(model=str(tmp_path / "out"), quantization="fp8")
    with pytest.raises(ConfigError, match=f"quantized already, as {scheme}; fp8 was asked for"):
        estimate(again)


LIBRARY_CHECKPOINTS = Path(__file__).parent.parent / "quantization" / "foreign" / "checkpoints"


@pytest.mark.parametrize("name", sorted(path.name for path in LIBRARY_CHECKPOINTS.iterdir()))
def test_checkpoints_of_other_libraries_take_what_was_predicted(name: str) -> None:
    config = EngineConfig(model=str(LIBRARY_CHECKPOINTS / name), max_num_seqs=4)
    assert_equal(*both(config))


@pytest.mark.parametrize("scheme", ["bnb-nf4", "bnb-nf4-dq", "bnb-int8"])
def test_bitsandbytes_is_predicted_within_five_percent(scheme: str, tmp_path: Path) -> None:
    """Its own packing for some CPUs halves or undoes scales."""
    pytest.importorskip("bitsandbytes")
    predicted, info = both(EngineConfig(model="demo", quantization=scheme, num_kv_blocks=20))
    assert predicted.weights_bytes == pytest.approx(info.weights_bytes, rel=0.05)
    assert predicted.quantization == info.quantization == scheme


def test_a_bitsandbytes_checkpoint_is_predicted_by_its_headers(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    source = resolve_model("demo")
    settings = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    from_pretrained(source, quantization_config=settings, dtype=torch.bfloat16).save_pretrained(tmp_path)
    predicted, info = both(EngineConfig(model=str(tmp_path), num_kv_blocks=20))
    assert predicted.weights_bytes == pytest.approx(info.weights_bytes, rel=0.05)
    assert predicted.kv_cache_bytes == info.kv_cache_bytes
    assert predicted.quantization == "bitsandbytes"
    with pytest.raises(ConfigError, match="quantized already, as bitsandbytes"):
        estimate(EngineConfig(model=str(tmp_path), quantization="int4"))


def test_no_weight_is_read_and_it_takes_no_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(*_: Any, **__: Any) -> Any:
        raise AssertionError("weights were read")

    monkeypatch.setattr(loading, "load_model", read)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", read)
    monkeypatch.setattr("safetensors.torch.load_file", read)
    seconds = []
    for _ in range(3):  # other programs share the machine
        started = time.perf_counter()
        estimate(EngineConfig(model="demo", quantization="int4"))
        seconds.append(time.perf_counter() - started)
    assert min(seconds) < 3


# ---- the automatic cache follows what is free


def test_the_pool_follows_the_free_bytes_that_are_given() -> None:
    config = EngineConfig(model="demo")
    plenty, little = (estimate(config, free_bytes=free) for free in (64 << 30, 160 << 20))
    assert plenty.max_model_len == little.max_model_len == 2048
    assert little.kv_cache_bytes <= 0.3 * (160 << 20) < plenty.kv_cache_bytes


@pytest.mark.parametrize(
    ("options", "taken"),
    [
        ({}, 0),  # the weights stay in the file's pages
        ({"quantization": "int4"}, 3_275_264),
        ({"dtype": "float32"}, 2 * 9_968_128),
    ],
)
def test_a_cache_that_free_memory_limits_takes_what_was_predicted(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], taken: int
) -> None:
    config = EngineConfig(model="demo", **options)
    left = 60_000_000
    monkeypatch.setattr(assembly, "free_memory_bytes", lambda _: left)
    info = Engine.load(config).info
    assert info.kv_cache_bytes <= 0.3 * left
    assert_equal(estimate(config, free_bytes=left + taken + WORKER_BYTES), info)


def test_a_pool_that_shortens_the_context_is_said() -> None:
    short = estimate(EngineConfig(model="demo"), free_bytes=WORKER_BYTES + 9_000_000)
    assert short.max_model_len < 2048
    assert any(f"context limited to {short.max_model_len} tokens" in note for note in short.notes)


def test_without_any_room_one_request_is_counted() -> None:
    none = estimate(EngineConfig(model="demo"), free_bytes=0)
    assert none.kv_cache_bytes == (2048 // 16 + 1) * 16 * 6 * 2 * 2 * 32 * 2  # layers, kv, heads, size, bytes
    assert any("free memory leaves no room" in note for note in none.notes)


# ---- an 8B model, from its shape alone


def llama_8b() -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False, max_position_embeddings=131072,
        dtype="bfloat16",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("quantization", "weights"), [(None, 16_060_522_496), ("int4-g128", 4_650_431_488)], ids=str
)
def test_an_8b_model_takes_what_was_measured_on_an_h100(quantization: Any, weights: int) -> None:
    config = EngineConfig(model="8b", quantization=quantization, max_model_len=8192, max_num_seqs=1)
    found = estimate_config(llama_8b(), config, device=torch.device("cuda"), free_bytes=80 * 10**9)
    assert found.weights_bytes == weights
    assert found.kv_cache_bytes == (8192 // 64 + 1) * 64 * 32 * 2 * 8 * 128 * 2
    assert found.device == "cuda"
    assert (found.load_peak_bytes > weights) == any("quantized while loading" in n for n in found.notes)


def test_quantizing_while_loading_needs_a_gpu_with_room_for_a_few_float_weights_only() -> None:
    config = EngineConfig(model="8b", quantization="int4-g128", max_model_len=8192, max_num_seqs=1)
    found = estimate_config(llama_8b(), config, device=torch.device("cuda"), free_bytes=80 * 10**9)
    head = 128256 * 4096
    assert found.load_peak_bytes == found.weights_bytes + 2 * (2 * head) + (512 << 20) + 12 * (1 << 25)
    assert found.load_peak_bytes < 8 * 10**9, "it would not fit a GPU of 8 GB"


GRANULES = 64 * (2 << 20)
"""One granule in each tensor of the 8B model; it holds 16 blocks of 64 tokens."""


@pytest.mark.parametrize("bindings", [True, False])
def test_a_cache_that_moves_on_a_gpu_counts_what_is_mapped(
    bindings: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memory_efficient_gpt.kv_cache.pool_size._has_cuda_bindings", lambda: bindings)
    sizes: dict[str, Any] = dict(model="8b", max_model_len=8192, max_num_seqs=1)
    device = torch.device("cuda", 0)

    def kv(**options: Any) -> MemoryEstimate:
        return estimate_config(
            llama_8b(), EngineConfig(**sizes, **options), device=device, free_bytes=80 * 10**9
        )

    fixed, elastic = kv(), kv(kv_reserve_bytes=60 * 10**9)
    assert fixed.kv_can_move is elastic.kv_can_move is bindings
    assert fixed.kv_cache_bytes == fixed.kv_context_bytes == 129 * GRANULES // 16
    whole = 9 * GRANULES if bindings else fixed.kv_cache_bytes
    assert elastic.kv_cache_bytes == elastic.kv_context_bytes == whole, "the reserve counts nothing"
    given = kv(kv_reserve_bytes=60 * 10**9, kv_cache_bytes=3 * GRANULES - 1)
    assert given.kv_cache_bytes == (2 * GRANULES if bindings else (3 * 16 - 1) * GRANULES // 16)
    assert not kv(kv_reserve_bytes=60 * 10**9, kv_cache_bytes=GRANULES - 1).kv_can_move


def test_native_and_triton_layouts_are_padded_each_in_its_way() -> None:
    shape = CASES["llama"].config()
    config = EngineConfig(model="small", quantization="int4-g128", num_kv_blocks=8)
    cpu, cuda = (
        estimate_config(shape, config, device=torch.device(name), free_bytes=1 << 30)
        for name in ("cpu", "cuda")
    )
    assert cuda.weights_bytes > 1.5 * cpu.weights_bytes  # inputs and outputs to 128: sides are 64 and 96


# ---- what cannot be loaded is refused alike


def test_bad_folders_are_refused_as_loading_does(tmp_path: Path, saved: Saved) -> None:
    cut = tmp_path / "cut"
    cut.mkdir()
    for file in Path(saved("llama")).iterdir():
        (cut / file.name).write_bytes(file.read_bytes()[: 2000 if file.suffix == ".safetensors" else None])
    (tmp_path / "empty").mkdir()
    cases = {str(cut): CheckpointError, str(tmp_path / "empty"): CheckpointError, "none": ModelNotFoundError}
    for model, error in cases.items():
        config = EngineConfig(model=model)
        with pytest.raises(error) as predicted:
            estimate(config)
        with pytest.raises(error) as loaded:
            Engine.load(config)
        assert str(predicted.value) == str(loaded.value)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"quantization": "int3"}, ConfigError),
        ({"max_model_len": 5000}, ConfigError),
        ({"kv_cache_dtype": "fp8"}, ConfigError),
        ({"kv_cache_bytes": 10}, ConfigError),
        ({"device": "tpu"}, ConfigError),
    ],
)
def test_impossible_settings_are_refused_as_loading_does(options: dict[str, Any], error: type) -> None:
    config = EngineConfig(model="demo-draft", **options)
    with pytest.raises(error) as predicted:
        estimate(config)
    with pytest.raises(error) as loaded:
        Engine.load(config)
    assert str(predicted.value) == str(loaded.value)


def test_architectures_that_cannot_be_served_are_refused(saved: Saved, tmp_path: Path) -> None:
    bloom = EngineConfig(model=saved("bloom"), tier="B")
    with pytest.raises(UnsupportedModelError, match="tier B was asked for"):
        estimate(bloom)


# ---- hub ids


def test_a_hub_id_is_planned_from_its_descriptions(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[list[str]] = []

    def snapshot(repo_id: str, *, allow_patterns: list[str], **_: Any) -> str:
        asked.append(allow_patterns)
        (tmp_path / "config.json").write_text((resolve_model("demo") / "config.json").read_text())
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    found = estimate(EngineConfig(model="org/name", max_num_seqs=4))
    assert asked == [["*.json"]]
    assert found.weights_bytes == 9_968_128
    assert any("not downloaded yet" in note for note in found.notes)

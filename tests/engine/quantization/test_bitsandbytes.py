"""bitsandbytes' formats: right tokens, bits and bytes; gradients, copies and checkpoints; clear refusals."""

from __future__ import annotations

import copy
import itertools
import logging
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, MixtralConfig

from memory_efficient_gpt.config import EngineConfig
from memory_efficient_gpt.core import Engine
from memory_efficient_gpt.errors import ConfigError, UnsupportedModelError
from memory_efficient_gpt.fusion.apply import fuse
from memory_efficient_gpt.quantization.bitsandbytes import left_alone, prepare
from memory_efficient_gpt.quantization.bitsandbytes_linear import (
    BitsAndBytesModule,
    EightBit,
    FourBit,
    _no_downloaded_kernels,
    bitsandbytes_modules,
)
from memory_efficient_gpt.quantization.checkpoint import save_quantized
from memory_efficient_gpt.quantization.layers import find_layers
from memory_efficient_gpt.quantization.model import (
    present_schemes,
    quantize_model,
    quantized_modules,
    report_of,
    weight_bytes,
)
from memory_efficient_gpt.quantization.plans import uniform_plan
from memory_efficient_gpt.quantization.rounding import quantize_weight
from memory_efficient_gpt.quantization.scheme import parse_scheme
from tests.engine.quantization.test_engine import PROMPTS, greedy_tokens, reference_tokens
from tests.engine.quantization.test_model import TINY, logits, tiny

FOUR_BIT = ["bnb-nf4", "bnb-nf4-dq", "bnb-fp4", "bnb-fp4-dq"]
SCHEMES = [*FOUR_BIT, "bnb-int8"]
WIDE: dict[str, Any] = {**TINY, "hidden_size": 128, "intermediate_size": 192}
"""Sides in multiples of 64, as 4-bit formats need them."""
ENGINE: dict[str, Any] = dict(num_kv_blocks=12, block_size=8, max_batched_tokens=16, max_model_len=64)


@pytest.fixture
def bnb() -> Any:
    return pytest.importorskip("bitsandbytes", reason="the optional extra `quant` is not installed")


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    torch.manual_seed(0)
    make: Any = AutoModelForCausalLM
    model = make.from_config(LlamaConfig(**WIDE | changes), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model.train(False)


def stored(scheme: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = llama(dtype, **changes)
    quantize_model(model, uniform_plan(find_layers(model), parse_scheme(scheme)))
    return model


def float_weight(bnb: Any, module: Any) -> torch.Tensor:
    """The weight by bitsandbytes' own reckoning, not rounded; of a module that is not packed."""
    if isinstance(module, FourBit):
        weight: Any = module.weight
        state = copy.copy(weight.quant_state)
        state.dtype = torch.float32
        dense: torch.Tensor = bnb.functional.dequantize_4bit(weight.data, state)
    else:
        dense = bnb.functional.int8_vectorwise_dequant(module.state.CB, module.state.SCB)
    return dense


def dequantized(bnb: Any, model: Any) -> Any:
    """An ordinary float model with the numbers of the quantized one."""
    plain = llama(model.dtype, attention_bias=model.config.attention_bias)
    own = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        if name in own and own[name].dtype is parameter.dtype:
            parameter.data = own[name].data
    for name, module in model.named_modules():
        if isinstance(module, BitsAndBytesModule):
            plain.get_submodule(name).weight.data = float_weight(bnb, module).to(model.dtype)
        elif module in quantized_modules(model):
            plain.get_submodule(name).weight.data = module.weight
    return plain


@pytest.mark.parametrize("scheme", FOUR_BIT)
def test_the_engine_gives_the_tokens_of_the_dequantized_model(bnb: Any, scheme: str) -> None:
    model = stored(scheme, attention_bias=True)
    plain = dequantized(bnb, model)
    want = [reference_tokens(plain, prompt, 8) for prompt in PROMPTS]
    engine = Engine.from_model(model, EngineConfig(model="tiny", native_kernels=False, **ENGINE))
    # float32 multiplies dequantized weights, as the plain model does: the tokens are the same ones.
    assert greedy_tokens(engine, PROMPTS, 8) == want
    assert engine.info.quantization == scheme
    assert engine.info.weights_bytes == weight_bytes(model) < weight_bytes(plain) / 2
    assert sum("docs/quantization.md" in note for note in engine.info.notes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_logits_are_those_of_the_dequantized_model(bnb: Any, scheme: str, dtype: torch.dtype) -> None:
    model = stored(scheme, dtype)
    want = logits(dequantized(bnb, model))
    prepare(model)
    # float32: sums in another order. int8 rounds activations to 8 bits: 0.7% of each layer's result.
    # bfloat16: one rounding of 2^-9 a layer, and packed 4-bit weights have scales of bfloat16.
    limit = 0.08 if scheme == "bnb-int8" else 1e-5 if dtype is torch.float32 else 0.03
    assert float((logits(model) - want).norm() / want.norm()) <= limit


def test_int8_rounds_each_row_by_itself(bnb: Any) -> None:
    model = stored("bnb-int8")
    module = next(iter(bitsandbytes_modules(model)))
    x = torch.randn(5, module.num_inputs) * torch.tensor([[1.0], [30.0], [0.1], [9.0], [0.0]])
    with torch.inference_mode():
        together = module(x)
        alone = torch.cat([module(row) for row in x.split(1)])
    assert torch.equal(together, alone)
    weight = float_weight(bnb, module).float()
    assert float((together - x @ weight.t()).norm() / together.norm()) < 0.02


@pytest.mark.parametrize(
    ("scheme", "bits"),
    [("bnb-nf4", 4.5), ("bnb-fp4", 4.5), ("bnb-nf4-dq", 4 + 8 / 64 + 32 / (64 * 256)),
     ("bnb-fp4-dq", 4 + 8 / 64 + 32 / (64 * 256)), ("bnb-int8", 8 + 32 / 256)],
)  # fmt: skip
def test_bits_are_those_of_bitsandbytes_own_tensors(bnb: Any, scheme: str, bits: float) -> None:
    parsed = parse_scheme(scheme)
    assert str(parsed) == scheme and parsed.by_bitsandbytes
    assert parsed.bits_per_weight(256, 256) == pytest.approx(bits)
    model = stored(scheme, hidden_size=256, head_dim=64)
    module = next(m for m in bitsandbytes_modules(model) if (m.num_outputs, m.num_inputs) == (256, 256))
    tables = {FourBit: 4 * 16, EightBit: 0}[type(module).__mro__[1]]  # type: ignore[index]
    tables += 4 * 256 + 4 if parsed.nested else 0
    assert module.scheme == parsed
    assert module.weight_bytes - tables == round(bits * 256 * 256 / 8)


def test_reports_count_every_byte(bnb: Any) -> None:
    model = llama()
    report = quantize_model(model, uniform_plan(find_layers(model), parse_scheme("bnb-nf4")))
    assert report.bytes_after == weight_bytes(model) and report.saved > 0.7
    assert {str(scheme) for scheme in report.schemes.values()} == {"bnb-nf4", "int8"}
    assert not any("proj" in name for name in report.kept)
    again = report_of(model)
    assert (again.bytes_before, again.bytes_after) == (report.bytes_before, report.bytes_after)
    assert again.kept == report.kept and present_schemes(model) == {parse_scheme("bnb-nf4")}


def test_layers_of_other_shapes_stay_as_they_are_and_are_reported(bnb: Any) -> None:
    model = llama(intermediate_size=112)
    layers, scheme = find_layers(model), parse_scheme("bnb-nf4")
    quantize_model(model, uniform_plan(layers, scheme))
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is nn.Linear
    assert isinstance(model.get_submodule("model.layers.0.mlp.up_proj"), FourBit)
    (note,) = left_alone(layers, scheme)
    assert note.startswith("2 weights are not stored as bnb-nf4") and "multiples of 64" in note
    assert left_alone(layers, parse_scheme("bnb-int8")) == ()
    assert logits(model).isfinite().all()


def test_experts_stay_as_they_are(bnb: Any) -> None:
    make: Any = AutoModelForCausalLM
    model = make.from_config(MixtralConfig(**WIDE, num_local_experts=4), dtype=torch.float32)
    layers, scheme = find_layers(model), parse_scheme("bnb-int8")
    quantize_model(model, uniform_plan(layers, scheme))
    assert len(bitsandbytes_modules(model)) == 8 and "not stacked experts" in left_alone(layers, scheme)[0]


def test_what_bitsandbytes_cannot_hold_is_refused(bnb: Any, tmp_path: Path) -> None:
    scheme = parse_scheme("bnb-nf4")
    with pytest.raises(UnsupportedModelError, match=r"no layer of this model can be bnb-nf4: .*transposed"):
        uniform_plan(find_layers(tiny("gpt2")), scheme)
    model = llama()
    with pytest.raises(ConfigError, match=r"lm_head cannot be stored as bnb-nf4: .*not output heads"):
        quantize_model(model, uniform_plan(find_layers(model), scheme, rules={"lm_head": scheme}))
    with pytest.raises(ConfigError, match="bnb-nf4 is for linear layers that bitsandbytes holds"):
        quantize_weight(torch.randn(64, 64), scheme)
    with pytest.raises(ConfigError, match="can't be saved by this library"):
        save_quantized(stored("bnb-nf4"), tmp_path / "saved")
    model = llama()
    model.model.layers[0].mlp.up_proj.weight.data[3, 5] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        quantize_model(model, uniform_plan(find_layers(model), scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradients_are_right_after_inference_too(bnb: Any, scheme: str) -> None:
    model = stored(scheme, torch.bfloat16)
    module: Any = next(iter(bitsandbytes_modules(model)))
    weight = float_weight(bnb, module).float()
    prepare(model)
    x = torch.randn(3, module.num_inputs, dtype=torch.bfloat16, requires_grad=True)
    weight_gradient = torch.randn(3, module.num_outputs, dtype=torch.bfloat16)
    module(x).backward(weight_gradient)
    want = weight_gradient.float() @ weight
    assert x.grad is not None
    assert float((x.grad.float() - want).norm() / want.norm()) < 0.01  # bfloat16's rounding


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_model_that_ran_has_the_state_of_one_that_did_not(bnb: Any, scheme: str) -> None:
    model = stored(scheme, torch.bfloat16)
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    weights = [float_weight(bnb, module).float() for module in bitsandbytes_modules(model)]
    prepare(model)
    got = model.state_dict()
    assert want.keys() == got.keys()
    assert all(torch.equal(got[name], want[name]) for name in want if name.endswith("weight"))
    for module, weight in zip(bitsandbytes_modules(model), weights, strict=True):
        error = (float_weight(bnb, module).float() - weight).norm() / weight.norm()
        assert float(error) < 0.005  # scales were in bfloat16, nested ones are quantized anew


@pytest.mark.parametrize("scheme", SCHEMES)
def test_copies_and_dtypes_are_independent(bnb: Any, scheme: str) -> None:
    model = stored(scheme, torch.bfloat16)
    prepare(model)
    want = logits(model)
    copied = copy.deepcopy(model)
    held = {id(m) for m in model.modules()}
    assert all(getattr(m.weight, "module", None) is None for m in bitsandbytes_modules(copied))
    assert not any(id(m) in held for m in copied.modules())
    for parameter in model.parameters():
        parameter.data.zero_()
    assert torch.equal(logits(copied), want)
    copied.to(torch.float32)
    assert copied(torch.arange(5)[None]).logits.dtype is torch.float32
    assert float((logits(copied) - want).norm() / want.norm()) < 0.05  # bfloat16 against float32
    copied.to("meta")
    assert all(m.weight.is_meta and all(t.is_meta for t in m.statistics())
               for m in bitsandbytes_modules(copied))  # fmt: skip


@pytest.mark.parametrize("scheme", SCHEMES)
def test_native_kernels_around_these_layers_change_nothing_but_rounding(bnb: Any, scheme: str) -> None:
    model = stored(scheme)
    want = logits(model)
    report = fuse(model)
    assert all(isinstance(m, BitsAndBytesModule) for n, m in model.named_modules() if n.endswith("up_proj"))
    if report.unavailable is None:
        assert report.replaced["rms_norm"] == 5
    # The head is our int8: its kernel rounds activations to 8 bits.
    assert float((logits(model) - want).norm() / want.norm()) < 0.03


def test_seeds_are_promised_no_more_than_holds(bnb: Any) -> None:
    def notes(dtype: torch.dtype) -> str:
        engine = Engine.from_model(stored("bnb-nf4", dtype), EngineConfig(model="tiny", **ENGINE))
        return "; ".join(engine.info.notes)

    assert "bitsandbytes computes some layers in bfloat16: near ties, a seed's text" in notes(torch.bfloat16)
    assert "near ties" not in notes(torch.float32)


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)


@pytest.mark.usefixtures("absent")
def test_without_bitsandbytes_the_error_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"pip install 'memory-efficient-gpt\[quant\]'"):
        Engine.load(EngineConfig(model="/nowhere", quantization="bnb-nf4"))
    model = llama()
    with pytest.raises(UnsupportedModelError, match="need bitsandbytes, which is not installed"):
        quantize_model(model, uniform_plan(find_layers(model), parse_scheme("bnb-int8")))
    model.config.quantization_config = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    model.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"pip install 'memory-efficient-gpt\[quant\]'"):
        Engine.load(EngineConfig(model=str(tmp_path)))
    assert prepare(llama()) == ()


def test_importing_downloads_no_kernels(bnb: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "bitsandbytes")
    monkeypatch.delitem(sys.modules, "kernels", raising=False)
    with _no_downloaded_kernels(), pytest.raises(ImportError):
        import kernels  # type: ignore[import-not-found]  # noqa: F401
    assert "kernels" not in sys.modules


CHECKPOINTS: dict[str, dict[str, Any]] = {
    "bnb-nf4": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "bnb-nf4-dq": dict(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
    "bnb-fp4": dict(load_in_4bit=True, bnb_4bit_quant_storage=torch.bfloat16),
    "bnb-int8": dict(load_in_8bit=True),
}


def saved_by_transformers(folder: Path, config: dict[str, Any], **changes: Any) -> Any:
    """A folder written as people do it: load with BitsAndBytesConfig, save."""
    llama(torch.bfloat16, **changes).save_pretrained(folder / "float")
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained
    model = from_pretrained(
        folder / "float", quantization_config=BitsAndBytesConfig(**config), dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )  # fmt: skip
    model.save_pretrained(folder / "saved")
    return model


@pytest.mark.parametrize("scheme", CHECKPOINTS)
def test_a_checkpoint_of_transformers_loads_as_it_is(
    bnb: Any, tmp_path: Path, scheme: str, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("accelerate", reason="transformers needs it for these checkpoints")
    source = saved_by_transformers(tmp_path, CHECKPOINTS[scheme])
    folder = str(tmp_path / "saved")
    with caplog.at_level(logging.WARNING):
        engine = Engine.load(EngineConfig(model=folder, dtype="float32", **ENGINE))
    assert "weights are not used" not in caplog.text
    info = engine.info
    assert (info.quantization, info.dtype) == (scheme, "float32")
    assert info.weights_bytes < 0.7 * 4 * sum(p.numel() for p in llama().parameters())
    module: Any
    for name, module in source.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            got = engine._runner._model.get_submodule(name)  # type: ignore[attr-defined]
            assert torch.equal(got.weight.data.view(torch.uint8), module.weight.data.view(torch.uint8)), name
    assert any("chosen over all sequences" in note for note in info.notes) == (scheme == "bnb-int8")
    tokens = greedy_tokens(engine, PROMPTS, 6)
    plain = dequantized(bnb, engine._runner._model)  # type: ignore[attr-defined]
    want = [reference_tokens(plain, prompt, 6) for prompt in PROMPTS]
    same = [a == b for a, b in zip(itertools.chain(*tokens), itertools.chain(*want), strict=True)]
    # float32 multiplies dequantized weights; int8 rounds activations, after which near ties may go elsewhere.
    assert sum(same) >= (len(same) if scheme != "bnb-int8" else len(same) // 2)


def test_a_checkpoint_in_bfloat16_runs_packed(bnb: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers needs it for these checkpoints")
    saved_by_transformers(tmp_path, CHECKPOINTS["bnb-nf4"])
    folder = str(tmp_path / "saved")
    engine = Engine.load(EngineConfig(model=folder, quantization="bnb-nf4", **ENGINE))
    assert engine.info.dtype == "bfloat16" and engine.info.quantization == "bnb-nf4"
    modules = bitsandbytes_modules(engine._runner._model)  # type: ignore[attr-defined]
    packed = [isinstance(m, FourBit) and m.is_packed for m in modules]
    assert all(packed) == any(packed) == bool(bnb.functional.has_avx512bf16())
    assert engine.info.weights_bytes == weight_bytes(engine._runner._model)  # type: ignore[attr-defined]
    assert len(greedy_tokens(engine, PROMPTS, 4)) == len(PROMPTS)
    with pytest.raises(ConfigError, match="is quantized already, as bnb-nf4; int4 was asked for"):
        Engine.load(EngineConfig(model=folder, quantization="int4"))


def test_a_checkpoint_that_a_cpu_computes_wrongly_is_refused(bnb: Any, tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers needs it for these checkpoints")
    saved_by_transformers(tmp_path, CHECKPOINTS["bnb-nf4"], intermediate_size=112)
    with pytest.raises(UnsupportedModelError, match="down_proj has 112 inputs, no multiple of 64"):
        Engine.load(EngineConfig(model=str(tmp_path / "saved")))

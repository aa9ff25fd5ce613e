"""The library's announced API: quantized models, flash attention and the paged cache if available."""

from __future__ import annotations

import json
import logging
import runpy
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from memory_efficient_gpt.attention import use_flash_attention_if_available
from memory_efficient_gpt.choice import Choice
from memory_efficient_gpt.errors import (
    ContextLengthError,
    InvalidRequestError,
)
from memory_efficient_gpt.kv_cache import use_paged_kv_cache_if_available
from memory_efficient_gpt.loading import bundled_models
from memory_efficient_gpt.native.build import Unavailable
from memory_efficient_gpt.native.ops import load_kernels
from memory_efficient_gpt.quantization import QuantizedModel
from memory_efficient_gpt.quantization.model import quantized_modules
from tests.engine.architectures.configs import CASES

DOCS = Path(__file__).parents[2] / "docs" / "library.md"
SNIPPET = """\
from memory_efficient_gpt.quantization import QuantizedModel
from memory_efficient_gpt.attention import use_flash_attention_if_available
from memory_efficient_gpt.kv_cache import use_paged_kv_cache_if_available

model = QuantizedModel.from_pretrained("demo", bits=4)
use_flash_attention_if_available(model)
use_paged_kv_cache_if_available(model)
print(model.generate("Hello, I am a language model.", max_new_tokens=40))
"""
PROMPTS = ["Hello, I am a language model.", "It was a dark night when", "“Who is there?” cried the old"]
IDS = torch.arange(4, 32).view(2, 14)
POOL: dict[str, Any] = dict(num_kv_blocks=200, progress=False)


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 with random weights that make greedy texts decisive, and the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    config = GPT2Config(
        n_embd=64, n_layer=2, n_head=4, n_positions=128, vocab_size=4096, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    model = GPT2LMHeadModel(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(std=parameter.shape[0] ** -0.5 if parameter.shape[0] < 4096 else 0.3)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(bundled_models()["demo"] / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def plain() -> QuantizedModel:
    """Exact to float32's rounding, so that greedy texts have no near ties; transformers generates."""
    return QuantizedModel.from_pretrained("demo", bits=16, dtype="float32", **POOL)


@pytest.fixture(scope="module")
def paged() -> QuantizedModel:
    """The same with the paged cache."""
    model = QuantizedModel.from_pretrained("demo", bits=16, dtype="float32", **POOL)
    assert use_paged_kv_cache_if_available(model).available
    return model


@pytest.fixture(params=["plain", "paged"])
def model(request: pytest.FixtureRequest) -> QuantizedModel:
    """Either of the two."""
    loaded: QuantizedModel = request.getfixturevalue(request.param)
    return loaded


def logits(model: Any, ids: torch.Tensor = IDS, **inputs: Any) -> torch.Tensor:
    with torch.inference_mode():
        result: torch.Tensor = model(ids, **inputs).logits
    return result


@pytest.mark.parametrize("name", ["demo", "demo-mha", "tiny"])
def test_the_announced_program_runs_word_for_word(
    name: str, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "program.py"
    program.write_text(SNIPPET.replace('"demo"', repr(str(tiny_folder)) if name == "tiny" else f'"{name}"'))
    run = runpy.run_path(str(program))
    printed = capsys.readouterr().out
    assert printed.startswith("Hello, I am a language model.")  # what follows is drawn, and may end at once
    greedy = run["model"].generate("Hello, I am a language model.", max_new_tokens=40, do_sample=False)
    assert isinstance(greedy, str) and len(greedy) > 60
    assert run["model"].report.saved > 0.5


def test_the_announced_program_is_in_the_documentation() -> None:
    assert SNIPPET in DOCS.read_text(encoding="utf-8")


def test_a_text_comes_back_with_its_continuation_and_a_list_as_a_list(model: QuantizedModel) -> None:
    text = model.generate(PROMPTS[1], max_new_tokens=8, do_sample=False)
    assert text.startswith(PROMPTS[1]) and len(text) > len(PROMPTS[1])
    several: Any = [[PROMPTS[1]], (PROMPTS[1],)]
    assert [model.generate(texts, max_new_tokens=8, do_sample=False) for texts in several] == [[text]] * 2
    assert model.generate([], max_new_tokens=8) == []


def test_greedy_texts_are_the_same_with_and_without_the_paged_cache(
    plain: QuantizedModel, paged: QuantizedModel
) -> None:
    assert plain.info.tier == "C" and paged.info.tier == "B"
    texts = plain.generate(PROMPTS, max_new_tokens=30, do_sample=False)
    assert paged.generate(PROMPTS, max_new_tokens=30, do_sample=False) == texts
    assert len(set(texts)) == len(PROMPTS)


def test_a_list_gives_what_each_text_gives_alone(paged: QuantizedModel) -> None:
    options: dict[str, Any] = dict(max_new_tokens=25, seed=3, temperature=0.9)
    assert paged.generate(PROMPTS, **options) == [paged.generate(p, **options) for p in PROMPTS]


def test_ids_are_continued_as_transformers_continues_them(model: QuantizedModel) -> None:
    assert model.tokenizer is not None
    inputs: Any = model.tokenizer(PROMPTS, return_tensors="pt", padding=True, padding_side="left")
    transformers_model: Any = model.model
    want = transformers_model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert torch.equal(model.generate(**inputs, max_new_tokens=12, do_sample=False), want)
    without_mask = model.generate(inputs["input_ids"], max_new_tokens=12, do_sample=False)
    assert torch.equal(without_mask, want)


def test_an_ended_row_keeps_its_end_token_and_is_padded() -> None:
    module: Any = CASES["llama"].model()
    greedy = module.generate(IDS, max_new_tokens=6, do_sample=False)
    module.generation_config.eos_token_id, module.generation_config.pad_token_id = int(greedy[0, 17]), 3
    want = module.generate(IDS, max_new_tokens=6, do_sample=False)
    assert want[0, -1] == 3 and want[1, -1] != 3  # else this test would show nothing
    model = QuantizedModel.from_model(module, num_kv_blocks=64)
    for _ in range(2):
        assert torch.equal(model.generate(IDS, max_new_tokens=6, do_sample=False), want)
        use_paged_kv_cache_if_available(model)


def test_the_same_seed_repeats_a_text_and_options_reach_the_sampler(model: QuantizedModel) -> None:
    texts = {model.generate(PROMPTS[0], max_new_tokens=12, seed=5, temperature=1.2) for _ in range(3)}
    assert len(texts) == 1
    greedy = model.generate(PROMPTS[0], max_new_tokens=12, do_sample=False)
    assert model.generate(PROMPTS[0], max_new_tokens=12, top_k=1, seed=9) == greedy
    assert model.generate(PROMPTS[0], max_new_tokens=12, temperature=0) == greedy
    stopped = model.generate(PROMPTS[0], max_new_tokens=12, do_sample=False, stop_strings=" man")
    assert greedy.startswith(stopped) and " man" not in stopped


def test_what_is_not_given_comes_from_the_checkpoint_and_the_room(tiny_folder: Path) -> None:
    model = QuantizedModel.from_pretrained(tiny_folder, bits=8, **POOL)
    ids = torch.arange(10, 60)[None]
    assert model.generate(ids).shape[1] <= 128  # greedy: tiny has no generation_config.json of its own
    assert torch.equal(model.generate(ids), model.generate(ids, do_sample=False))


def test_a_module_is_an_ordinary_one_outside_of_generate(
    plain: QuantizedModel, paged: QuantizedModel
) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :5] = 0
    paged.generate(PROMPTS[0], max_new_tokens=3)
    assert paged.model.config._attn_implementation == "sdpa"
    assert not isinstance(paged, torch.nn.Module) and not paged.model.training
    for inputs in ({}, {"attention_mask": mask}):
        torch.testing.assert_close(
            logits(paged, **inputs)[:, 5:], logits(plain, **inputs)[:, 5:], rtol=0, atol=2e-4
        )
    transformers_model: Any = paged.model
    assert transformers_model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 17)
    assert paged(IDS, labels=IDS).loss > 0 and paged.forward(IDS).logits.shape == (2, 14, 4096)


def test_the_weights_are_not_copied_for_the_engine() -> None:
    model = QuantizedModel.from_pretrained("demo", **POOL)
    before = {id(module): module for module in model.model.modules()}
    use_paged_kv_cache_if_available(model)
    assert {id(module) for module in model.model.modules()} == set(before)
    choice = use_paged_kv_cache_if_available(model)  # again: nothing new
    assert choice.available and "attention by" in choice.reason


@pytest.mark.parametrize("options", [{"bits": 4}, {"bits": 8}, {"bits": 16}, {"scheme": "int4-asym-g64"}])
def test_a_saved_model_loads_back_equal(tmp_path: Path, options: dict[str, Any]) -> None:
    model = QuantizedModel.from_pretrained("demo", **options, **POOL)
    use_paged_kv_cache_if_available(model)
    model.save_pretrained(tmp_path / "saved")
    again = QuantizedModel.from_pretrained(
        tmp_path / "saved", **POOL | ({} if "scheme" in options else options)
    )
    assert again.info.quantization == model.info.quantization
    want, got = model.model.state_dict(), again.model.state_dict()
    assert want.keys() == got.keys() and all(torch.equal(want[key], got[key]) for key in want)
    use_paged_kv_cache_if_available(again)
    assert torch.equal(logits(again), logits(model))
    assert again.generate(PROMPTS[0], seed=1) == model.generate(PROMPTS[0], seed=1)
    assert again.report.bytes_before == pytest.approx(model.report.bytes_before, rel=0.01)
    assert again.report.bytes_after == pytest.approx(model.report.bytes_after, rel=0.01)


def test_a_wrapped_transformers_model_is_saved_with_its_tokenizer(tmp_path: Path, tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = QuantizedModel.from_model(GPT2LMHeadModel.from_pretrained(tiny_folder), tokenizer, bits=4)
    assert model.tokenizer is tokenizer
    model.save_pretrained(tmp_path / "saved")
    again = QuantizedModel.from_pretrained(tmp_path / "saved", bits=4, progress=False)
    assert again.generate(PROMPTS, max_new_tokens=9) == model.generate(PROMPTS, max_new_tokens=9)
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["quantization_config"]


def test_a_report_and_a_repr_tell_bytes_before_and_after() -> None:
    model = QuantizedModel.from_pretrained("demo", bits=4, **POOL)
    assert model.report.summary() == "quantized 42 x int4, 1 x int8: 10.0 MB became 3.3 MB (67% saved)"
    assert repr(model) == (
        "<QuantizedModel 'demo': LlamaForCausalLM, int4, 10.0 MB became 3.3 MB (67% saved), bfloat16 on cpu>"
    )
    assert "not quantized" in repr(QuantizedModel.from_pretrained("demo", bits=16, **POOL))


def test_rules_go_before_bits() -> None:
    model = QuantizedModel.from_pretrained("demo", bits=16, rules={"*.down_proj": "int8"}, **POOL)
    assert {str(module.scheme) for module in quantized_modules(model.model)} == {"int8"}
    assert len(quantized_modules(model.model)) == 6


def test_flash_attention_on_a_cpu_is_torchs_kernel_and_then_the_native_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = QuantizedModel.from_pretrained("demo", **POOL)
    model.model.set_attn_implementation("eager")
    with caplog.at_level(logging.INFO):
        choice = use_flash_attention_if_available(model)
    assert choice == Choice(
        "sdpa", True, "torch's flash kernel computes this model's attention in bfloat16 on cpu"
    )
    assert [r.getMessage() for r in caplog.records if "flash" in r.getMessage()] == [
        f"flash attention: {choice}"
    ]
    assert model.model.config._attn_implementation == "sdpa"
    use_paged_kv_cache_if_available(model)
    then = use_flash_attention_if_available(model)
    native = not isinstance(load_kernels(), Unavailable)
    assert (then.used, then.available) == (("cpu-native", True) if native else ("torch", False))
    assert "in generate; outside of it sdpa" in then.reason


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt_oss", "does not support an attention implementation"),
        ("bloom", "BloomForCausalLM keeps its own attention"),
        ("deepseek_v3", "Flash attention requires q,k,v to have the same last dimension"),
    ],
)
def test_an_architecture_that_refuses_flash_attention_stays_as_it_was(name: str, reason: str) -> None:
    module = CASES[name].model()
    want = logits(module)
    choice = use_flash_attention_if_available(module)
    assert (choice.used, choice.available) == ("eager", False) and reason in choice.reason
    assert module.config._attn_implementation == "eager" and torch.equal(logits(module), want)


def test_a_model_that_cannot_be_paged_says_why_and_generates_all_the_same() -> None:
    model = QuantizedModel.from_model(CASES["bloom"].model())
    want = model.generate(IDS, max_new_tokens=5, do_sample=False)
    choice = use_paged_kv_cache_if_available(model)
    assert (choice.used, choice.available) == ("transformers", False) and "attention" in choice.reason
    assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False), want)
    forced = QuantizedModel.from_model(CASES["llama"].model(), tier="C")
    assert use_paged_kv_cache_if_available(forced) == Choice("transformers", False, "tier C was asked for")


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text", "phi3_longrope", "mixtral", "deepseek_v3"])
def test_every_kind_of_model_generates_alike_and_stays_plain(name: str) -> None:
    module: Any = CASES[name].model()
    model = QuantizedModel.from_model(module, num_kv_blocks=64)
    before, plain = logits(model), module.generate(IDS, max_new_tokens=8, do_sample=False)
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), plain)
    choice = use_paged_kv_cache_if_available(model)
    assert choice.available, choice.reason
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False), plain)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=5e-5)  # float32, sums in another order
    assert torch.equal(module.generate(IDS, max_new_tokens=8, do_sample=False), plain)


@pytest.mark.parametrize("name", ["gpt2", "llama", "gemma3_text", "mixtral", "qwen3_moe", "gpt_oss", "mamba"])
def test_calls_of_a_quantized_model_are_the_same_bit_for_bit_with_the_paged_cache(name: str) -> None:
    model = QuantizedModel.from_model(CASES[name].model(), bits=4, num_kv_blocks=64)
    assert quantized_modules(model.model)
    before = logits(model)
    assert use_paged_kv_cache_if_available(model).available == (name != "mamba")
    assert model.generate(IDS, max_new_tokens=5, do_sample=False).shape == (2, 19)
    assert torch.equal(logits(model), before)


def test_a_plain_transformers_model_is_told_how_to_get_the_paged_cache() -> None:
    module = CASES["llama"].model()
    choice = use_paged_kv_cache_if_available(module)
    assert not choice.available and "QuantizedModel.from_model(model, tokenizer)" in choice.reason
    assert use_flash_attention_if_available(module).available
    wrapped = QuantizedModel.from_model(module)
    assert wrapped.model is module and not quantized_modules(module)
    assert use_paged_kv_cache_if_available(wrapped).available


def test_a_model_in_training_goes_on_training() -> None:
    module = CASES["gpt2"].model()
    module.train(True)
    module.get_submodule("transformer.h.0").train(False)  # one frozen block
    model = QuantizedModel.from_model(module, num_kv_blocks=64)
    for _ in range(2):
        first = model.generate(IDS, max_new_tokens=5, do_sample=False)
        assert torch.equal(first, model.generate(IDS, max_new_tokens=5, do_sample=False))  # no dropout
        assert module.training and module.get_submodule("transformer.h.1").training
        assert not module.get_submodule("transformer.h.0").training
        use_paged_kv_cache_if_available(model)


@pytest.mark.parametrize(
    ("inputs", "options", "param", "message"),
    [
        ("text", {"max_new_tokens": 0}, "max_new_tokens", "max_new_tokens must be an integer from 1 to"),
        ("text", {"min_new_tokens": 9, "max_new_tokens": 3}, "min_new_tokens", "min_new_tokens .*, got 9"),
        ("text", {"num_beams": 4}, "num_beams", "no option 'num_beams'.*model.model.generate"),
        ("text", {"temperature": 9.0}, "temperature", "temperature must be .* from 0.0 to 2.0, got 9.0"),
        ("text", {"do_sample": False, "top_p": 0.5}, "do_sample", "top_p 0.5 was given"),
        ("text", {"do_sample": True, "temperature": 0.0}, "do_sample", "temperature 0 was given"),
        ("text", {"do_sample": 1}, "do_sample", "do_sample must be true or false, got 1"),
        ("text", {"stop_strings": ["a"] * 5}, "stop_strings", "stop_strings has 5 strings; the limit is 4"),
        ("text", {"attention_mask": IDS}, "attention_mask", "not text"),
        ("", {}, "inputs", "a prompt is empty"),
        (["text", ""], {}, "inputs", "a prompt is empty"),
        (None, {}, "inputs", "got NoneType"),
        (IDS, {"input_ids": IDS}, "input_ids", "inputs and input_ids were given; give one"),
        ([1, 2], {}, "inputs", "generate takes a text, several, or a tensor of token ids, got list"),
        (torch.zeros(3, dtype=torch.long), {}, "inputs", r"\[texts, tokens\], got \[3\] of int64"),
        (torch.zeros(1, 3), {}, "inputs", r"got \[1, 3\] of float32"),
        (IDS, {"attention_mask": IDS[:1]}, "attention_mask", r"\[1, 14\], the token ids \[2, 14\]"),
        (IDS + 5000, {}, "inputs", "token ids must be from 0 to 4095"),
    ],
)  # fmt: skip
def test_wrong_requests_are_refused_by_the_callers_own_names(
    model: QuantizedModel, inputs: Any, options: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        model.generate(inputs, **options)
    assert caught.value.param == param


def test_a_text_too_long_names_the_callers_option(model: QuantizedModel) -> None:
    with pytest.raises(ContextLengthError, match=r"plus max_new_tokens 3,000.*lower max_new_tokens"):
        model.generate(PROMPTS[0], max_new_tokens=3000)

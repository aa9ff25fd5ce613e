"""The library's front door on the bundled model."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import memory_efficient_gpt
from memory_efficient_gpt import LLM, Completion, SamplingParams
from memory_efficient_gpt.errors import ContextLengthError, InvalidRequestError, ModelNotFoundError
from memory_efficient_gpt.request import FinishReason

PROMPT = "The old house stood at the end of the lane, and"


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM("demo", max_num_seqs=16, num_kv_blocks=600) as loaded:
        yield loaded


def test_one_prompt_gives_one_completion(llm: LLM) -> None:
    completion = llm.generate(PROMPT, max_tokens=20, temperature=0.0)
    assert isinstance(completion, Completion)
    assert completion.text and str(completion) == completion.text
    assert completion.choices[0].finish_reason is FinishReason.LENGTH
    assert len(completion.choices[0].token_ids) == 20


def test_a_batch_gives_what_each_prompt_gives_alone(llm: LLM) -> None:
    prompts = [PROMPT, "It was", "“Who is there?” cried the old man — ", "Chapter I\n\n"]
    params = SamplingParams(max_tokens=30, seed=5)
    alone = [llm.generate(prompt, params).text for prompt in prompts]
    assert [c.text for c in llm.generate(prompts, params)] == alone


def test_token_ids_are_a_prompt_too(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    assert (
        llm.generate(ids, max_tokens=8, temperature=0).text
        == llm.generate(PROMPT, max_tokens=8, temperature=0).text
    )


def test_stream_gives_the_same_text_in_pieces(llm: LLM) -> None:
    whole = llm.generate(PROMPT, max_tokens=25, seed=2).text
    pieces = list(llm.stream(PROMPT, max_tokens=25, seed=2))
    assert "".join(pieces) == whole and len(pieces) > 5


def test_leaving_a_stream_frees_its_blocks(llm: LLM) -> None:
    stream = llm.stream(PROMPT, max_tokens=100)
    next(stream)
    assert llm.stats.num_running == 1
    stream.close()  # type: ignore[attr-defined]  # it is a generator
    assert llm.stats.num_running == 0 and llm.stats.num_free_blocks == llm.stats.num_kv_blocks


def test_stop_string_ends_the_text_before_it(llm: LLM) -> None:
    whole = llm.generate(PROMPT, max_tokens=40, temperature=0).text
    stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
    choice = llm.generate(PROMPT, max_tokens=40, temperature=0, stop=(stop,)).choices[0]
    assert choice.text == whole[: whole.index(stop)]
    assert (choice.finish_reason, choice.stop) == (FinishReason.STOP, stop)
    assert llm.stats.num_running == 0


def test_a_stop_string_may_be_given_alone(llm: LLM) -> None:
    text = llm.generate(PROMPT, max_tokens=40, temperature=0, stop=" dark").text
    assert text == llm.generate(PROMPT, max_tokens=40, temperature=0, stop=[" dark"]).text
    assert text and " dark" not in text


def test_min_tokens_holds_off_stop_strings(llm: LLM) -> None:
    whole = llm.generate(PROMPT, max_tokens=40, temperature=0).text
    choice = llm.generate(PROMPT, max_tokens=40, temperature=0, stop=" ", min_tokens=20).choices[0]
    assert len(choice.token_ids) > 20 and whole.startswith(choice.text) and " " in choice.text


def test_a_paused_stream_goes_on_after_other_calls(llm: LLM) -> None:
    expected = llm.generate(PROMPT, max_tokens=30, temperature=0).text
    stream = llm.stream(PROMPT, max_tokens=30, temperature=0)
    text = next(stream)
    other = llm.stream(PROMPT, max_tokens=30, temperature=0)
    second = next(other)
    assert llm.generate(PROMPT, max_tokens=30, temperature=0).text == expected
    assert text + "".join(stream) == second + "".join(other) == expected
    assert llm.stats.num_running == 0


def test_arrays_of_ids_are_prompts(llm: LLM) -> None:
    ids = llm.tokenizer.encode(PROMPT)
    expected = llm.generate(ids, max_tokens=5, temperature=0).text
    assert llm.generate(np.array(ids), max_tokens=5, temperature=0).text == expected
    batches: list[Any] = [np.array([ids, ids]), [np.array(ids), PROMPT]]
    for several in batches:
        completions = llm.generate(several, max_tokens=5, temperature=0)
        assert [c.text for c in completions] == [expected] * 2


@pytest.mark.parametrize(
    "wrong", [5, None, b"bytes", ["text", 5], [[1, 2], None], [1.5, 2.5], [[["nested"]]]]
)
def test_what_is_no_prompt_is_refused(llm: LLM, wrong: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        llm.generate(wrong, max_tokens=5)
    assert caught.value.param == "prompt"
    assert not llm.engine.has_work


def test_parameters_given_twice_are_refused(llm: LLM) -> None:
    with pytest.raises(TypeError, match="not both: params and max_tokens"):
        llm.generate(PROMPT, SamplingParams(), max_tokens=5)


def test_n_texts_differ_and_repeat_with_their_seed(llm: LLM) -> None:
    first, second = (llm.generate(PROMPT, max_tokens=15, n=3, seed=4) for _ in range(2))
    assert [c.text for c in first.choices] == [c.text for c in second.choices]
    assert len({c.text for c in first.choices}) == 3


def test_chat_answers_through_the_template(llm: LLM) -> None:
    answer = llm.chat([{"role": "user", "content": "Who lives here?"}], max_tokens=12, seed=1)
    assert answer.text


def test_a_refused_prompt_leaves_nothing_behind(llm: LLM) -> None:
    with pytest.raises(ContextLengthError, match="context is"):
        llm.generate([PROMPT, PROMPT * 400], max_tokens=5)
    with pytest.raises(InvalidRequestError, match="temperature"):
        llm.generate(PROMPT, temperature=9.0)
    assert llm.stats.num_running == llm.stats.num_waiting == 0


def test_an_engine_without_a_tokenizer_takes_ids_only(llm: LLM) -> None:
    around, ids = LLM.around(llm.engine, None), llm.tokenizer.encode(PROMPT)
    choice = around.generate(ids, max_tokens=6, temperature=0).choices[0]
    assert choice.token_ids == llm.generate(ids, max_tokens=6, temperature=0).choices[0].token_ids
    assert choice.text == "" and choice.finish_reason is FinishReason.LENGTH
    for prompt, stop in ((PROMPT, None), (ids, "dark")):
        with pytest.raises(InvalidRequestError, match="no tokenizer, so it takes token ids only"):
            around.generate(prompt, max_tokens=6, stop=stop)
    assert not llm.engine.has_work


@pytest.mark.parametrize("package", ["attention", "kv_cache", "quantization"])
def test_every_name_of_a_package_is_there(package: str) -> None:
    module = importlib.import_module(f"memory_efficient_gpt.{package}")
    for name in module._HOMES:
        assert getattr(module, name) is not None and name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


def test_unknown_model_is_named() -> None:
    with pytest.raises(ModelNotFoundError, match="nope"):
        LLM("./nope")


def test_public_names_are_exactly_these() -> None:
    assert set(memory_efficient_gpt.__all__) == {
        "LLM", "Completion", "EngineConfig", "QuantizedModel", "SamplingParams", "__version__",
        "use_flash_attention_if_available", "use_paged_kv_cache_if_available",
    }  # fmt: skip
    for name in memory_efficient_gpt.__all__:
        assert getattr(memory_efficient_gpt, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        memory_efficient_gpt.nothing  # noqa: B018


def test_an_interrupt_between_prompts_leaves_none_of_them_running(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM("demo-draft", num_kv_blocks=64, progress=False)
    submit, taken = llm.engine.submit, list[str]()

    def interrupted(request: Any) -> None:
        if taken:
            raise KeyboardInterrupt
        taken.append(request.id)
        submit(request)

    monkeypatch.setattr(llm.engine, "submit", interrupted)
    with pytest.raises(KeyboardInterrupt):
        llm.generate(["One", "Two"], max_tokens=4)
    assert taken and not llm.engine.has_work
    llm.close()

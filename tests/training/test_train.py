"""The whole path on a made-up corpus: tokenizer, streams, training, folder, transformers."""

import json
import lzma
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

from training.architectures import make_model
from training.chat import conversations
from training.data import Streams, WindowSampler, encode_stream, load_streams, prepare
from training.distill import mixed_loss, teacher_choices
from training.evaluate import load_model
from training.export import export_folder
from training.optim import Optimizer, schedule
from training.plan import Plan, merge
from training.settings import ModelSettings, RecipeSettings, RunSettings, parse_run, read_run
from training.step import Step
from training.tokenizer import save_tokenizer, train_tokenizer
from training.train import train

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "layers": 2,
    "heads": 2,
    "intermediate_size": 64,
    "max_positions": 64,
}


def made_up_book(seed: int) -> str:
    """Sentences from a few words, with some dialogue."""
    rng = random.Random(seed)
    words = ("the", "a", "dog", "king", "ship", "old", "green", "house", "went", "saw", "found", "and")
    paragraphs = []
    for index in range(150):
        sentence = " ".join(rng.choices(words, k=10)).capitalize() + "."
        paragraphs.append(f'"{sentence}"' if index % 3 else sentence)
    return "\n\n".join(paragraphs)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A corpus, its tokenizer (tok/) and its streams (data/)."""
    root = tmp_path_factory.mktemp("corpus")
    for split, count in {"train": 3, "valid": 1}.items():
        text = "\n<|endoftext|>\n".join(made_up_book(seed + count) for seed in range(count))
        (root / f"{split}.txt.xz").write_bytes(lzma.compress(text.encode()))
    tokenizer = train_tokenizer([made_up_book(9)], vocab_size=320)
    save_tokenizer(tokenizer, root / "tok")
    prepare(root, tokenizer, root / "data", seed=0)
    return root


@pytest.fixture(scope="module")
def streams(folder: Path) -> Streams:
    return load_streams(folder / "data", torch.device("cpu"))


def test_loss_falls_on_a_tiny_model(streams: Streams) -> None:
    result = train(read_run(CONFIGS / "tiny.yaml"), streams)
    assert result.curve[-1].step == 60
    assert result.valid.perplexity < 100 < 4096  # an untrained model is near 4096
    assert result.valid.bits_per_byte < 3.0


def test_a_schedule_of_seconds_ends_on_time_at_a_rate_of_zero(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates: list[float] = []
    now = iter(range(1000))
    monkeypatch.setattr("training.train.time", SimpleNamespace(monotonic=lambda: float(next(now))))
    monkeypatch.setattr(Step, "run", lambda self, starts, rate: rates.append(rate))
    recipe = {"seconds": 1000, "phases": [{"length": 32, "rows": 8}], "eval_every": 2.0}
    run = parse_run({"name": "timed", "model": SMALL, "recipe": recipe})
    result = train(run, streams, until=200.0)
    assert result.seconds == pytest.approx(200.0, abs=2)
    assert max(rates) > 0.9
    assert rates[-1] < 0.02
    assert schedule(1.0, run.recipe) == 0.0


def test_training_that_must_end_before_it_can_begin_is_refused(streams: Streams) -> None:
    run = parse_run(
        {"name": "late", "model": SMALL, "recipe": {"seconds": 5, "phases": [{"length": 32, "rows": 8}]}}
    )
    with pytest.raises(ValueError, match="before it could begin"):
        train(run, streams, until=time.monotonic() - 1)


def test_plan_trains_a_student_after_its_teacher(folder: Path, streams: Streams, tmp_path: Path) -> None:
    recipe = {"steps": 8, "phases": [{"length": 32, "rows": 8}], "teacher_weight": 0.5, "chat_share": 0.125}
    base = {"model": SMALL, "recipe": recipe}
    runs = [
        parse_run({**base, "name": "teacher"}),
        parse_run({**base, "name": "student", "teacher": "teacher", "bundled": True}),
    ]
    plan = Plan(runs, streams, folder / "tok", tmp_path, tmp_path)
    plan.run_all(deadline_s=60)
    assert [result["name"] for result in plan.results] == ["teacher", "student"]
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    assert (tmp_path / "student" / "model.safetensors").is_file()


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_exported_folder_computes_the_same(architecture: str, folder: Path, tmp_path: Path) -> None:
    settings = ModelSettings(architecture=architecture, kv_heads=1, **SMALL)
    model = make_model(settings, seed=1).bfloat16().float().eval()
    export_folder(settings, model.state_dict(), folder / "tok", "# card\n", tmp_path)
    theirs = load_model(tmp_path, torch.device("cpu"))
    ids = torch.randint(0, 4096, (2, 50), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, model(ids), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_rate_zero_changes_nothing(optimizer: str) -> None:
    model = make_model(ModelSettings(kv_heads=1, **SMALL), seed=0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    stepper = Optimizer(model, RecipeSettings(steps=1, optimizer=optimizer))
    model(torch.zeros(1, 4, dtype=torch.long)).sum().backward()
    stepper.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_mixed_loss_is_cross_entropy_with_a_certain_teacher() -> None:
    logits, targets = torch.randn(2, 3, 7), torch.randint(0, 7, (2, 3))
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    certain = (targets[..., None], torch.ones(2, 3, 1))
    torch.testing.assert_close(mixed_loss(logits, targets, None, 0.0), plain)
    torch.testing.assert_close(mixed_loss(logits, targets, certain, 0.7), plain)


def test_teacher_choices_cover_the_stream(streams: Streams) -> None:
    teacher = make_model(ModelSettings(kv_heads=1, **SMALL), seed=0)
    choices = teacher_choices(teacher, streams.train[:500], length=64, rows=4, compiled=False)
    sums = choices.probabilities.float().sum(-1)
    assert choices.ids.shape == (500, 64)
    assert bool((sums > 0).all())
    assert float(sums.max()) < 1.01


def test_an_epoch_visits_every_window_once(streams: Streams) -> None:
    sampler = WindowSampler(streams, rows=1, chat_rows=0, length=32, seed=0)
    windows = (len(streams.train) - 33) // 32
    starts = [int(sampler.next_batch()) for _ in range(windows)]
    assert len(set(starts)) == windows
    assert len({start % 32 for start in starts}) == 1


def test_streams_separate_texts(folder: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / "tok" / "tokenizer.json"))
    texts = list(conversations(made_up_book(3), random.Random(0)))
    stream = encode_stream(tokenizer, texts)
    assert (stream == 0).sum() == len(texts) + 1
    assert tokenizer.decode(stream.tolist(), skip_special_tokens=False).split("<|endoftext|>")[1:-1] == texts


def test_unknown_settings_fail() -> None:
    with pytest.raises(ValueError, match="unknown settings depth"):
        parse_run({"name": "x", "model": {"depth": 3}, "recipe": {"steps": 1}})
    with pytest.raises(ValueError, match="either"):
        parse_run({"name": "x"})


def test_merge_goes_section_by_section() -> None:
    assert merge({"a": {"b": 1, "c": 2}}, {"a": {"b": 3}}) == {"a": {"b": 3, "c": 2}}


def test_every_config_parses() -> None:
    for path in CONFIGS.glob("*.yaml"):
        if path.stem not in ("bundled", "sweep"):
            assert isinstance(read_run(path), RunSettings)

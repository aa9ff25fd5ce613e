"""Settings of one training run: frozen dataclasses read from YAML.

Purpose: name, sizes and recipe of a model, with every default in one place.
Doesn't know: how they are used.
Invariant: an unknown key is an error; nothing changes after reading (a plan merges YAML before parsing).
"""

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml


@dataclass(frozen=True)
class ModelSettings:
    """Sizes of a model; `kv_heads` is used by the llama architecture alone."""

    architecture: str = "llama"
    vocab_size: int = 4096
    hidden_size: int = 256
    layers: int = 6
    heads: int = 8
    kv_heads: int = 2
    intermediate_size: int = 640
    max_positions: int = 2048
    dropout: float = 0.0

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.heads


@dataclass(frozen=True)
class Phase:
    """A part of the schedule with one window length; `until` is a fraction of the whole schedule."""

    length: int
    rows: int
    until: float = 1.0


@dataclass(frozen=True)
class RecipeSettings:
    """How a model is trained; the schedule ends after `seconds` or `steps`, whichever is given.

    The learning rate rises over the fraction `warmup`, holds until the fraction `hold`, then falls linearly
    to zero. `chat_share` is the share of windows from conversations, `teacher_weight` the weight of the
    teacher's distribution against the true token, `eval_every` a fraction of the schedule.
    """

    seconds: float | None = None
    steps: int | None = None
    phases: tuple[Phase, ...] = (Phase(2048, 32),)
    chat_share: float = 0.03
    optimizer: str = "muon"
    lr_matrix: float = 6e-3
    lr_vector: float = 3e-3
    weight_decay: float = 0.1
    warmup: float = 0.02
    hold: float = 0.0
    teacher_weight: float = 0.0
    seed: int = 0
    eval_every: float = 0.2


@dataclass(frozen=True)
class RunSettings:
    """One run: its name, model and recipe.

    `teacher` names an earlier run of the same plan; `bundled` asks the plan for a model folder.
    """

    name: str
    model: ModelSettings = field(default_factory=ModelSettings)
    recipe: RecipeSettings = field(default_factory=RecipeSettings)
    teacher: str | None = None
    bundled: bool = False


def _build(cls: type[Any], values: dict[str, Any], where: str) -> Any:
    """A dataclass from a mapping; unknown keys fail with the list of known ones."""
    known = [item.name for item in fields(cls)]
    if unknown := sorted(set(values) - set(known)):
        raise ValueError(f"{where}: unknown settings {', '.join(unknown)}; known are {', '.join(known)}")
    return cls(**values)


def parse_run(values: dict[str, Any]) -> RunSettings:
    """Settings from a parsed YAML mapping.

    Raises: ValueError for unknown keys or a recipe without an end.
    """
    values = dict(values)
    recipe = dict(values.pop("recipe", {}))
    if "phases" in recipe:
        recipe["phases"] = tuple(_build(Phase, phase, "phases") for phase in recipe["phases"])
    model = _build(ModelSettings, values.pop("model", {}), "model")
    run: RunSettings = _build(
        RunSettings, {**values, "model": model, "recipe": _build(RecipeSettings, recipe, "recipe")}, "run"
    )
    if (run.recipe.seconds is None) == (run.recipe.steps is None):
        raise ValueError(f"run {run.name}: give either recipe.seconds or recipe.steps")
    return run


def read_run(path: Path) -> RunSettings:
    """Settings of the run that a YAML file describes."""
    return parse_run(yaml.safe_load(path.read_text()))

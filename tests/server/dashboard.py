"""The Grafana dashboard as tests read it: its expressions, and the metrics and labels these name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "docker/grafana/dashboards/megpt.json").read_text())


def expressions() -> list[str]:
    """Every query of every panel."""
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def panels() -> list[dict[str, Any]]:
    """All panels that ask for something: rows don't."""
    return [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]


def metric_names(expression: str) -> set[str]:
    """The metrics that an expression reads."""
    return set(re.findall(r"\bmegpt_\w+", expression))


def selected_labels(expression: str) -> Iterator[tuple[str, str]]:
    """(metric, label) for each label that a selector of the expression names."""
    for metric, selector in re.findall(r"\b(megpt_\w+)\{([^}]*)\}", expression):
        for label in re.findall(r"(\w+)\s*=~?", selector):
            yield metric, label


def grouped_labels(expression: str) -> set[str]:
    """Labels that the expression sums by."""
    return {
        label.strip() for group in re.findall(r"\bby \(([^)]*)\)", expression) for label in group.split(",")
    }


def filled_in(expression: str) -> str:
    """The expression as Grafana sends it."""
    return expression.replace("$__rate_interval", "20s").replace("$model", ".*")

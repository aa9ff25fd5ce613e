"""The Grafana dashboard asks for what the server exports, and Compose shows it."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from pathlib import PurePosixPath
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from memory_efficient_gpt_server.registry.states import State
from tests.server.dashboard import (
    DASHBOARD,
    ROOT,
    expressions,
    grouped_labels,
    metric_names,
    panels,
    selected_labels,
)
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import Start

TITLES = {
    "Lifecycle": {
        "Memory against the budget", "States", "Evictions", "Load seconds", "Requests that wait for a model",
        "Leases",
    },
    "Latency": {"Time to first token", "Time between tokens", "Request"},
}  # fmt: skip


@pytest.fixture
def exported(stage: Start) -> dict[str, set[str]]:
    """Labels of every sample that a server exports after some use, by the sample's name."""
    with stage(FakeHost()) as s:
        s.ask("A")
        s.ask("B")
        text = s.client.get("/metrics").text
    found: dict[str, set[str]] = defaultdict(set)
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            found[sample.name] |= set(sample.labels)
    return dict(found)


def test_every_metric_and_label_is_one_that_the_server_exports(exported: dict[str, set[str]]) -> None:
    named = set().union(*map(metric_names, expressions()))
    assert len(named) > 25 and named <= set(exported)
    for expression in expressions():
        for metric, label in selected_labels(expression):
            assert label in exported[metric], expression
        offered = set().union(*(exported[name] for name in metric_names(expression)))
        assert grouped_labels(expression) <= offered, expression
    (query,) = re.findall(
        r"label_values\((\w+), (\w+)\)", json.dumps(DASHBOARD["templating"]["list"][1]["query"])
    )
    assert query[1] in exported[query[0]]


def test_no_metric_of_the_server_is_forgotten(exported: dict[str, set[str]]) -> None:
    shown = {re.sub(r"_(bucket|sum|count)$", "", name) for e in expressions() for name in metric_names(e)}
    theirs = {re.sub(r"_(bucket|sum|count)$", "", name) for name in exported}
    assert theirs - shown == set()


def test_legends_name_labels_that_the_answer_has(exported: dict[str, set[str]]) -> None:
    for panel in panels():
        for target in panel["targets"]:
            expression, legend = target["expr"], re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])
            offered = set().union(*(exported[name] for name in metric_names(expression)))
            if re.search(r"\b(sum|max)\b", expression):  # what is not grouped by is gone
                offered = grouped_labels(expression) - {"le"}
            assert set(legend) <= offered, (panel["title"], expression)


def test_the_rows_have_their_panels() -> None:
    rows: dict[str, set[str]] = {}
    for panel in sorted(DASHBOARD["panels"], key=lambda p: (p["gridPos"]["y"], p["gridPos"]["x"])):
        if panel["type"] == "row":
            row = rows.setdefault(panel["title"], set())
        else:
            row.add(panel["title"])
    assert list(rows) == ["General", "Latency", "Engine/KV", "Lifecycle"]
    assert all(rows.values())
    for title, wanted in TITLES.items():
        assert wanted <= rows[title]


def test_panels_do_not_overlap_and_ids_differ() -> None:
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    cells = [
        (x, y)
        for g in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(g["x"], g["x"] + g["w"])
        for y in range(g["y"], g["y"] + g["h"])
    ]
    assert len(cells) == len(set(cells)) and max(x for x, _ in cells) < 24


def test_everything_asks_the_datasource_variable() -> None:
    source, model = DASHBOARD["templating"]["list"]
    assert (source["name"], source["type"], source["query"]) == ("datasource", "datasource", "prometheus")
    asked = [model["datasource"], *(p["datasource"] for p in panels())]
    asked += [target["datasource"] for panel in panels() for target in panel["targets"]]
    assert all(a == {"type": "prometheus", "uid": "${datasource}"} for a in asked)


def test_every_state_of_a_model_has_its_own_number_and_name() -> None:
    (panel,) = [panel for panel in panels() if panel["type"] == "state-timeline"]
    (mapping,) = panel["fieldConfig"]["defaults"]["mappings"]
    names = {int(number): option["text"] for number, option in mapping["options"].items()}
    assert set(names.values()) == {str(state) for state in State}
    told = re.findall(r'state="(\w+)"\} \* (\d+)', panel["targets"][0]["expr"])
    assert {int(number): state for state, number in told} | {0: "unloaded"} == names


def test_compose_gives_grafana_what_it_needs() -> None:
    services: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"]
    grafana = services["grafana"]
    assert grafana["profiles"] == ["monitoring"] and "profiles" not in services["prometheus"]
    assert all(port.startswith("127.0.0.1:") for port in grafana["ports"])
    mounts = dict(volume.removesuffix(":ro").split(":") for volume in grafana["volumes"])
    assert all((ROOT / folder).is_dir() for folder in mounts)
    provisioned = ROOT / "docker/grafana/provisioning"
    (source,) = yaml.safe_load((provisioned / "datasources/prometheus.yml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090" and "prometheus" in grafana["depends_on"]
    scrape = yaml.safe_load((ROOT / "docker/prometheus.yml").read_text())["global"]["scrape_interval"]
    assert source["jsonData"]["timeInterval"] == scrape
    (provider,) = yaml.safe_load((provisioned / "dashboards/megpt.yml").read_text())["providers"]
    assert mounts["./docker/grafana/dashboards"] == provider["options"]["path"]
    home = PurePosixPath(grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"])
    assert str(home.parent) == provider["options"]["path"]
    assert (ROOT / "docker/grafana/dashboards" / home.name).is_file()

"""A real Prometheus with the settings that Compose gives it, if this machine has one."""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from tests.server.dashboard import ROOT, expressions, filled_in, metric_names
from tests.server.registry.fake_engines import FakeHost
from tests.server.staged_models import Start

SETTINGS = ROOT / "docker/prometheus.yml"
START_TIMEOUT_S = 30

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("prometheus") is None, reason="there is no prometheus on the path"),
]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return int(taken.getsockname()[1])


def adapted(target: str) -> dict[str, Any]:
    """Compose's settings, asking `target` four times a second."""
    settings: dict[str, Any] = yaml.safe_load(SETTINGS.read_text())
    settings["global"] |= {"scrape_interval": "250ms", "scrape_timeout": "250ms"}
    (job,) = settings["scrape_configs"]
    job["static_configs"] = [{"targets": [target]}]
    return settings


@contextlib.contextmanager
def prometheus(folder: Path, target: str) -> Iterator[httpx.Client]:
    """A running Prometheus, and a client of its API."""
    (folder / "prometheus.yml").write_text(yaml.safe_dump(adapted(target)))
    address = f"127.0.0.1:{free_port()}"
    command = [
        "prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--web.listen-address={address}",
        f"--storage.tsdb.path={folder / 'data'}", "--log.level=error",
    ]  # fmt: skip
    with (folder / "log").open("w") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            with httpx.Client(base_url=f"http://{address}/api/v1", timeout=10) as client:
                yield client
        finally:
            process.terminate()
            process.wait(10)


def until(found: Callable[[], Any], folder: Path) -> Any:
    """What `found` returns once that is something."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while True:
        with contextlib.suppress(httpx.TransportError):
            if value := found():
                return value
        assert time.monotonic() < deadline, (folder / "log").read_text()
        time.sleep(0.1)


def answer(client: httpx.Client, expression: str) -> list[dict[str, Any]]:
    response = client.get("/query", params={"query": expression})
    assert response.status_code == 200, (expression, response.text)
    result: list[dict[str, Any]] = response.json()["data"]["result"]
    return result


def test_prometheus_scrapes_the_server_and_answers_the_dashboard(stage: Start, tmp_path: Path) -> None:
    with (
        stage(FakeHost(), metrics_public=True) as s,
        prometheus(tmp_path, f"{s.live.host}:{s.live.port}") as client,
    ):
        s.ask("A")
        until(lambda: answer(client, 'up{job="megpt"} == 1'), tmp_path)
        (target,) = client.get("/targets").json()["data"]["activeTargets"]
        assert (target["health"], target["lastError"]) == ("up", "")
        evicted = 'megpt_model_evictions_total{model_name="A", reason="budget"}'
        (before,) = answer(client, evicted)
        s.ask("B")
        (after,) = until(lambda: answer(client, f"{evicted} > 0"), tmp_path)
        assert (before["value"][1], after["value"][1]) == ("0", "1")

        until(lambda: _states(client) == {"A": "0", "B": "3", "C": "0"}, tmp_path)
        for expression in expressions():
            assert answer(client, filled_in(expression)), f"{expression} has no data"


def _states(client: httpx.Client) -> dict[str, str]:
    (expression,) = [e for e in expressions() if metric_names(e) == {"megpt_model_state"}]
    return {a["metric"]["model_name"]: a["value"][1] for a in answer(client, filled_in(expression))}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="there is no promtool on the path")
def test_prometheus_accepts_its_settings() -> None:
    done = subprocess.run(
        ["promtool", "check", "config", str(SETTINGS)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr

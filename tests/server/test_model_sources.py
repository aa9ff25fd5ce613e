"""Which names may become models while the server runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from memory_efficient_gpt.errors import InvalidRequestError
from memory_efficient_gpt_server.model_sources import allowed_source


def checkpoint(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def root(tmp_path: Path) -> Path:
    checkpoint(tmp_path / "outside")
    checkpoint(tmp_path / "models" / "one")
    checkpoint(tmp_path / "models" / "org" / "two")
    (tmp_path / "models" / "empty").mkdir()
    (tmp_path / "models" / "way-out").symlink_to(tmp_path / "outside")
    (tmp_path / "models" / "inside").symlink_to(tmp_path / "models" / "one")
    (tmp_path / "models" / "loop").symlink_to(tmp_path / "models" / "loop")
    return tmp_path / "models"


@pytest.mark.parametrize("name", ["demo", "gpt-org/some_model.v2"])
def test_bundled_models_and_hub_ids_are_taken_as_they_are(root: Path, name: str) -> None:
    assert allowed_source(name, root) == allowed_source(name, None) == name


def test_folders_of_models_dir_are_named_by_place_or_path(root: Path) -> None:
    assert allowed_source("one", root) == allowed_source(str(root / "one"), root) == str(root / "one")
    assert allowed_source("inside", root) == str(root / "one")
    assert allowed_source("org/two", root) == str(root / "org" / "two"), "a folder that is here is no hub id"


@pytest.mark.parametrize(
    "name",
    [
        "../outside", "way-out", "{tmp}/outside", "{tmp}/models/../outside", "/", "/etc", "~", "~/x", ".",
        "..", "", "empty", "loop", "nothing", "a/b/c", "one/../../outside", "one\0", "org/two\n", "x" * 5000,
        "-x/y", "hub/", "/hub",
    ],
)  # fmt: skip
def test_everything_else_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidRequestError, match="can't be registered") as refused:
        allowed_source(name.replace("{tmp}", str(tmp_path)), root)
    assert refused.value.param == "model" and len(refused.value.message) < 500


def test_a_folder_where_the_server_runs_is_not_taken_for_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequestError):
        allowed_source("org/name", None)

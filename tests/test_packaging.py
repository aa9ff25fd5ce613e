"""The project as it is shipped: metadata, pins, the wheel, and the files that must agree with one another."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
import venv
import zipfile
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import Any

import pytest

import memory_efficient_gpt

ROOT = Path(__file__).parents[1]
PACKAGES = ("engine/memory_efficient_gpt", "server/memory_efficient_gpt_server")
BROUGHT_BY = {"triton": "torch", "starlette": "fastapi", "pydantic-core": "pydantic", "cuda": "cuda-bindings"}
READ_BY_TRANSFORMERS = {"accelerate", "safetensors"}


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pyproject() -> dict[str, Any]:
    return tomllib.loads(read("pyproject.toml"))


@pytest.fixture(scope="module")
def pins() -> dict[str, str]:
    lines = [line for line in read("constraints.txt").splitlines() if line and not line.startswith("#")]
    return {normalized(line.split("==")[0]): line.split("==")[1] for line in lines}


def normalized(requirement: str) -> str:
    """The distribution's name in a requirement, as package indexes compare names."""
    match = re.match(r"[A-Za-z0-9._-]+", requirement)
    assert match, requirement
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def lower_bound(requirement: str) -> tuple[int, ...]:
    match = re.search(r">=([0-9.]+)$", requirement)
    assert match, f"{requirement} has no lower bound"
    return numbers(match[1])


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


def imported_modules(folder: str) -> Iterator[tuple[str, Path]]:
    """The top-level names that the sources under `folder` import, wherever in the file they do."""
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from ((alias.name.split(".")[0], path) for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                yield node.module.split(".")[0], path


def test_version_equals_the_changelogs_newest_entry() -> None:
    newest = re.search(r"^## \[?v?(\d+\.\d+\.\d+)", read("CHANGELOG.md"), re.MULTILINE)
    assert newest, "CHANGELOG.md has no entry such as '## 0.1.0'"
    assert newest[1] == memory_efficient_gpt.__version__


def test_every_direct_dependency_is_pinned_at_or_above_its_lower_bound(
    pyproject: dict[str, Any], pins: dict[str, str]
) -> None:
    extras = pyproject["project"]["optional-dependencies"].values()
    for requirement in [*pyproject["project"]["dependencies"], *(r for extra in extras for r in extra)]:
        assert normalized(requirement) in pins, f"constraints.txt has no pin for {requirement}"
        assert numbers(pins[normalized(requirement)]) >= lower_bound(requirement), requirement


def test_every_third_party_import_is_a_declared_dependency(pyproject: dict[str, Any]) -> None:
    project = pyproject["project"]
    extras = [r for name, extra in project["optional-dependencies"].items() if name != "dev" for r in extra]
    declared = {normalized(r) for r in [*project["dependencies"], *extras]}
    own = {Path(package).name for package in PACKAGES}
    distributions = packages_distributions()
    for package in PACKAGES:
        for module, path in imported_modules(package):
            if module in sys.stdlib_module_names or module in own:
                continue
            providers = {normalized(name) for name in distributions.get(module, [module])}
            providers |= {BROUGHT_BY[name] for name in providers if name in BROUGHT_BY}
            assert providers & declared, f"{path} imports {module}"


def test_every_runtime_dependency_is_imported(pyproject: dict[str, Any]) -> None:
    distributions = packages_distributions()
    imported = {
        normalized(name)
        for package in PACKAGES
        for module, _ in imported_modules(package)
        for name in distributions.get(module, [])
    }
    for requirement in pyproject["project"]["dependencies"]:
        name = normalized(requirement)
        assert name in imported or name in READ_BY_TRANSFORMERS, f"{requirement} is never imported"


def test_torch_free_modules_never_load_torch(pyproject: dict[str, Any]) -> None:
    """import-linter reads imports; this runs them, parent packages included."""
    contracts = pyproject["tool"]["importlinter"]["contracts"]
    (modules,) = [c["source_modules"] for c in contracts if c["name"].endswith("need no torch")]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "engine"), str(ROOT / "server")])}
    result = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert result.returncode == 0


def test_the_makefile_and_the_image_take_torchs_version_from_the_constraints() -> None:
    for name in ("Makefile", "Dockerfile"):
        assert "^torch==" in read(name), f"{name} does not read torch's pin"
        assert not re.search(r"torch==\d", read(name)), f"{name} repeats torch's version"


def test_the_image_serves_like_the_makefile() -> None:
    makefile, dockerfile, compose = read("Makefile"), read("Dockerfile"), read("docker-compose.yml")
    assert "megpt serve" in makefile
    assert re.search(r'^ENTRYPOINT \["megpt"\]$', dockerfile, re.MULTILINE)
    assert re.search(r'^CMD \["serve"', dockerfile, re.MULTILINE)
    port = re.search(r"http://127\.0\.0\.1:(\d+)", makefile)
    assert port
    assert f"EXPOSE {port[1]}" in dockerfile
    assert f":{port[1]}" in compose
    assert f"megpt:{port[1]}" in read("docker/prometheus.yml")


def test_the_image_has_a_supported_python(pyproject: dict[str, Any]) -> None:
    image = re.search(r"^ARG PYTHON_VERSION=(\d+\.\d+)$", read("Dockerfile"), re.MULTILINE)
    assert image
    assert f"Programming Language :: Python :: {image[1]}" in pyproject["project"]["classifiers"]
    assert pyproject["project"]["requires-python"] == ">=3.11"
    assert "(3, 11)" in read("Makefile")


def test_the_build_context_leaves_out_what_must_not_ship() -> None:
    ignored = read(".dockerignore").split()
    assert {".git", ".venv", ".env", "tests"} <= set(ignored)


def test_make_says_which_python_it_needs(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.9.9" && exit 0\nexit 1\n')
    old.chmod(0o755)
    command = ["make", "venv", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode != 0
    assert "Python 3.11 or newer is needed" in result.stderr
    assert "3.9.9" in result.stderr


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the checkout without network."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    own = {Path(package).name for package in PACKAGES}
    assert own <= tops
    (metadata,) = tops - own
    assert metadata.endswith(".dist-info")
    assert not [name for name in names if "__pycache__" in name or name.endswith((".pyc", ".so", ".log"))]


def test_the_wheel_holds_models_kernels_and_type_markers(wheel: Path) -> None:
    shipped = set(zipfile.ZipFile(wheel).namelist())
    for package in PACKAGES:
        folder = ROOT / package
        data = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
        for path in data:
            assert f"{folder.name}/{path.relative_to(folder).as_posix()}" in shipped, path
        assert f"{folder.name}/py.typed" in shipped
    assert any(name.endswith("bundled/demo/model.safetensors") for name in shipped)
    assert any(name.endswith("native/src/linear.cpp") for name in shipped)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_installed_wheel_runs_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """Installed without dependencies; a .pth file lends it those of the environment under test."""
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    (site,) = home.glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    (site / "dependencies.pth").write_text("\n".join(p for p in sys.path if p.endswith("-packages")))
    code = "import sys; from memory_efficient_gpt_server.cli import main; sys.exit(main(['version']))"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(
        [home / "bin" / "python", "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert memory_efficient_gpt.__version__ in result.stdout, result.stderr

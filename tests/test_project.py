"""Promises of the project's own files: dependencies, packaging and the command's start-up."""

import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RUNTIME = [
    requirement
    for requirement in map(Requirement, PYPROJECT["project"]["dependencies"])
    # environment.yml and constraints.txt are made for newer Pythons than the oldest.
    if not requirement.marker or requirement.marker.evaluate({"python_version": "3.11"})
]
EXTRAS = [
    Requirement(line)
    for extra in PYPROJECT["project"]["optional-dependencies"].values()
    for line in extra
    if not line.startswith("prothpc")
]
PACKAGES = PYPROJECT["tool"]["importlinter"]["root_packages"]

CONDA_NAMES = {
    "isal": "python-isal",
    "matplotlib": "matplotlib-base",
    "torch": "pytorch",
    "xxhash": "python-xxhash",
}
"""Packages that conda-forge calls something else than PyPI does."""

HELP_SECONDS = 0.3
"""`prothpc --help` must feel instant on a login node."""


def lower_bound(requirement: Requirement) -> Version:
    (bound,) = (spec.version for spec in requirement.specifier if spec.operator == ">=")
    return Version(bound)


def conda_versions() -> dict[str, str]:
    """Return the version that environment.yml asks for, by conda package name."""
    environment = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))
    # channel::name, version with operator, build
    parts = re.compile(r"(?:[\w/-]+::)?([\w-]+) ?([^ ]*)(?: .*)?")
    return dict(parts.fullmatch(line).groups() for line in environment["dependencies"])


def pins() -> dict[str, Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {requirement.name: requirement for requirement in pinned}


@pytest.mark.parametrize("requirement", RUNTIME, ids=lambda requirement: requirement.name)
def test_conda_environment_asks_for_every_runtime_dependency(requirement: Requirement) -> None:
    version = conda_versions()[CONDA_NAMES.get(requirement.name, requirement.name)]
    assert Version(version.removeprefix(">=")) >= lower_bound(requirement)


@pytest.mark.parametrize("requirement", RUNTIME + EXTRAS, ids=lambda requirement: requirement.name)
def test_constraints_pin_every_direct_dependency(requirement: Requirement) -> None:
    (pin,) = pins()[requirement.name].specifier
    assert pin.operator == "=="
    assert requirement.specifier.contains(pin.version)


def test_constraints_let_a_machine_choose_its_build_of_torch() -> None:
    assert not any("+" in str(requirement.specifier) for requirement in pins().values())


def test_models_may_use_no_runtime_dependency_but_torch() -> None:
    (contract,) = (
        contract
        for contract in PYPROJECT["tool"]["importlinter"]["contracts"]
        if contract["type"] == "forbidden" and contract["source_modules"] == ["models"]
    )
    assert {requirement.name for requirement in RUNTIME} - {"torch"} <= set(
        contract["forbidden_modules"]
    )


def test_wheel_holds_packages_and_recipes(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=ignored)
    expected = {
        str(path.relative_to(source))
        for package in PACKAGES
        for path in (source / package).rglob("*")
        if path.suffix in (".py", ".toml")
    }
    assert any(name.startswith("hpc/recipes/") for name in expected)

    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*pip, "--wheel-dir", tmp_path, source], check=True, timeout=120)
    (wheel,) = tmp_path.glob("prothpc-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert expected <= set(archive.namelist())


def test_help_answers_at_once_and_without_torch() -> None:
    command = Path(sys.executable).with_name("prothpc")
    seconds = []
    for _ in range(7):
        begin = time.perf_counter()
        shown = subprocess.run([command, "--help"], check=True, capture_output=True, text=True)
        seconds.append(time.perf_counter() - begin)
    assert "train" in shown.stdout
    # The fastest run: whatever else this machine does only ever adds to it.
    assert min(seconds) < HELP_SECONDS, seconds

    traced = subprocess.run(
        [sys.executable, "-X", "importtime", command, "--help"],
        check=True,
        capture_output=True,
        text=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in traced.stderr.splitlines()}
    assert "hpc.cli" in imported
    assert "torch" not in imported

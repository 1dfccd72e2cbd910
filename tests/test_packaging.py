"""What the wheel carries, what the pins promise, and what the Makefile offers."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)], cwd=ROOT, check=True
    )
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_the_wheel_carries_the_studio_the_recipes_and_their_configs(wheel):
    names = set(wheel.namelist())
    for folder, inside in (
        ("diffusionfm", ""),
        ("demo", "diffusionfm/"),
        ("train", "diffusionfm/"),
        ("configs", "diffusionfm/"),
    ):
        for file in (ROOT / folder).rglob("*"):
            if file.is_file() and "__pycache__" not in file.parts:
                assert inside + file.relative_to(ROOT).as_posix() in names
    top = {name.split("/")[0] for name in names}
    assert top == {"diffusionfm", f"diffusionfm-{PROJECT['version']}.dist-info"}
    assert not [name for name in names if name.endswith((".pyc", ".pkl", ".pt", ".bin", ".ckpt"))]
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_wheel_offers_the_command(wheel):
    entry = next(name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "diffusionfm = diffusionfm.cli:main" in wheel.read(entry).decode()


@pytest.mark.slow
def test_the_wheel_s_studio_imports_from_inside_the_package(wheel, tmp_path):
    wheel.extractall(tmp_path)
    code = "import diffusionfm.demo.app as app; assert app.css(); print(app.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()) == tmp_path / "diffusionfm" / "demo" / "app.py"


def test_every_requirement_is_pinned_within_its_range():
    pinned = {name.lower().replace("_", "-"): version for name, version in pins().items()}
    for line in [*PROJECT["dependencies"], *sum(EXTRAS.values(), [])]:
        need = Requirement(line)
        assert need.specifier.contains(pinned[need.name.lower().replace("_", "-")]), line
    assert pinned["torch"] == "2.13.0"


def test_the_pins_name_packages_and_nothing_else():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.]*", line), line


def test_the_floors_stand_where_known_holes_were_closed():
    floors = {"gradio": "6.24", "torch": "2.9.9", "transformers": "5.2", "accelerate": "1.14"}
    needs = {Requirement(line).name: Requirement(line) for line in PROJECT["dependencies"]}
    assert not [name for name, hole in floors.items() if needs[name].specifier.contains(hole)]


def test_the_version_is_said_once():
    import diffusionfm

    assert diffusionfm.__version__ == PROJECT["version"]


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_the_makefile_s_targets_resolve():
    for target in ("install", "demo", "test", "test-all", "lint", "shards", "clean"):
        subprocess.run(["make", "-n", target], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_continuous_integration_runs_the_tests_and_the_lint():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111 and {"make test", "make lint"} <= set(
        script.read_text().splitlines()
    )
    subprocess.run(["bash", "-n", str(script)], check=True)

"""What the README tells people to type, typed: commands and Python with the shipped model; names that must exist."""

import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

from diffusionfm.cli import main

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    """The fenced blocks of one language, continued lines joined."""
    return [b.replace("\\\n", " ") for b in re.findall(rf"```{language}\n(.*?)```", text, re.S)]


def lines(start: str, text: str = README) -> list[str]:
    """The README's command lines that begin so, comments cut."""
    found = [line.split("  #")[0].strip() for block in blocks("bash", text) for line in block.splitlines()]
    return [line for line in found if line.startswith(start)]


@pytest.fixture
def desk(tmp_path, monkeypatch):
    """A folder such as the README's reader has: prompts, and a few pictures with captions."""
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a red apple"}\n{"prompt": "a blue key"}\n')
    (tmp_path / "my-pictures").mkdir()
    for name, color in {"one": "red", "two": "blue"}.items():
        Image.new("RGBA", (64, 64), color).save(tmp_path / f"my-pictures/{name}.png")
        (tmp_path / f"my-pictures/{name}.txt").write_text(f"a {color} square")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_commands_run_one_after_the_other(desk):
    draw = README[README.index("## Draw") : README.index("## The studio")]
    commands = [shlex.split(line)[1:] for line in lines("diffusionfm", draw)]
    assert {command[0] for command in commands} == {"generate", "batch", "finetune"}
    for command in commands:
        assert main([*command, "--steps", "2"]) == 0, command
    made = {path.name for path in desk.glob("*.png")}
    assert made == {"apple.png", "cat-1.png", "cat-2.png", "cat-3.png", "cat-4.png", "fox.png", "green.png"}
    assert Image.open(desk / "apple.png").mode == "RGBA"
    assert len((desk / "pictures/manifest.jsonl").read_text().splitlines()) == 2


def test_the_python_runs(desk):
    for code in blocks("python"):
        names: dict = {}
        exec(compile(code, "README.md", "exec"), names)
        assert names["picture"].mode == "RGBA" and names["picture"].size == (128, 128)


def test_recipes_configs_and_targets_are_there():
    recipes = [shlex.split(line) for line in lines("python train/")]
    assert len(recipes) >= 5
    for _, recipe, config, *_ in recipes:
        assert (ROOT / recipe).is_file() and (ROOT / config).is_file(), recipe
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for line in lines("make "):
        assert f"\n{line.split()[1]}:" in makefile, line


def test_every_place_on_the_map_and_every_link_exists():
    for path in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / path).exists(), path
    house = README[README.index("## Repository layout") :].split("```")[1]
    names = re.findall(r"([\w/]+\.py)\b|^ *([\w/]+/)(?= )", house, re.M)
    assert len(names) > 20
    for file, folder in names:
        name = file or folder
        assert (ROOT / name).exists() or (ROOT / "diffusionfm" / name).exists(), name


def test_no_figure_is_still_to_be_filled_in():
    assert not re.search(r"@[A-Z]+@|TODO|TBD", README)

"""The walls of the house: who may import whom, which package lives in which room, what nobody may call."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIBRARY = ROOT / "diffusionfm"
TOP = {
    "README.md",
    "ATTRIBUTION.md",
    "LICENSE",
    "pyproject.toml",
    "constraints.txt",
    "Makefile",
    ".gitignore",
    ".ci",
}
TOP |= {"diffusionfm", "train", "demo", "tests", "configs"}

PIECES = {
    "flow",
    "attention",
    "config",
    "colors",
    "images",
    "inputs",
    "phrasing",
    "sheets",
    "edit",
    "formats",
    "checks",
    "features",
    "ranks",
    "cost",
    "gpus",
    "outlines",
    "vocabulary",
    "devices",
    "sentences",
    "bert",
    "phrasebook",
}
NETWORKS = {"transformer", "unet", "autoencoder", "text", "encoders", "models"}
USERS = {"batch", "evaluate", "serve", "finetune", "distill"}
DOORS = {"cli", "train", "demo"}
DRAWING = {"pipeline", "drawing", "light", "lora"} | USERS
LOOP = {"trainer", "settings", "resume", "optim", "muon", "ema", "guard", "sharding", "runlog", "runtime"}
TRAINING = LOOP | {"checkpoint", "objectives", "upscaling"}

FORBIDDEN: dict[str, set[str]] = {
    **dict.fromkeys(PIECES, NETWORKS | TRAINING | DRAWING | DOORS | {"data"}),
    **dict.fromkeys(NETWORKS, TRAINING | DRAWING | DOORS | {"data"}),
    **dict.fromkeys(("objectives", "upscaling"), {"trainer", "data"} | DRAWING | DOORS),
    **dict.fromkeys(LOOP, NETWORKS | {"objectives", "data", "flow", "attention"} | DRAWING | DOORS),
    "checkpoint": NETWORKS | {"objectives", "data", "trainer"} | DRAWING | DOORS,
    "data": NETWORKS | TRAINING - {"checkpoint"} | DRAWING | DOORS | {"flow", "attention"},
    "precompute": TRAINING - {"checkpoint"} | DRAWING | DOORS,
    "trace": NETWORKS | DRAWING | DOORS | {"data"},
    "plan": DRAWING | DOORS,
    **dict.fromkeys(("drawing", "light", "pipeline"), TRAINING | USERS | DOORS | {"data"}),
    "batch": TRAINING | DOORS | {"finetune", "serve"},  # data: its shards are written as data writes them
    "evaluate": DOORS | {"trainer", "finetune", "serve"},
    "serve": TRAINING | DOORS | {"data", "evaluate"},
    "finetune": DOORS | {"batch", "serve", "evaluate"},
    "distill": DOORS | {"trainer", "data", "batch", "evaluate", "serve", "finetune"},
    "demo": TRAINING | NETWORKS | {"train", "flow", "attention"},
    "train": {"demo", "cli", "serve"},
}
"""Room -> rooms it may not import, lazily or not. A room is a module of the library or a folder beside it."""

HOMES = {
    "gradio": ("demo/", "diffusionfm/serve/"),
    "webdataset": ("diffusionfm/data/",),
    "accelerate": ("diffusionfm/trainer.py",),
    "xformers": ("diffusionfm/attention.py",),
    "ray": ("diffusionfm/ray_jobs.py",),
    "vtracer": ("diffusionfm/formats.py",),
    "pickle": (),
    "cloudpickle": (),
    "dill": (),
    "shelve": (),
    "marshal": (),
}
"""Where alone a package may be imported; nowhere, for those that unpickle."""

BANNED_CALLS = {
    "torch.load",
    "yaml.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "os.system",
    "os.popen",
    "eval",
    "exec",
}


def sources() -> list[Path]:
    folders = (LIBRARY, ROOT / "train", ROOT / "demo")
    return sorted(file for folder in folders for file in folder.rglob("*.py"))


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def module_of(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room(module: str) -> str:
    """`diffusionfm.data.shards` -> `data`; `demo.app` -> `demo`; `train.vae` -> `train`."""
    parts = module.split(".")
    return parts[1] if parts[0] == "diffusionfm" and len(parts) > 1 else parts[0]


def imports(file: Path) -> Iterator[str]:
    """Every module a file imports, at its top or inside a function, `from X import Y` as X and X.Y."""
    package = module_of(file).split(".")
    if file.name != "__init__.py":
        package = package[:-1]
    for node in ast.walk(tree(file)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


def ours(name: str) -> bool:
    return name.split(".")[0] in {"diffusionfm", "train", "demo"}


def place(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def test_rooms_import_only_what_lies_below_them():
    broken = [
        f"{place(file)} imports {name}"
        for file in sources()
        for name in sorted(set(filter(ours, imports(file))))
        if room(name) in FORBIDDEN.get(room(module_of(file)), set())
    ]
    assert not broken, "\n".join(broken)


def test_the_library_never_imports_the_recipes_or_the_studio():
    broken = [
        f"{place(file)} imports {name}"
        for file in sources()
        for name in imports(file)
        if LIBRARY in file.parents and name.split(".")[0] in {"train", "demo", "tests"}
    ]
    assert not broken, "\n".join(broken)


def test_recipes_never_import_each_other():
    names = {file.stem for file in (ROOT / "train").glob("*.py")} - {"__init__"}
    broken = [
        f"{place(file)} imports {name}"
        for file in sorted((ROOT / "train").glob("*.py"))
        for name in imports(file)
        if name.split(".")[0] == "train" and name.count(".") and name.split(".")[1] in names - {file.stem}
    ]
    assert not broken, "\n".join(broken)


def test_packages_stay_in_their_rooms():
    broken = [
        f"{place(file)} imports {name}"
        for file in sources()
        for name in imports(file)
        if name.split(".")[0] in HOMES
        and not place(file).startswith(HOMES[name.split(".")[0]] or ("nowhere",))
    ]
    assert not broken, "\n".join(broken)


def test_nothing_unpickles_evaluates_or_opens_a_shell():
    broken = []
    for file in sources():
        for node in ast.walk(tree(file)):
            if not isinstance(node, ast.Call):
                continue
            options = {keyword.arg: getattr(keyword.value, "value", None) for keyword in node.keywords}
            if ast.unparse(node.func) in BANNED_CALLS:
                broken.append(f"{place(file)}:{node.lineno} calls {ast.unparse(node.func)}")
            for option, value in (
                ("shell", True),
                ("allow_pickle", True),
                ("trust_remote_code", True),
                ("strict", False),
            ):
                if options.get(option) is value and not ast.unparse(node.func).startswith("zip"):
                    broken.append(f"{place(file)}:{node.lineno} passes {option}={value}")
    assert not broken, "\n".join(broken)


def test_no_error_is_swallowed_whole():
    broken = [
        f"{place(file)}:{node.lineno} catches {ast.unparse(node.type) if node.type else 'everything'}"
        for file in sources()
        for node in ast.walk(tree(file))
        if isinstance(node, ast.ExceptHandler)
        and (node.type is None or ast.unparse(node.type) in {"Exception", "BaseException"})
        and not any(isinstance(inner, ast.Raise) and inner.exc is None for inner in ast.walk(node))
    ]
    assert not broken, "\n".join(broken)


def test_every_file_says_what_lives_there():
    files = [*sources(), *sorted((ROOT / "tests").glob("*.py"))]
    assert not [place(file) for file in files if not ast.get_docstring(tree(file))]


def test_the_top_level_is_fixed():
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert {line.split("/")[0] for line in listed} <= TOP


@pytest.mark.parametrize("code", ["import diffusionfm", "from diffusionfm.cli import main; main(['--help'])"])
def test_the_import_and_the_help_stay_cheap(code):
    heavy = (
        "import sys; assert not {'torch', 'diffusers', 'transformers', 'gradio', 'pandas'} & set(sys.modules)"
    )
    program = f"try:\n    {code}\nexcept SystemExit:\n    pass\n{heavy}"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)

"""The command line: what it draws, what it refuses, how fast it starts."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from PIL import Image

from diffusionfm.batch.manifest import locked
from diffusionfm.cli import build_parser, main, output_files
from diffusionfm.images import read_parameters
from diffusionfm.inputs import contain, open_picture


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "diffusionfm.cli", *arguments], capture_output=True, text=True
    )


def test_generate_writes_the_picture(tiny_model, tmp_path, capsys):
    command = ["generate", "a red apple", "--model", str(tiny_model), "--seed", "7", "--device", "cpu"]
    assert main([*command, "-o", str(tmp_path / "new" / "apple.png")]) == 0
    assert str(tmp_path / "new" / "apple.png") in capsys.readouterr().out
    found = read_parameters(tmp_path / "new" / "apple.png")
    assert (
        found["prompt"] == "a red apple"
        and found["seed"] == 7
        and found["model"] == "tiny"
        and found["steps"] == 3
    )
    assert main([*command, "-o", str(tmp_path / "again.png")]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / "new" / "apple.png").read_bytes()
    assert main([*command, "-o", str(tmp_path / "bare.png"), "--no-metadata"]) == 0
    assert read_parameters(tmp_path / "bare.png") == {}


def test_generate_from_a_picture_and_under_a_mask(tiny_model, tmp_path, capsys):
    command = ["generate", "yellow star", "--model", str(tiny_model), "--device", "cpu", "--quiet"]
    photo, mask = Image.effect_noise((90, 60), 80), Image.new("L", (90, 60))
    photo.save(tmp_path / "photo.jpg")
    mask.paste(255, (30, 20, 60, 40))
    mask.save(tmp_path / "mask.png")
    image = ["--image", str(tmp_path / "photo.jpg"), "-o"]
    drawn = {}
    for name, more in {
        "a": [],
        "b": ["--strength", "0.9"],
        "c": ["--mask", str(tmp_path / "mask.png")],
    }.items():
        assert main([*command, *image, str(tmp_path / f"{name}.png"), *more]) == 0
        drawn[name] = read_parameters(tmp_path / f"{name}.png")["strength"]
    assert drawn == {"a": 0.8, "b": 0.9, "c": 1.0}
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in drawn}) == 3
    fitted = contain(open_picture(tmp_path / "photo.jpg"), 32, 32)
    with Image.open(tmp_path / "c.png") as image_c:
        assert image_c.crop((0, 0, 10, 32)).tobytes() == fitted.crop((0, 0, 10, 32)).tobytes()
        assert image_c.tobytes() != fitted.tobytes()
    assert main([*command[:1], "", *command[2:], *image, str(tmp_path / "d.png")]) == 0
    assert "prompt" not in read_parameters(tmp_path / "d.png")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--strength", "0.5"], "give --image FILE"),
        (["--mask", "m.png"], "give --image FILE"),
        (["--image", "gone.png"], "gone.png"),
        (["--image", __file__], "the picture of --image cannot be read"),
        (["--image", __file__, "--strength", "2"], "strength must be a number from 0.01 to 1"),
    ],
)
def test_bad_pictures_to_set_out_from_are_told_in_a_line(more, words, capsys):
    assert main(["generate", "yellow star", *more]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1


def test_several_and_json(tiny_model, tmp_path, capsys):
    command = [
        "generate",
        "yellow star",
        "--model",
        str(tiny_model),
        "--seed",
        "5",
        "--n",
        "3",
        "--json",
        "--device",
        "cpu",
    ]
    assert (
        main(
            [*command, "--steps", "2", "--guidance", "1.5", "--width", "48", "-o", str(tmp_path / "star.png")]
        )
        == 0
    )
    answer = json.loads(capsys.readouterr().out)
    assert [image["seed"] for image in answer["images"]] == [5, 6, 7] and answer["guidance"] == 1.5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["star-1.png", "star-2.png", "star-3.png"]
    with Image.open(tmp_path / "star-3.png") as image:
        assert image.mode == "RGBA" and image.size == (48, 32)


def test_output_names(tmp_path):
    assert [p.name for p in output_files(str(tmp_path), "A red, apple!", 3, 2)] == [
        "a-red-apple-3.png",
        "a-red-apple-4.png",
    ]
    with pytest.raises(ValueError, match="must be a .png"):
        output_files("a.jpg", "x", 0, 1)
    assert [p.name for p in output_files("a.webp", "x", 0, 2, ".webp")] == ["a-1.webp", "a-2.webp"]


def test_generate_in_other_formats(tiny_model, tmp_path, capsys):
    command = ["generate", "yellow star", "--model", str(tiny_model), "--device", "cpu", "--quiet"]
    assert main([*command, "-o", str(tmp_path / "a.svg")]) == 0
    assert (tmp_path / "a.svg").read_text().startswith("<svg") and "yellow star" in (
        tmp_path / "a.svg"
    ).read_text()
    assert main([*command, "-o", f"{tmp_path}/", "--format", "webp", "--no-metadata"]) == 0
    with Image.open(tmp_path / "yellow-star-0.webp") as image:
        assert image.mode == "RGBA" and image.size == (32, 32) and not image.getexif()
    assert main([*command, "-o", str(tmp_path / "b.png"), "--background", "sky blue", "--size", "80"]) == 0
    with Image.open(tmp_path / "b.png") as image:
        assert image.mode == "RGB" and image.size == (80, 80)
    assert read_parameters(tmp_path / "b.png")["width"] == 32  # as it was drawn


def test_batch_dry_run_then_svg_from_standard_input(tiny_model, tmp_path, capsys, monkeypatch):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "animals.txt").write_text("cat\ndog\n")
    command = ["batch", "-", "--out", str(tmp_path / "out"), "--model", str(tiny_model), "--device", "cpu"]
    command += ["--wildcards", str(tmp_path / "words"), "--format", "svg", "--seed", "5"]
    for more in (["--dry-run"], ["--json"], []):
        text = io.BytesIO(b"{red|blue} __animals__ --s 2\nfish --w 48\n")
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(text))
        assert main([*command, *more]) == 0
        said = capsys.readouterr().out
        if more == ["--dry-run"]:
            assert "3 rows, 3 pictures: 3 to make" in said and "2 of 32 x 32 pixels, 2 steps" in said
            assert not (tmp_path / "out").exists()
        elif more:
            assert json.loads(said)["made"] == 3 and len(list((tmp_path / "out").glob("*.svg"))) == 3
    assert "0 made, 3 already there" in said
    prompts = {json.loads(line)["prompt"] for line in (tmp_path / "out" / "manifest.jsonl").open()}
    assert "fish" in prompts and prompts < {
        "fish",
        *(f"{c} {a}" for c in ("red", "blue") for a in ("cat", "dog")),
    }


def test_a_batch_s_seed_draws_the_same_bytes(tiny_model, tmp_path, capsys):
    (tmp_path / "rows.txt").write_text("a fish --l 2\na cat\n")
    shared = ["--model", str(tiny_model), "--device", "cpu"]
    assert (
        main(["batch", str(tmp_path / "rows.txt"), "--out", str(tmp_path), "--deterministic", *shared]) == 0
    )
    record = json.loads((tmp_path / "manifest.jsonl").read_text().splitlines()[0])
    again = ["generate", record["prompt"], "--seed", str(record["seed"]), "--guidance", "2"]
    assert main([*again, "-o", str(tmp_path / "again.png"), *shared]) == 0
    assert (tmp_path / "again.png").read_bytes() == (tmp_path / record["file"]).read_bytes()


def test_batch_and_redraw(tiny_model, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"id": "a", "prompt": "fish"}\n{"id": "b", "prompt": ""}\n')
    assert (
        main(
            [
                "batch",
                str(rows),
                "--out",
                str(tmp_path / "out"),
                "--model",
                str(tiny_model),
                "--device",
                "cpu",
            ]
        )
        == 1
    )
    assert "1 made, 0 already there, 1 failed" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "manifest.jsonl").read_text().splitlines()[-1])
    again = ["generate", "fish", "--seed", str(record["seed"]), "-o", str(tmp_path / "again.png")]
    assert record["status"] == "ok"
    assert main([*again, "--model", str(tiny_model), "--device", "cpu"]) == 0
    with Image.open(tmp_path / "again.png") as one, Image.open(tmp_path / "out" / "a.png") as two:
        assert one.tobytes() == two.tobytes()
    rows.write_text('{"id": "a", "prompt": "fish"}\n{"id": "b", "prompt": "bird"}\n')
    again = [
        "batch",
        str(rows),
        "--out",
        str(tmp_path / "out"),
        "--model",
        str(tiny_model),
        "--device",
        "cpu",
    ]
    capsys.readouterr()
    assert main(again) == 1 and "0 made, 1 already there, 1 failed" in capsys.readouterr().out
    with locked(tmp_path / "out"):
        assert main(again) == 2 and "another process" in capsys.readouterr().err
    assert main([*again[:3], "/proc/drawn", *again[4:]]) == 2
    assert "/proc/drawn cannot be made" in capsys.readouterr().err
    assert main([*again, "--retry-failed"]) == 0
    assert "1 made, 1 already there, 0 failed" in capsys.readouterr().out


BAD = {
    "empty prompt": (["generate", " "], "prompt is empty"),
    "steps": (["generate", "x", "--steps", "0"], "steps must be from 1 to 500"),
    "word for a number": (["generate", "x", "--steps", "many"], "invalid int value"),
    "size": (["generate", "x", "--width", "100"], "multiple of 16"),
    "guidance": (["generate", "x", "--guidance", "nan"], "guidance must be"),
    "seed": (["generate", "x", "--seed", "-1"], "seed must be"),
    "n": (["generate", "x", "--n", "0"], "number of images"),
    "suffix": (["generate", "x", "-o", "a.jpg"], "must be a .png"),
    "model": (["generate", "x", "--model", "nowhere"], "no model folder at nowhere"),
    "lora": (["generate", "x", "--model", "MODEL", "--lora", "nowhere:0.5"], "no LoRA folder at nowhere"),
    "lora scale": (["generate", "x", "--model", "MODEL", "--lora", "nowhere:x"], "DIR:scale"),
    "dtype": (["generate", "x", "--dtype", "int8"], "invalid choice"),
    "flag": (["generate", "x", "--stpes", "3"], "unrecognized arguments"),
    "command": (["generat", "x"], "invalid choice"),
    "no command": ([], "required"),
    "rows": (["batch", "none.jsonl", "--out", "OUT"], "no such file"),
    "no rows": (["batch", "EMPTY", "--out", "OUT"], "holds no prompt"),
    "batch size": (["batch", "EMPTY", "--out", "OUT", "--batch-size", "0"], "must be from 1"),
    "wildcards": (["batch", "FOLDER", "--out", "OUT", "--wildcards", "nowhere"], "no wildcards folder"),
    "svg in shards": (
        ["batch", "EMPTY", "--out", "OUT", "--to", "parquet", "--format", "svg"],
        "SVG goes to a folder",
    ),
    "shard size": (["batch", "EMPTY", "--out", "OUT", "--samples-per-shard", "0"], "a shard holds from 1"),
    "sheets": (["batch", "EMPTY", "--out", "OUT", "--sheets", "-1"], "contact sheets must be"),
    "no model": (["batch", "ROWS", "--out", "OUT", "--model", "nowhere"], "no model folder"),
    "out is a file": (["batch", "ROWS", "--out", "ROWS"], "is a file"),
    "workers": (["batch", "EMPTY", "--out", "OUT", "--engine", "ray", "--workers", "-1"], "workers must be"),
    "background": (["generate", "x", "--background", "reddish"], "unknown colour 'reddish'"),
    "enlarged": (["generate", "x", "--size", "5"], "size must be from 16"),
    "two formats": (["generate", "x", "-o", "a.png", "--format", "svg"], "not named as a svg"),
    "port": (["demo", "--port", "99999"], "port"),
    "pictures": (["finetune", "nowhere", "--out", "OUT"], "no such folder"),
    "config": (["shards", "build", "none.yaml", "--out", "OUT"], "no such config"),
    "no shards": (["shards", "verify", "FOLDER"], "shard"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_one_line_and_exit_2(name, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "rows.txt").write_text("fish\n")
    (tmp_path / "folder").mkdir()
    places = {
        "MODEL": str(tiny_model),
        "OUT": "out",
        "EMPTY": "empty.txt",
        "ROWS": "rows.txt",
        "FOLDER": "folder",
    }
    arguments, words = BAD[name]
    try:
        code = main([places.get(word, word) for word in arguments])
    except SystemExit as stop:  # argparse's own
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2 and captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1 and words in captured.err
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob("*.png"))


def test_device_that_is_not_here(tiny_model, capsys):
    assert main(["generate", "x", "--model", str(tiny_model), "--device", "abacus"]) == 2
    assert "no device 'abacus'" in capsys.readouterr().err


def test_every_help_has_examples(capsys):
    for words in (
        "",
        "generate",
        "batch",
        "finetune",
        "export",
        "plan",
        "evaluate",
        "demo",
        "shards",
        "shards build",
        "shards pack",
        "shards inspect",
        "shards verify",
        "shards attribution",
    ):
        with pytest.raises(SystemExit) as stop:
            build_parser().parse_args([*words.split(), "--help"])
        assert stop.value.code == 0
        assert "examples:\n  diffusionfm" in capsys.readouterr().out


def test_the_studio_is_told_what_its_files_and_its_log_may_hold(tiny_model, monkeypatch):
    app = pytest.importorskip("demo.app")
    from diffusionfm.serve import logs

    seen = {}

    def launch(studio, models, port, inbrowser, access, log_prompts):
        seen["log_prompts"] = log_prompts
        raise OSError("enough")

    def build(models, runs, metadata):
        seen["metadata"] = metadata

    monkeypatch.setattr(app, "build", build)
    monkeypatch.setattr(app, "launch", launch)
    monkeypatch.setattr(logs, "to_stderr", lambda: seen.update(logged=True))
    command = ["demo", "--model", str(tiny_model), "--device", "cpu"]
    for more, (metadata, log_prompts) in (
        ([], (True, False)),
        (["--no-metadata", "--log-prompts"], (False, True)),
    ):
        assert main([*command, *more]) == 2
        assert seen == {"logged": True, "metadata": metadata, "log_prompts": log_prompts}
        seen.clear()


def test_help_version_and_errors_import_nothing_heavy():
    code = "import sys, diffusionfm.cli as c\ntry: c.main({})\nexcept SystemExit: pass\n"
    code += "print([m for m in {} if m in sys.modules])"
    heavy = ["torch", "numpy", "diffusers", "transformers", "gradio", "pyarrow"]
    for arguments in (
        ["--help"],
        ["--version"],
        ["generate", "x", "--steps", "0"],
        ["generate", "x", "--model", "no"],
    ):
        done = subprocess.run(
            [sys.executable, "-c", code.format(arguments, heavy)], capture_output=True, text=True
        )
        assert done.stdout.strip().endswith("[]"), done.stdout + done.stderr
    assert run("--version").stdout.startswith("diffusionfm ")


def test_pack_then_look(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for k in range(3):
        Image.new("RGBA", (40, 40), (80 * k, 0, 0, 255)).save(pictures / f"{k}.png")
        (pictures / f"{k}.txt").write_text(f"square {k}")
    shards = str(tmp_path / "shards")
    assert main(["shards", "pack", str(pictures), "--out", shards, "--size", "32"]) == 0
    assert main(["shards", "verify", shards]) == 0
    capsys.readouterr()
    assert main(["shards", "inspect", shards, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 3
    assert (tmp_path / "shards" / "contact_sheet.png").is_file()
    assert main(["shards", "attribution", shards]) == 0
    assert capsys.readouterr().out.startswith("# Attribution")
    assert main(["shards", "words", shards, "-o", str(tmp_path / "words.txt")]) == 0
    assert (tmp_path / "words.txt").read_text() == ""  # a word is learned from three pictures
    tar = next((tmp_path / "shards").glob("*.tar"))
    tar.write_bytes(tar.read_bytes()[:3000])
    assert main(["shards", "verify", shards]) == 1
    assert tar.name in capsys.readouterr().out

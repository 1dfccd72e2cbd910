"""Fine-tune on three real sets that the shipped model never saw: grids of before and after, and the losses.

python tests/benchmarks/finetune_sets.py --out runs/finetune-sets [--set freehand] [--steps 300]

freehand: a hand-drawn style, 32 drawings of Streamline's Freehand (CC-BY-4.0).
smile: one character in 32 moods, by DiceBear's Big Smile (CC-BY-4.0, Ashley Seo) from options that captions name.
duotone: an icon family, 36 of Phosphor's duotone icons (MIT), in purple.

Each package is fetched by npm once; `smile` runs node. A set becomes a folder of PNG and .txt files, is fine-tuned with
the laptop preset, and draws prompts that are not in it: OUT/NAME/{pictures,lora,grid.png}, and OUT/results.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from diffusionfm.checkpoint import write_json
from diffusionfm.checks import read_json
from diffusionfm.data.icons.fetch import Package, fetch
from diffusionfm.data.icons.names import Words
from diffusionfm.data.icons.render import inked, render
from diffusionfm.data.icons.sources import Drawing
from diffusionfm.finetune import RECORD, configure, run
from diffusionfm.images import contact_sheet, save_png
from diffusionfm.phrasing import article
from diffusionfm.pipeline import DiffusionFMPipeline

SIZE = 256
ICONIFY = Package("npm", "@iconify/json", "2.2.535")
DICEBEAR = [Package("npm", f"@dicebear/{name}", "9.4.3") for name in ("core", "big-smile")]
FREEHAND = (  # noqa: SIM905, one list, read as one
    "amusement-park-castle:castle business-metaphor-lucky-cat:lucky_cat business-metaphor-shark:shark "
    "disability-service-dog:dog saving-bear-market:bear camera:camera circus-tent:tent home-chimney-2:house "
    "alert-alarm-clock:alarm_clock alert-alarm-bell:bell book-flip-page:open_book color-brush-1:paint_brush "
    "content-typewriter:typewriter delete-skull:skull fireworks-2:fireworks instrument-saxophone:saxophone "
    "modern-music-bass-guitar:guitar office-desk-lamp:lamp microphone:microphone money-bag:money_bag "
    "office-stapler-1:stapler show-hat-magician:magic_hat shopping-basket-favorite-star:basket "
    "time-hourglass-triangle:hourglass vinyl-record-gramophone:gramophone wealth-treasure-chest-open:treasure_chest "
    "smiley-wink:winking_face smiley-happy:happy_face smiley-grumpy:grumpy_face accounting-abacus:abacus "
    "business-metaphor-boat-success:boat safety-fire-extinguisher:fire_extinguisher"
).split()
DUOTONE = (  # noqa: SIM905
    "acorn airplane ambulance anchor armchair avocado backpack balloon bed bicycle bird boat bomb bone book bread "
    "bridge bug butterfly cactus cake camera campfire carrot cat cheese cherries cloud coffee cookie cow dress egg "
    "fish flower key"
).split()
EYES = {"cheery": "cheery", "normal": "round", "starstruck": "starry", "winking": "winking", "sad": "sad"}
EYES |= {"sleepy": "sleepy", "angry": "angry", "confused": "confused"}
MOUTHS = {"openedSmile": "an open smile", "unimpressed": "a flat mouth", "openSad": "an open sad mouth"}
MOUTHS |= {"teethSmile": "a toothy smile"}
SMILE_JS = """
import { createAvatar } from '@dicebear/core';
import * as style from '@dicebear/big-smile';
const faces = JSON.parse(process.argv[2]);
const fixed = { hair: ['curlyBob'], hairColor: ['605de4'], skinColor: ['efcc9f'], accessoriesProbability: 0 };
console.log(JSON.stringify(faces.map(([eyes, mouth]) =>
    createAvatar(style, { ...fixed, eyes: [eyes], mouth: [mouth] }).toString())));
"""
Pictures = Iterator[tuple[str, str, Image.Image]]  # name, caption, picture


@dataclass(frozen=True)
class Set:
    """A set to fine-tune on: its pictures, and prompts that are not among their captions."""

    pictures: Callable[[], Pictures]
    prompts: tuple[str, ...]
    trigger: str = ""


def iconify(source: str, names: dict[str, str], caption: str, ink: str) -> Pictures:
    """Icons of one Iconify set in one ink: name in the set -> phrase for the caption."""
    data = json.loads((fetch(ICONIFY) / "json" / f"{source}.json").read_text(encoding="utf-8"))
    for name, phrase in names.items():
        icon = data["icons"][name]
        width, height = icon.get("width", data.get("width", 16)), icon.get("height", data.get("height", 16))
        svg = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="0 0 {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )
        picture = draw(source, name, svg)
        yield name, caption.format(article(phrase)), inked(picture, ink)


def draw(source: str, name: str, svg: str) -> Image.Image:
    """SVG markup as an RGBA picture."""
    picture = render(Drawing(source, name, Words(name), "", "", "", "", svg=svg), SIZE)
    assert picture is not None, f"{source}: {name} draws nothing"
    return picture


def freehand() -> Pictures:
    names = {name: phrase.replace("_", " ") for name, _, phrase in (pair.partition(":") for pair in FREEHAND)}
    return iconify("streamline-freehand", names, "a black hand drawn icon of {}", "black")


def duotone() -> Pictures:
    return iconify(
        "ph", {f"{name}-duotone": name for name in DUOTONE}, "a purple duotone icon of {}", "purple"
    )


def smile() -> Pictures:
    """One character, drawn by its package's own code."""
    faces = list(itertools.product(EYES, MOUTHS))
    with tempfile.TemporaryDirectory() as made:
        modules = Path(made) / "node_modules" / "@dicebear"
        modules.mkdir(parents=True)
        for package in DICEBEAR:
            # links would be followed, and the packages would not find each other
            subprocess.run(
                ["cp", "-r", str(fetch(package)), str(modules / package.name.split("/")[1])], check=True
            )
        script = Path(made) / "smile.mjs"
        script.write_text(SMILE_JS)
        command = ["node", str(script), json.dumps(faces)]
        drawn = subprocess.run(command, cwd=made, capture_output=True, text=True, check=True).stdout
    for (eyes, mouth), svg in zip(faces, json.loads(drawn), strict=True):
        caption = f"a face of [trigger] with {EYES[eyes]} eyes and {MOUTHS[mouth]}"
        yield f"{eyes}-{mouth}", caption, draw("big-smile", eyes, svg)


SETS = {
    "freehand": Set(
        freehand, tuple(f"a black hand drawn icon of {x}" for x in ("a cat", "a star", "a tree", "a car"))
    ),
    "smile": Set(
        smile,
        (
            "a face of [trigger] with winking eyes and a flat mouth",
            "a face of [trigger] with starry eyes and a toothy smile",
            "a face of [trigger] on a sky blue background",
            "a smiling face",
        ),
        trigger="zkw",
    ),
    "duotone": Set(
        duotone, tuple(f"a purple duotone icon of {x}" for x in ("a house", "a dog", "a heart", "an apple"))
    ),
}


def write_pictures(pictures: Pictures, folder: Path) -> int:
    """Write PNG files with captions beside them; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    made = list(pictures)
    for name, caption, picture in made:
        save_png(picture, folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(caption + "\n")
    return len(made)


def grid(model: str | None, lora: Path, prompts: list[str], out: Path) -> None:
    """Prompts drawn by the model (upper row) and with the LoRA (lower row), one seed."""
    images, labels = [], []
    for name in ("model", "adapted"):
        pipe = DiffusionFMPipeline.from_pretrained(model)
        if name == "adapted":
            pipe.load_lora(lora)
        images += pipe(prompts, seed=0).images
        labels += prompts if name == "model" else ["adapted"] * len(prompts)
    save_png(contact_sheet(images, labels, columns=len(prompts), cell=192), out)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/finetune-sets"))
    parser.add_argument(
        "--set", choices=SETS, action="append", help="which (default all); may be given several times"
    )
    parser.add_argument("--steps", type=int, help="training steps (default: the preset's)")
    parser.add_argument(
        "--prior", type=float, default=1.0, help="weight of the model's own pictures (default 1)"
    )
    parser.add_argument("--model", help="pipeline folder to start from (default: the shipped model)")
    args = parser.parse_args()
    results = {}
    for name in args.set or SETS:
        chosen, folder = SETS[name], args.out / name
        count = write_pictures(chosen.pictures(), folder / "pictures")
        began = time.monotonic()
        lora = run(
            configure(
                folder / "pictures", folder / "lora", model=args.model, steps=args.steps,
                trigger=chosen.trigger, prompts=list(chosen.prompts), prior=args.prior,
            )
        )  # fmt: skip
        minutes = (time.monotonic() - began) / 60
        prompts = [prompt.replace("[trigger]", chosen.trigger) for prompt in chosen.prompts]
        grid(args.model, lora, prompts, folder / "grid.png")
        record = read_json(lora / RECORD)
        results[name] = {
            "pictures": count,
            "minutes": round(minutes, 2),
            **record["ended"],
            **record["results"],
        }
        write_json(args.out / "results.json", results)
        print(json.dumps({name: results[name]}, indent=1))


if __name__ == "__main__":
    main()

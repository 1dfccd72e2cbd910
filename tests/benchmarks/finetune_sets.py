"""Fine-tune on three real sets that the shipped model never saw: grids of before and after, losses, rules.

python tests/benchmarks/finetune_sets.py --out runs/finetune-sets [--set doodle] [--steps 300]

doodle: a hand-drawn style, 40 of Khushmeen Sidhu's Doodle Icons (npm's doodle-icons, MIT).
smile: one character in 32 moods, by DiceBear's Big Smile (CC-BY-4.0, Ashley Seo) from options that captions name.
duotone: an icon family, 36 of Phosphor's duotone icons (MIT), in purple.

None of the packages is in configs/data/icons.yaml, nor their drawings in a package that is.

Each package is fetched by npm once; `smile` runs node. A set becomes a folder of PNG and .txt files, is fine-tuned with
the laptop preset, and draws things that are not in it (of the character, moods): OUT/NAME/{pictures,lora,grid.png}, all
in OUT/grid.png.
What it cost: the scorecard's rules (colours, transparency, counting, places, pairs), by the same prompts and seeds
before and after. OUT/results.json holds every number; a set run by itself joins those that are there.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from common import show
from PIL import Image

from diffusionfm.checkpoint import write_json
from diffusionfm.checks import read_json
from diffusionfm.data.icons.fetch import Package, fetch
from diffusionfm.data.icons.names import Words
from diffusionfm.data.icons.render import inked, render
from diffusionfm.data.icons.sources import Drawing
from diffusionfm.evaluate import scorecard
from diffusionfm.evaluate.lines import Figure, rule_figures
from diffusionfm.evaluate.protocol import Item, rule_items, spread
from diffusionfm.evaluate.rules import LINES, SAMPLES
from diffusionfm.finetune import RECORD, configure, load_preset, run
from diffusionfm.finetune.settings import check_record
from diffusionfm.images import contact_sheet, save_png
from diffusionfm.phrasing import article
from diffusionfm.pipeline import DiffusionFMPipeline

SIZE = 256
CELL = 192  # pixels a picture in the grids
A_STEP, A_PICTURE = 1.6, 1.0  # seconds, of two CPU cores with AVX2
DOODLES = Package("npm", "doodle-icons", "1.1.0")
PHOSPHOR = Package("npm", "@phosphor-icons/core", "2.1.1")
DICEBEAR = [Package("npm", f"@dicebear/{name}", "9.4.3") for name in ("core", "big-smile")]
DOODLE = (  # noqa: SIM905, one list, read as one
    "Anchor Bag Balloon Basket Bell Bot:robot Bottle Bulb:light_bulb Burger Bus Cake Camera:movie_camera "
    "Candy:candy_cane Clock Cloud Cookie Crown Diamond Egg:fried_egg Fire Flashlight Gift Globe Guitar "
    "HotAirBalloon:hot_air_balloon IceCream:ice_cream Key Lock MagicWand:magic_wand Microscope Pencil "
    "PiggyBank:piggy_bank Pizza Plane Popsicle Ship Snowman Sofa Trophy Tv:television"
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
    """A set to fine-tune on: its pictures, and prompts to draw before and after."""

    pictures: Callable[[], Pictures]
    prompts: tuple[str, ...]
    trigger: str = ""


def draw(source: str, name: str, svg: str) -> Image.Image:
    """SVG markup as an RGBA picture."""
    picture = render(Drawing(source, name, Words(name), "", "", "", "", svg=svg), SIZE)
    assert picture is not None, f"{source}: {name} draws nothing"
    return picture


def doodle() -> Pictures:
    """Drawings that the package keeps as React components: their paths are read, nothing is run."""
    code = (fetch(DOODLES) / "build" / "index.es.js").read_text(encoding="utf-8")
    parts = re.split(r"var Svg(\w+) = function", code)
    components = dict(zip(parts[1::2], parts[2::2], strict=True))
    for name, _, phrase in (pair.partition(":") for pair in DOODLE):
        body, _, _ = components[name].partition('"defs"')  # clip paths follow, which clip nothing
        box = re.search(r'viewBox: "([\d. ]+)"', body)
        assert box is not None, name
        paths = "".join(f'<path d="{path}"/>' for path in re.findall(r'\bd: "([^"]+)"', body))
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box[1]}">{paths}</svg>'
        thing = (phrase or name.lower()).replace("_", " ")
        yield name, f"a doodle of {article(thing)}", draw("doodle-icons", name, svg)


def duotone() -> Pictures:
    for name in DUOTONE:
        svg = (fetch(PHOSPHOR) / "assets" / "duotone" / f"{name}-duotone.svg").read_text(encoding="utf-8")
        yield name, f"a purple duotone icon of {article(name)}", inked(draw("phosphor", name, svg), "purple")


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
    "doodle": Set(doodle, tuple(f"a doodle of {x}" for x in ("a cat", "a heart", "a rocket", "a fish"))),
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


def opened(model: str | None, lora: Path | None = None) -> DiffusionFMPipeline:
    """The model, with the LoRA if there is one."""
    pipe = DiffusionFMPipeline.from_pretrained(model)
    if lora is not None:
        pipe.load_lora(lora)
    return pipe


def grid(model: str | None, lora: Path, name: str, prompts: list[str], out: Path) -> None:
    """Prompts drawn by the model (upper row) and with the LoRA (lower row), one seed."""
    images = [
        picture for pipe in (opened(model), opened(model, lora)) for picture in pipe(prompts, seed=0).images
    ]
    labels = [*prompts, *[f"{name}, adapted"] * len(prompts)]
    save_png(contact_sheet(images, labels, columns=len(prompts), cell=CELL), out)


def stack(files: list[Path], out: Path) -> None:
    """The grids of several sets, one below the other, in 128 colours: a third of the bytes."""
    grids = [Image.open(file).convert("RGB") for file in files]
    sheet = Image.new("RGB", (max(g.width for g in grids), sum(g.height for g in grids)), "white")
    for k, picture in enumerate(grids):
        sheet.paste(picture, (0, sum(g.height for g in grids[:k])))
    sheet.quantize(128, dither=Image.Dither.NONE).save(out, optimize=True)


def rule_items_of(count: int) -> list[Item]:
    """So many prompts of each of the scorecard's lines of rules, with the scorecard's seeds."""
    lines = [rule_items(line, 1000 * k) for k, line in enumerate(LINES)]
    return [item for items in lines for item in spread(items, count)]


def rules_of(pipe: DiffusionFMPipeline, items: list[Item], name: str) -> dict[str, Figure]:
    """Rule -> the share of its pictures that keep it, as the scorecard draws and judges them."""
    began = time.monotonic()

    def progress(done: int, total: int) -> None:
        if done % 80 == 0 or done == total:
            print(
                f"{name}: {done} of {total} pictures for the rules, {time.monotonic() - began:.0f} s",
                flush=True,
            )

    return rule_figures(items, scorecard.draw(pipe, items, progress))


def compare(base: dict[str, Figure], adapted: dict[str, Figure]) -> dict[str, Figure]:
    """Rule -> both shares, and by how many percentage points the adapted model's is higher."""
    return {
        rule: {
            "base": base[rule],
            "adapted": adapted[rule],
            "points": round(100 * (adapted[rule]["share"] - base[rule]["share"]), 1),
        }
        for rule in base
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/finetune-sets"))
    parser.add_argument(
        "--set", choices=SETS, action="append", help="which; may be given several times; without it all"
    )
    parser.add_argument("--steps", type=int, help="training steps; without it the preset's")
    parser.add_argument("--prior", type=float, default=1.0, help="weight of the model's own pictures")
    parser.add_argument(
        "--rules", type=int, default=120, help=f"prompts of each line of rules, 0 to {SAMPLES}; 0 draws none"
    )
    parser.add_argument("--model", help="pipeline folder to start from; without it the shipped model")
    args = parser.parse_args()
    if not 0 <= args.rules <= SAMPLES:
        parser.error(f"--rules is from 0 to {SAMPLES}, not {args.rules}")
    names, items = args.set or list(SETS), rule_items_of(args.rules)
    pipe = opened(args.model)
    for name in names:  # before half an hour is spent
        check_record(args.out / name / "lora", {"base": pipe.base_hash})
    steps = args.steps or load_preset("laptop").trainer.steps
    seconds = len(names) * steps * A_STEP + (len(names) + 1) * len(items) * A_PICTURE
    print(f"{len(names)} sets of {steps} steps, {len(items)} pictures for the rules before and after each:")
    print(f"about {seconds / 60:.0f} minutes on two CPU cores", flush=True)
    base = rules_of(pipe, items, "model")
    known = args.out / "results.json"
    results = read_json(known) if known.is_file() else {}
    for name in names:
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
        grid(args.model, lora, name, prompts, folder / "grid.png")
        grids = [args.out / other / "grid.png" for other in SETS]
        stack([file for file in grids if file.is_file()], args.out / "grid.png")
        record = read_json(lora / RECORD)
        results[name] = {
            "pictures": count,
            "minutes": round(minutes, 2),
            **record["ended"],
            **record["results"],
            "rules": compare(base, rules_of(opened(args.model, lora), items, name)),
        }
        write_json(known, results)
        print(
            json.dumps({name: {key: results[name][key] for key in results[name] if key != "rules"}}, indent=1)
        )
    show(
        [
            {"set": name, "rule": rule, "of": line["base"]["of"], "model (%)": 100 * line["base"]["share"],
             "adapted (%)": 100 * line["adapted"]["share"], "points": line["points"]}
            for name in names for rule, line in results[name]["rules"].items()
        ]
    )  # fmt: skip


if __name__ == "__main__":
    main()

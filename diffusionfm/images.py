"""Pictures in and out: PNG files that carry their parameters, backgrounds, contact sheets."""

from __future__ import annotations

import io
import json
import os
import re
import secrets
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image, ImageColor, ImageDraw, ImageFont, PngImagePlugin, UnidentifiedImageError

KEY = "diffusionfm"
TEMPORARY = ".diffusionfm-"  # begins the name of a file half-written; a dead process may leave one
PARAMETERS: dict[str, type | tuple[type, ...]] = {
    "prompt": str,
    "read_as": str,  # what was drawn in the place of words that the model does not know
    "negative_prompt": str,
    "seed": int,
    "steps": int,
    "guidance": (int, float),
    "strength": (int, float),
    "width": int,
    "height": int,
    "model": str,
    "model_hash": str,
    "lora": (str, list),
    "version": str,
}
ImageDescription = 0x010E  # of EXIF
SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
EDITED_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
MAX_TEXT = 2**20
MAX_PIXELS = 2**28
_RDF = """<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description rdf:about="" xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" Iptc4xmpExt:DigitalSourceType="{source}" xmp:CreatorTool="{tool}"/>
</rdf:RDF>"""
_XMP = """<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>
<x:xmpmeta xmlns:x="adobe:ns:meta/">{rdf}</x:xmpmeta>
<?xpacket end="w"?>"""
# The words of an A1111 "parameters" line and our names for them.
_A1111 = {
    "Steps": ("steps", int),
    "CFG scale": ("guidance", float),
    "Seed": ("seed", int),
    "Model hash": ("model_hash", str),
    "Model": ("model", str),
    "Denoising strength": ("strength", float),
}


# ------------------------------------------------------------------ files


def write_atomic(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file whole or not at all: temporary file beside it, sync, rename, sync of the folder."""
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:  # with the rights that any new file gets, unlike tempfile's
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` survive a power cut, where the system can."""
    if os.name == "posix":
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def encode_png(image: Image.Image, parameters: dict[str, Any] | None = None) -> bytes:
    """PNG bytes, the same for the same picture and parameters; with None no text is left in the file.

    Parameters go in three dialects: JSON under "diffusionfm", an A1111 "parameters" text, and an XMP
    packet with IPTC's digitalSourceType trainedAlgorithmicMedia, compositeWithTrainedAlgorithmicMedia where a
    strength tells that it was drawn from another picture.
    """
    info = PngImagePlugin.PngInfo()
    if parameters is not None:
        info.add_text(KEY, _json(parameters))
        info.add_text("parameters", _clean(format_a1111(parameters)))
        info.add_itxt("XML:com.adobe.xmp", _xmp(parameters))
    buffer = io.BytesIO()
    _bare(image).save(buffer, "PNG", pnginfo=info, compress_level=6)
    return buffer.getvalue()


def encode_webp(image: Image.Image, parameters: dict[str, Any] | None = None) -> bytes:
    """Lossless WebP bytes, hidden colours kept, the same for the same picture and parameters.

    Parameters go as JSON in EXIF's ImageDescription, beside the XMP packet of `encode_png`; with None neither is there.
    """
    more: dict[str, Any] = {}
    if parameters is not None:
        exif = Image.Exif()
        exif[ImageDescription] = _json(parameters)
        more = {"exif": exif, "xmp": _xmp(parameters).encode()}
    buffer = io.BytesIO()
    _bare(image).save(buffer, "WEBP", lossless=True, exact=True, quality=50, method=4, **more)
    return buffer.getvalue()


def _bare(image: Image.Image) -> Image.Image:
    """The pixels, with no inherited metadata or encoder state."""
    return Image.frombytes(image.mode, image.size, image.tobytes())


def _json(parameters: dict[str, Any]) -> str:
    unknown = sorted(set(parameters) - set(PARAMETERS))
    if unknown:
        raise ValueError(f"unknown picture parameter {unknown[0]!r}: use {', '.join(PARAMETERS)}")
    return json.dumps(parameters, ensure_ascii=True, sort_keys=True)


def provenance(parameters: dict[str, Any]) -> str:
    """RDF as XMP has it: that the picture is of a trained model, and of which tool."""
    tool = f"DiffusionFM {parameters.get('version', '')}".strip()
    source = EDITED_TYPE if "strength" in parameters else SOURCE_TYPE
    return _RDF.format(source=source, tool=escape(tool))


def in_common(told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The parameters of a sheet of pictures: what all of theirs tell alike, and the greatest strength among them."""
    first, *others = told
    common = {name: value for name, value in first.items() if all(it.get(name) == value for it in others)}
    strengths = [its["strength"] for its in told if "strength" in its]
    return common | ({"strength": max(strengths)} if strengths else {})


def _xmp(parameters: dict[str, Any]) -> str:
    return _XMP.format(rdf=provenance(parameters))


def save_png(
    image: Image.Image, target: str | os.PathLike[str] | BinaryIO, parameters: dict[str, Any] | None = None
) -> None:
    """Write `encode_png` to an open binary file, or to a path, atomically."""
    data = encode_png(image, parameters)
    if isinstance(target, (str, os.PathLike)):
        write_atomic(target, data)
    else:
        target.write(data)


def read_parameters(path: str | os.PathLike[str] | BinaryIO) -> dict[str, Any]:
    """The parameters a PNG or WebP carries ({} when none), from our JSON or an A1111 text. No pixel is decoded.

    Unknown keys and values of a wrong type are left out: the file may come from anyone. Raises ValueError
    when the file is neither, has over 2**28 pixels or over 1 MiB of text.
    """
    try:
        with Image.open(path, formats=["PNG", "WEBP"]) as image:
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(f"the picture has {image.width} x {image.height} pixels: too large to read")
            info = dict(image.info)
            if image.format == "WEBP":
                info[KEY] = image.getexif().get(ImageDescription)
    except UnidentifiedImageError as error:
        raise ValueError(
            f"{getattr(path, 'name', path)} is not a PNG or WebP: only those carry parameters"
        ) from error
    except (OSError, Image.DecompressionBombError, SyntaxError) as error:
        if getattr(error, "errno", None):
            raise  # the disk's fault, not the picture's
        raise ValueError(f"this picture cannot be read safely ({error})") from error
    text = info.get(KEY)
    if isinstance(text, str) and len(text) <= MAX_TEXT:
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict):
            return _known(found)
    text = info.get("parameters")
    return parse_a1111(text) if isinstance(text, str) and len(text) <= MAX_TEXT else {}


def prompt_in(data: bytes) -> str:
    """The prompt that the bytes of a PNG or WebP tell, "" where they tell none or are something else."""
    try:
        return str(read_parameters(io.BytesIO(data)).get("prompt", ""))
    except ValueError:
        return ""


def _known(found: dict[str, Any]) -> dict[str, Any]:
    """What has a name of ours and a value of its type, without text that cannot be sent on."""
    known = {}
    for key, kind in PARAMETERS.items():
        value = found.get(key)
        if isinstance(value, list):
            value = [one for one in value if _is_whole(one)]
        if isinstance(value, kind) and not isinstance(value, bool) and _is_whole(value):
            known[key] = value
    return known


def _is_whole(value: Any) -> bool:
    """False for text with a half of a surrogate pair, which UTF-8 does not have."""
    return not (isinstance(value, str) and re.search(r"[\ud800-\udfff]", value))


def _clean(text: str) -> str:
    return text.replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def format_a1111(parameters: dict[str, Any]) -> str:
    """The three-line text that AUTOMATIC1111's web UI writes and most viewers read."""
    lines = [str(parameters.get("prompt", ""))]
    if parameters.get("negative_prompt"):
        lines.append(f"Negative prompt: {parameters['negative_prompt']}")
    settings = [f"{word}: {parameters[key]}" for word, (key, _) in _A1111.items() if key in parameters]
    if "width" in parameters and "height" in parameters:
        settings.insert(min(3, len(settings)), f"Size: {parameters['width']}x{parameters['height']}")
    if loras := parameters.get("lora"):
        told = loras if isinstance(loras, str) else ", ".join(map(str, loras))
        settings.append(f"Lora: {json.dumps(told)}")  # that UI, too, quotes what holds a comma or a colon
    settings.append(f"Version: DiffusionFM {parameters.get('version', '')}".strip())
    return "\n".join([*lines, ", ".join(settings)])


def parse_a1111(text: str) -> dict[str, Any]:
    """The inverse of `format_a1111` as far as it goes; text that is not in that form is taken as a prompt."""
    *lines, last = text.strip().split("\n")
    if not re.match(r"\s*Steps: \d", last):
        return _known({"prompt": text.strip()})
    found: dict[str, Any] = {}
    for word, (key, kind) in _A1111.items():
        match = re.search(rf"(?:^|, ){word}: ([^,]{{1,100}})", last)
        if match:
            try:
                found[key] = kind(match[1].strip())
            except ValueError:
                continue  # a field another tool wrote in its own way
    size = re.search(r"Size: (\d{1,5})x(\d{1,5})", last)
    if size:
        found["width"], found["height"] = int(size[1]), int(size[2])
    loras = re.search(r'(?:^|, )Lora: ("(?:[^"\\]|\\.)*")', last)
    if loras:
        with suppress(ValueError):  # another tool's own way to write one
            found["lora"] = json.loads(loras[1]).split(", ")
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    found["prompt"] = prompt
    if negative:
        found["negative_prompt"] = negative
    return _known(found)


# ------------------------------------------------------------------ looking at pictures


def on_background(image: Image.Image, color: str) -> Image.Image:
    """An RGB picture: `image` composited on a plain colour such as "#ffffff"."""
    ground = Image.new("RGBA", image.size, (*ImageColor.getrgb(color)[:3], 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def checkerboard(image: Image.Image, size: int = 8) -> Image.Image:
    """An RGB picture: `image` over grey squares of `size` pixels, so that transparency shows."""
    tile = Image.new("RGBA", (2 * size, 2 * size), (255, 255, 255, 255))
    for corner in ((size, 0), (0, size)):
        tile.paste((214, 214, 214, 255), (*corner, corner[0] + size, corner[1] + size))
    ground = Image.new("RGBA", image.size)
    for x in range(0, image.width, tile.width):
        for y in range(0, image.height, tile.height):
            ground.paste(tile, (x, y))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def fitted(image: Image.Image, cell: int) -> Image.Image:
    """The picture with alpha, its longer side as long as a cell of a contact sheet."""
    image = image.convert("RGBA")
    scale = cell / max(image.size)
    return image.resize([max(1, round(side * scale)) for side in image.size], Image.Resampling.LANCZOS)


def contact_sheet(
    images: Sequence[Image.Image],
    labels: Sequence[str] | None = None,
    columns: int | None = None,
    cell: int = 128,
    background: str | None = None,
) -> Image.Image:
    """One RGB picture of all `images` in rows of `columns`, each in a `cell` px square over its label.

    A transparent picture lies on a checkerboard, or on `background` ("#ffffff"). Labels are cut to fit.
    """
    if not images:
        raise ValueError("a contact sheet needs at least one picture")
    if labels is not None and len(labels) != len(images):
        raise ValueError(f"{len(images)} pictures but {len(labels)} labels: give one label each")
    columns = columns or min(len(images), max(1, round(len(images) ** 0.5)))
    rows = -(-len(images) // columns)
    gap, foot = 8, 18 if labels is not None else 0
    sheet = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + foot + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=11)
    for k, image in enumerate(images):
        x, y = gap + k % columns * (cell + gap), gap + k // columns * (cell + foot + gap)
        small = fitted(image, cell)
        shown = checkerboard(small) if background is None else on_background(small, background)
        sheet.paste(shown, (x + (cell - small.width) // 2, y + (cell - small.height) // 2))
        if labels is not None:
            label = " ".join(labels[k].split())[:200]
            while label and draw.textlength(label, font=font) > cell:
                label = label[:-2].rstrip() + "…" if len(label) > 2 else ""
            draw.text((x, y + cell + 2), label, fill="#333333", font=font)
    return sheet

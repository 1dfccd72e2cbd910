"""Data as people have it: imagefolders, zips good and evil, and the report on what a set holds."""

import io
import json
import os
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from diffusionfm.data import archive
from diffusionfm.data.archive import as_folder
from diffusionfm.data.captions import CHOICES, TRIGGER
from diffusionfm.data.folder import (
    FolderDataset,
    PictureDataset,
    first_samples,
    pack_folder,
    scan,
    scan_shards,
    square,
)
from diffusionfm.data.language import UNTOLD, language_of
from diffusionfm.data.preflight import preflight_sheet
from diffusionfm.data.reader import ShardDataset, told_captions


def blob(seed: int, size=(40, 40), background=None) -> Image.Image:
    """A few random ellipses, on nothing or on a colour."""
    rng = np.random.default_rng(seed)
    picture = Image.new("RGBA", size, background or (0, 0, 0, 0))
    for x, y, *color in rng.integers(0, 256, (4, 5)).tolist():
        corner = x * (size[0] - 16) // 256, y * (size[1] - 16) // 256
        ImageDraw.Draw(picture).ellipse((*corner, corner[0] + 15, corner[1] + 15), fill=(*color, 255))
    return picture


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def save(folder: Path, name: str, picture: Image.Image, caption: str = "") -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    if caption:
        path.with_suffix(".txt").write_text(caption)


# ---- layouts ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["metadata.jsonl", "metadata.csv"])
def test_imagefolder_with_splits(tmp_path, kind):
    for split, names in {"train": ("a.png", "in/b.png"), "test": ("c.png",)}.items():
        for name in names:
            save(tmp_path / split, name, blob(ord(name[-5])))
        rows = [{"file_name": name, "text": f"picture {name[-5]}"} for name in names]
        lines = [json.dumps(row) for row in rows]
        if kind == "metadata.csv":
            lines = ["file_name,text", *(f'{row["file_name"]},"{row["text"]}"' for row in rows)]
        (tmp_path / split / kind).write_text("\n".join(lines))
    samples = list(FolderDataset(tmp_path))
    told = {s["meta"]["name"]: (s["caption"], s["meta"]["split"]) for s in samples}
    assert told == {
        "test/c.png": ("picture c", "heldout"),
        "train/a.png": ("picture a", "train"),
        "train/in/b.png": ("picture b", "train"),
    }
    pack_folder(tmp_path, tmp_path.parent / f"shards-{kind}")
    assert len(ShardDataset(tmp_path.parent / f"shards-{kind}", split="heldout")) == 1


def test_a_folder_named_test_alone_holds_nothing_out(tmp_path):
    save(tmp_path, "test/a.png", blob(0), "a thing")
    assert FolderDataset(tmp_path)[0]["meta"]["split"] == "train"


def test_class_folders_and_the_trigger_alone(tmp_path):
    save(tmp_path, "train/red_dogs/1.png", blob(0))
    save(tmp_path, "train/cats/2.png", blob(1), "a cat of its own")
    with pytest.raises(ValueError, match="captions skip, name, folder or trigger"):
        FolderDataset(tmp_path)
    by_class = FolderDataset(tmp_path, captions="folder")
    assert [s["caption"] for s in by_class] == ["a cat of its own", "red dogs"]
    assert by_class.report.origins == {".txt files": 1, "folder names": 1}
    alone = FolderDataset(tmp_path, captions="trigger")
    assert [s["caption"] for s in alone] == ["a cat of its own", TRIGGER]
    save(tmp_path, "3.png", blob(2))
    assert len(FolderDataset(tmp_path, captions="folder")) == 2  # the root is no class


# ---- the report ------------------------------------------------------------------------------------------


def test_the_report_tells_sizes_transparency_duplicates_and_languages(tmp_path):
    save(tmp_path, "a.png", blob(0, (200, 200)), "a drawing of the cat with a red hat")
    save(tmp_path, "b.png", blob(1, (60, 30), "white"), "ein Hund und eine Katze mit Hut")
    save(tmp_path, "c.png", blob(2, (30, 90)), "кошка в шляпе")
    near = blob(0, (200, 200)).resize((180, 180), Image.Resampling.LANCZOS)
    save(tmp_path, "d.png", near, "the same again, with the same hat")
    (tmp_path / "e.png").write_bytes((tmp_path / "a.png").read_bytes())
    (tmp_path / "cut.png").write_bytes(png(blob(5))[:90])
    (tmp_path / "photo.heic").write_bytes(b"x")
    report, pictures = scan(tmp_path, size=64)
    assert (report.found, report.captioned, report.missing) == (6, 4, [])
    assert [name for name, _ in report.unreadable] == ["cut.png"]
    assert report.duplicates == [("e.png", "a.png")] and report.near == [("d.png", "a.png")]
    assert report.other == {".heic": 1}
    assert report.sizes == [(60, 30), (180, 180), (200, 200)]
    assert report.shapes == {"square": 2, "wide": 1, "tall": 1} and report.enlarged == 1
    assert (report.transparent, report.opaque, report.barred) == (3, 1, 1)
    assert report.languages == {"English": 2, "German": 1, "Cyrillic script": 1}
    text = str(report)
    for words in (
        "6 pictures, 4 with",
        "near duplicate: d.png looks like a.png",
        "not read: 1 .heic files",
        "1 opaque pictures",
    ):
        assert words in text
    assert json.loads(json.dumps(report.as_dict()))["near"] == [["d.png", "a.png"]]
    assert preflight_sheet(first_samples(pictures, 64)).width > 4 * 128


def test_shards_get_the_same_report(tmp_path):
    for k in range(3):
        save(tmp_path / "mine", f"{k}.png", blob(k), f"the picture of {k}")
    pack_folder(tmp_path / "mine", tmp_path / "shards", size=32)
    report, pictures = scan_shards(tmp_path / "shards", 64)
    assert (report.found, report.captioned, report.enlarged, len(pictures)) == (3, 3, 3, 3)
    assert report.origins == {"shards": 3} and report.transparent == 3
    assert [(p.name, p.heldout) for p in pictures] == [("0.png", False), ("1.png", True), ("2.png", False)]


@pytest.fixture
def folder_and_tar(tmp_path):
    """(a folder with all that may be wrong with one, the same files as a tar)."""
    folder = tmp_path / "mine"
    save(folder, "cats/red_cat.png", blob(0))
    fox = blob(1, (200, 200))
    save(folder, "fox.png", fox, "a fox\n of its own")
    save(folder, "fox_again.png", fox, "the same fox")
    save(folder, "fox_far.png", fox.resize((180, 180), Image.Resampling.LANCZOS), "a fox")
    save(folder, "kept/007.png", blob(2))
    save(folder, "nothing.png", Image.new("RGBA", (9, 9)), "nothing")
    (folder / "cut.png").write_bytes(png(blob(5))[:90])
    save(folder, "nul.png", blob(3), "a \0")
    (folder / "photo.heic").write_bytes(b"x")
    with tarfile.open(tmp_path / "mine.tar", "w") as file:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            file.add(path, path.relative_to(folder).as_posix())
    return folder, tmp_path / "mine.tar"


@pytest.mark.parametrize("choice", CHOICES)
def test_choices_and_report_mean_the_same_for_a_tar_as_for_its_folder(folder_and_tar, choice):
    sets, errors = [], []
    for look, path in zip((scan, scan_shards), folder_and_tar, strict=True):
        report, pictures = look(path, 64, choice)
        assert report.missing == ["cats/red_cat.png", "kept/007.png"] and report.other == {".heic": 1}
        assert report.duplicates == [("fox_again.png", "fox.png")]
        assert report.near == [("fox_far.png", "fox.png")]
        assert [name for name, _ in report.unreadable] == ["cut.png", "nothing.png", "nul.png"]
        try:
            dataset = PictureDataset(report, pictures, 64, choice)
            sets.append([(s["caption"], s["meta"]["name"]) for s in dataset])
        except ValueError as error:
            errors.append(str(error).replace(str(path), "SET"))
    given = {"name": ["red cat"], "folder": ["cats", "kept"], "trigger": [TRIGGER] * 2}.get(choice, [])
    assert len(sets) == 2 * (choice != "refuse") and sets[1:] == sets[:1]
    assert all([c for c, _ in told if c not in ("a fox", "a fox of its own")] == given for told in sets)
    assert len(errors) == 2 * (choice == "refuse") and errors[1:] == errors[:1]
    assert all("2 of 8 pictures in SET have no caption (cats/red_cat.png, kept/007.png)" in e for e in errors)


def test_a_tar_without_captions_and_members_that_are_not_read(tmp_path):
    for name in ("red_cat.png", "blue_dog.jpg", "old.gif", "more/old.gif"):
        save(tmp_path / "mine", name, blob(len(name)).convert("RGB"))
    save(tmp_path / "mine", "told.png", blob(9))
    told = {"captions": ["a told thing", "told"], "name": "told", "split": "heldout"}
    (tmp_path / "mine/told.json").write_text(json.dumps(told))
    (tmp_path / "mine/old.txt").write_text("an old thing")
    with tarfile.open(tmp_path / "mine.tar", "w") as file:
        file.add(tmp_path / "mine", ".")
    report, pictures = scan_shards(tmp_path / "mine.tar", 64, "name")
    dataset = PictureDataset(report, pictures, 64, "name")
    captions = {sample["meta"]["name"]: sample["meta"]["captions"] for sample in dataset}
    assert captions == {
        "./red_cat.png": ["red cat"],
        "./blue_dog.jpg": ["blue dog"],
        "told": ["a told thing", "told"],
    }
    assert report.origins == {"file names": 2, "shards": 1} and [p.heldout for p in pictures].count(True) == 1
    for words in ("unreadable: mine.tar: ./old: no picture", "not read: 2 .gif files"):
        assert words in str(report)
    with tarfile.open(tmp_path / "gifs.tar", "w") as file:
        file.add(tmp_path / "mine/old.gif", "old.gif")
    with pytest.raises(ValueError, match=r"no usable sample .* 1 \.gif members are not read"):
        scan_shards(tmp_path / "gifs.tar")


def test_a_caption_in_the_json_of_a_tar_is_read_where_nothing_else_tells_one(tmp_path):
    told = {
        "a": {"caption": "a told\n thing", "text": None},
        "b": {"caption": " ", "text": "from text"},
        "c": {"caption": "not this", "captions": ["the list", "goes first"]},
        "d": {"caption": "not this"},
        "e": {"caption": 7, "text": ["no text"]},
    }
    for k, (name, meta) in enumerate(told.items()):
        save(tmp_path / "mine", f"{name}.png", blob(k), "the .txt goes first" if name in "cd" else "")
        (tmp_path / "mine" / f"{name}.json").write_text(json.dumps(meta))
    with tarfile.open(tmp_path / "mine.tar", "w") as file:
        for path in sorted((tmp_path / "mine").iterdir()):
            file.add(path, path.name)
    report, pictures = scan_shards(tmp_path / "mine.tar", 64, "trigger")
    captions = [sample["caption"] for sample in PictureDataset(report, pictures, 64, "trigger")]
    assert captions == ["a told thing", "from text", "the list", "the .txt goes first", TRIGGER]
    assert report.missing == ["e.png"]
    assert told_captions(told["a"]) == []  # what pretraining reads has not changed


def test_alike_shapes_in_other_colours_are_no_duplicates(tmp_path):
    for color in ("red", "blue"):
        picture = Image.new("RGBA", (40, 40))
        ImageDraw.Draw(picture).ellipse((8, 8, 30, 30), fill=color)
        save(tmp_path, f"{color}.png", picture, color)
    assert scan(tmp_path)[0].near == []


@pytest.mark.parametrize(
    ("caption", "language"),
    [
        ("A watercolour of a fox in the snow", "English"),
        ("ein roter Fuchs mit Hut", "German"),
        ("un renard rouge dans la neige", "French"),
        ("un zorro rojo con el sombrero", "Spanish"),
        ("赤いキツネ", "Japanese"),
        ("红色的狐狸", "Chinese or Japanese"),
        ("빨간 여우", "Korean"),
        ("fox", UNTOLD),
        ("", UNTOLD),
        ("\x00 12", UNTOLD),
    ],
)
def test_likely_language(caption, language):
    assert language_of(caption) == language


# ---- pictures that must not be decoded ---------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of so many black pixels in about a thousandth of their bytes, made row by row."""
    deflate, data = zlib.compressobj(9), b""
    for _ in range(height):
        data += deflate.compress(bytes(1 + (width + 7) // 8))
    data += deflate.flush()
    chunk = lambda kind, body: (  # noqa: E731
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    )
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [25_000, 9_000])
def test_huge_pictures_are_refused_by_their_header(tmp_path, side):
    data = bomb(side, side)
    assert len(data) < 100_000
    (tmp_path / "bomb.png").write_bytes(data)
    report, samples = scan(tmp_path)
    assert samples == [] and report.unreadable[0][0] == "bomb.png"
    assert "pixel" in report.unreadable[0][1].lower()


# ---- zips ------------------------------------------------------------------------------------------------


def pack(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def test_a_zip_is_read_and_its_temporary_folder_removed(tmp_path):
    members = {
        "mine/a.png": png(blob(0)),
        "mine/a.txt": b"a thing",
        "mine/in/b.png": png(blob(1)),
        "mine/captions.csv": b"file_name,text\nin/b.png,from the table\n",
        "__MACOSX/mine/._a.png": b"junk",
        "mine/.DS_Store": b"junk",
        "mine/run.sh": b"echo never unpacked",
    }
    path = pack(tmp_path / "mine.zip", members)
    before = path.read_bytes()
    with as_folder(path) as folder:
        assert [s["caption"] for s in FolderDataset(folder)] == ["a thing", "from the table"]
        assert not list(folder.rglob("*.sh")) and not list(folder.rglob("._*"))
    assert not folder.exists() and path.read_bytes() == before
    with as_folder(tmp_path) as same:
        assert same == tmp_path


def test_errors_name_the_zip(tmp_path):
    members = {"a.png": png(blob(0)), "metadata.jsonl": b'{"file_name": '}
    path = pack(tmp_path / "mine.zip", members)
    with (
        pytest.raises(ValueError, match=r"mine\.zip/metadata\.jsonl, line 1: not JSON"),
        as_folder(path) as f,
    ):
        FolderDataset(f)


def linked(path: Path) -> None:
    info = zipfile.ZipInfo("a.png")
    info.external_attr = (0o120777) << 16
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(info, "/etc/passwd")


def twice(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as file, pytest.warns(UserWarning, match="Duplicate name"):
        file.writestr("a.png", b"one")
        file.writestr("./a.png".removeprefix("./"), b"two")


def encrypted(path: Path) -> None:
    data = bytearray(pack(path, {"a.png": b"secret"}, zipfile.ZIP_STORED).read_bytes())
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(bytes(data))


def broken(path: Path) -> None:
    data = bytearray(pack(path, {"a.png": png(blob(0))}, zipfile.ZIP_STORED).read_bytes())
    data[60] ^= 255
    path.write_bytes(bytes(data))


def damaged(compression: int):
    """What writes a zip whose one member does not unpack."""

    def make(path: Path) -> None:
        data = bytearray(pack(path, {"a.png": os.urandom(3000)}, compression).read_bytes())
        data[60:160] = bytes(100)
        path.write_bytes(bytes(data))

    return make


EVIL = {
    "climbs out": (lambda path: pack(path, {"../a.png": b"x"}), "leads outside"),
    "climbs out, other slash": (lambda path: pack(path, {"..\\a.png": b"x"}), "leads outside"),
    "from the root": (lambda path: pack(path, {"/etc/a.png": b"x"}), "leads outside"),
    "a drive": (lambda path: pack(path, {"C:/a.png": b"x"}), "leads outside"),
    "a link": (linked, "is a link"),
    "42.zip": (lambda path: pack(path, {"a.png": bytes(2**25)}), "no picture does"),
    "twice": (twice, "twice"),
    "file and folder": (lambda path: pack(path, {"a.png/b.png": b"x", "a.png": b"y"}), "of one name"),
    "a password": (encrypted, "encrypted"),
    "a broken sum": (broken, "cannot|not a zip that can be read"),
    "damaged, deflated": (damaged(zipfile.ZIP_DEFLATED), "not a zip that can be read"),
    "damaged, bzip2": (damaged(zipfile.ZIP_BZIP2), "not a zip that can be read"),
    "damaged, lzma": (damaged(zipfile.ZIP_LZMA), "not a zip that can be read"),
    "no zip": (lambda path: path.write_bytes(b"no zip"), "not a zip"),
}


@pytest.mark.parametrize("name", EVIL)
def test_evil_zips_are_refused(name, tmp_path):
    make, words = EVIL[name]
    path = tmp_path / "in" / "evil.zip"
    path.parent.mkdir()
    make(path)
    with pytest.raises(ValueError, match=words), as_folder(path):
        pass
    assert [p.name for p in tmp_path.rglob("*")] == ["in", "evil.zip"]


def test_a_zip_may_not_unpack_to_more_than_fits(tmp_path, monkeypatch):
    path = pack(tmp_path / "mine.zip", {f"{k}.png": os.urandom(2000) for k in range(3)})
    monkeypatch.setattr(archive, "MAX_BYTES", 5000)
    with pytest.raises(ValueError, match="unpacks to 6,000 bytes: at most 5,000 fit"), as_folder(path):
        pass


def test_many_small_members_may_not_grow_beyond_measure_together(tmp_path, monkeypatch):
    path = pack(tmp_path / "mine.zip", {f"{k}.txt": bytes(100_000) for k in range(20)})
    with as_folder(path) as folder:
        assert len(list(folder.iterdir())) == 20
    monkeypatch.setattr(archive, "MAX_PLAIN_SUM", 1_000_000)
    with (
        pytest.raises(ValueError, match="unpacks to 2,000,000 bytes from .* no pictures do"),
        as_folder(path),
    ):
        pass


@pytest.mark.parametrize("name", ["nowhere", "notes.pdf", "gone.tar"])
def test_what_is_no_set_of_pictures(tmp_path, name):
    (tmp_path / "notes.pdf").write_bytes(b"x")
    with pytest.raises(ValueError, match="no such|is not a folder"), as_folder(tmp_path / name):
        pass


def test_one_pixel_and_one_line(tmp_path):
    Image.new("RGB", (1, 1), "red").save(tmp_path / "dot.tif")
    Image.new("LA", (3000, 1), (9, 200)).save(tmp_path / "line.png")
    assert len(scan(tmp_path, choice="name")[1]) == 2
    assert square(Image.new("RGBA", (1, 1), "red"), 32).getpixel((16, 16)) == (255, 0, 0, 255)

"""A user's own folder: every caption source, preflight, path checks, picture preparation, packing."""

import json
import os

import numpy as np
import pytest
from PIL import Image

from diffusionfm.data.captions import words_of_name
from diffusionfm.data.folder import (
    FolderDataset,
    held_out_captions,
    pack_folder,
    scan,
    square,
)
from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.report import verify_shards
from diffusionfm.inputs import read_picture


def picture(seed: int, size=(12, 8), mode="RGB") -> Image.Image:
    rng = np.random.default_rng(seed)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(mode)


@pytest.fixture
def folder(tmp_path):
    root = tmp_path / "mine"
    (root / "more").mkdir(parents=True)
    for i, name in enumerate(("a.png", "b.JPG", "more/c.webp", "more/d.gif")):
        picture(i).save(root / name)
    return root


def caption_all(folder):
    for name in ("a", "b", "more/c", "more/d"):
        (folder / f"{name}.txt").write_text(f"  the picture\n{name} ", encoding="utf-8-sig")


def test_txt_beside_pictures(folder):
    caption_all(folder)
    dataset = FolderDataset(folder, size=16)
    assert [s["caption"] for s in dataset] == [f"the picture {n}" for n in ("a", "b", "more/c", "more/d")]
    assert all(s["picture"].size == (16, 16) and s["picture"].mode == "RGBA" for s in dataset)
    report = dataset.report
    assert (report.found, report.captioned, report.faults()) == (4, 4, [])
    assert report.origins == {".txt files": 4} and (report.transparent, report.opaque) == (0, 4)
    assert report.shapes == {"wide": 4} and report.sizes == [(12, 8)] * 3 and report.enlarged == 4


def test_metadata_jsonl_goes_before_txt(folder):
    caption_all(folder)
    rows = [{"file_name": "a.png", "text": "from jsonl"}, {"file_name": "./more/c.webp", "caption": "see"}]
    text = "\n\n".join(map(json.dumps, [*rows, {"file_name": "gone.png", "text": "x"}]))
    (folder / "metadata.jsonl").write_text(text)
    dataset = FolderDataset(folder)
    assert [s["caption"] for s in dataset] == ["from jsonl", "the picture b", "see", "the picture more/d"]
    assert dataset.report.absent == ["gone.png"] and "not found: gone.png" in str(dataset.report)


def test_a_picture_told_twice_keeps_its_last_caption_and_is_named(folder):
    caption_all(folder)
    rows = [("a.png", "first"), ("b.JPG", "same"), ("a.png", "last"), ("a.png", ""), ("b.JPG", "same")]
    rows += [("more/c.webp", ""), ("more/c.webp", "at last")]
    told = (json.dumps({"file_name": name, "text": text}) for name, text in rows)
    (folder / "metadata.jsonl").write_text("\n".join(told))
    dataset = FolderDataset(folder)
    assert [s["caption"] for s in dataset] == ["last", "same", "at last", "the picture more/d"]
    assert dataset.report.faults() == ["several captions: a.png, the last in metadata.jsonl is used"]


def test_captions_that_are_not_read_are_named(folder):
    caption_all(folder)
    (folder / "e.txt").write_text("of no picture")
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "an a"}')
    for name in ("list.csv", "more/list.csv", "more/metadata.csv"):
        (folder / name).write_text("file_name,text\nd.gif,a d")
    assert FolderDataset(folder).report.faults() == [
        "not read: e.txt, no picture has its name",
        "not read: list.csv, captions are read from metadata.jsonl",
        "not read: more/list.csv, captions are read from metadata.csv",
    ]
    (folder / "metadata.jsonl").unlink()
    (folder / "more/metadata.csv").rename(folder / "more/captions.jsonl")
    (folder / "list.csv").unlink()
    assert "not read: more/captions.jsonl, captions are read from metadata.jsonl or metadata.csv" in str(
        FolderDataset(folder).report
    )


@pytest.mark.parametrize("columns", ["file_name,text", "Image,Caption", "split,file_name,caption"])
def test_csv(folder, columns):
    extra = "x," if columns.startswith("split") else ""
    names = ("a.png", "b.JPG", "more/c.webp", "more/d.gif")
    rows = [f'{extra}{name},"one, ""{name}""\nline"' for name in names]
    (folder / "list.csv").write_text("\r\n".join([columns, *rows]), encoding="utf-8-sig", newline="")
    assert [s["caption"] for s in FolderDataset(folder)] == [f'one, "{name}" line' for name in names]
    (folder / "other.csv").write_text("x")
    with pytest.raises(ValueError, match="2 CSV files"):
        FolderDataset(folder)


GOOD = '{"file_name": "a.png", "text": "an a"}\n'


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("metadata.jsonl", '{"file_name": "a.png"', "line 1: not JSON"),
        ("metadata.jsonl", '["a.png", "text"]', "line 1: no object"),
        ("metadata.jsonl", '\n{"text": "x"}', "line 2: no file_name"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": 7}', "must be text"),
        ("metadata.jsonl", "\udcff", "UTF-8"),
        ("metadata.jsonl", GOOD + '{"file_name": "b.JPG", ', "line 2: not JSON"),
        (
            "metadata.jsonl",
            GOOD + '{"file_name": "b.JPG", "text": "\\ud800"}',
            "line 2: the caption .*surrogate",
        ),
        ("metadata.jsonl", GOOD + '{"file_name": "b.JPG", "text": "\\u0000"}', "line 2: the caption .*NUL"),
        (
            "metadata.csv",
            f"file_name,text\na.png,{'a' * 2**20}",
            "line 2: .*(1,048,576 characters|field limit)",
        ),
        ("metadata.csv", "one,two\na.png,x", "name the columns"),
        ("metadata.csv", "", "name the columns"),
    ],
)
def test_broken_metadata(folder, name, text, words):
    (folder / name).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(ValueError, match=words):
        FolderDataset(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"a" * 2**20, "1,048,576 characters"),
        (b"caf\xe9", "a.txt is not UTF-8"),
        (b"\xed\xa0\x80", "a.txt is not"),
    ],
)
def test_a_picture_whose_txt_is_no_caption_is_named_and_left_out(folder, text, words):
    caption_all(folder)
    (folder / "a.txt").write_bytes(text)
    dataset = FolderDataset(folder)
    assert len(dataset) == 3 and dataset.report.unreadable[0][0] == "a.png"
    assert words in dataset.report.unreadable[0][1]


@pytest.mark.parametrize(
    "name", ["../x.png", "more/../../x.png", "/etc/x.png", "C:\\x.png", "..\\x.png", "out/x.png"]
)
def test_metadata_may_not_lead_outside(folder, name):
    outside = folder.parent / "outside"
    outside.mkdir()
    picture(9).save(outside / "x.png")
    os.symlink(outside, folder / "out")
    (folder / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "x"}))
    with pytest.raises(ValueError, match="leads outside the folder"):
        FolderDataset(folder)


def test_links_that_lead_outside_are_named_and_left_out(folder):
    caption_all(folder)
    picture(9).save(folder.parent / "x.png")
    (folder.parent / "secret.txt").write_text("secret")
    os.symlink(folder.parent / "x.png", folder / "link.png")
    picture(10).save(folder / "z.png")
    os.symlink(folder.parent / "secret.txt", folder / "z.txt")
    dataset = FolderDataset(folder)
    assert len(dataset) == 4 and [name for name, _ in dataset.report.unreadable] == ["link.png", "z.png"]


def test_missing_captions_refused_skipped_or_named(folder):
    (folder / "a.txt").write_text("an a")
    (folder / "b.txt").write_text(" \n")
    (folder / "more/d.gif").rename(folder / "more/redApple_big-02.gif")
    (folder / "more/c.webp").rename(folder / "more/0001.webp")
    with pytest.raises(ValueError, match=r"3 of 4 pictures .* no caption \(b.JPG, more/0001.webp, more/red"):
        FolderDataset(folder)
    assert [s["caption"] for s in FolderDataset(folder, captions="skip")] == ["an a"]
    named = FolderDataset(folder, captions="name")
    assert [s["caption"] for s in named] == ["an a", "b", "red apple big"]
    assert (
        scan(folder)[0].missing
        == named.report.missing
        == ["b.JPG", "more/0001.webp", "more/redApple_big-02.gif"]
    )
    with pytest.raises(ValueError, match="captions is 'guess'"):
        FolderDataset(folder, captions="guess")


def test_words_of_name():
    names = {
        "a_red-apple.png": "a red apple",
        "IMG 12 (3).jpg": "img",
        "007.png": "",
        "cat copy 2.png": "cat",
    }
    assert {name: words_of_name(name) for name in names} == names


def test_unreadable_empty_and_equal_pictures_are_named_and_left_out(folder):
    caption_all(folder)
    (folder / "bad.png").write_bytes(b"not a picture")
    (folder / "cut.png").write_bytes((folder / "a.png").read_bytes()[:80])
    Image.new("RGBA", (9, 9)).save(folder / "clear.png")
    (folder / "again.png").write_bytes((folder / "a.png").read_bytes())
    (folder / ".hidden.png").write_bytes(b"")
    report, samples = scan(folder)
    assert len(samples) == 4
    assert (report.found, [name for name, _ in report.unreadable]) == (8, ["bad.png", "clear.png", "cut.png"])
    assert report.duplicates == [("again.png", "a.png")] or report.duplicates == [("a.png", "again.png")]
    assert "unreadable: clear.png: nothing but transparency" in str(report)


def test_folders_without_pictures(tmp_path):
    with pytest.raises(ValueError, match="not a folder"):
        FolderDataset(tmp_path / "absent")
    with pytest.raises(ValueError, match="no pictures"):
        FolderDataset(tmp_path)
    with pytest.raises(ValueError, match="size is 5"):
        FolderDataset(tmp_path, size=5)


def test_names_that_are_not_utf_8_are_told_by_their_escapes(folder, tmp_path):
    caption_all(folder)
    picture(7).save(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png"))
    (folder / os.fsdecode(b"cut\xe9.png")).write_bytes(b"no picture")
    (folder / os.fsdecode(b"x.d\xe9")).write_bytes(b"x")
    dataset = FolderDataset(folder, captions="name")
    [named] = [sample for sample in dataset if sample["meta"]["caption_from"] == "name"]
    assert (named["caption"], named["meta"]["name"]) == ("caf", "caf\\udce9.png")
    assert dataset.report.missing == ["caf\\udce9.png"] and dataset.report.other == {".d\\udce9": 1}
    assert dataset.report.unreadable[0][0] == "cut\\udce9.png"
    for text in (str(dataset.report), json.dumps(dataset.report.as_dict(), ensure_ascii=False)):
        assert text.encode()
    pack_folder(folder, tmp_path / "shards", captions="name")
    assert named["meta"]["name"] in {ShardDataset(tmp_path / "shards").meta(i)["name"] for i in range(5)}


def test_exif_rotation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    picture(0).save(tmp_path / "a.png", exif=exif)
    turned = np.rot90(np.array(picture(0)), -1)
    assert np.array_equal(np.array(read_picture(tmp_path / "a.png"))[..., :3], turned)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "LA", "RGBA", "I;16"])
def test_any_mode_becomes_rgba(tmp_path, mode):
    file = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image = (
        Image.fromarray(np.full((4, 4), 40000, dtype=np.uint16)) if mode == "I;16" else picture(0, mode=mode)
    )
    image.save(file)
    assert read_picture(file).mode == "RGBA"


def test_square_pads_with_transparency_and_makes_no_fringes():
    red = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    red.paste((255, 0, 0, 255), (10, 0, 30, 20))
    fitted = np.array(square(red, 16)).astype(int)
    assert fitted.shape == (16, 16, 4) and not fitted[:4, :, 3].any() and not fitted[12:, :, 3].any()
    seen = fitted[fitted[..., 3] > 16]
    assert len(seen) and (seen[:, 0] > 240).all() and (seen[:, 1:3] < 16).all()
    assert square(Image.new("RGBA", (1000, 1)), 8).size == (8, 8)


def test_some_captions_are_kept_from_training_whatever_else_is_packed():
    captions = [f"a thing {k}" for k in range(400)]
    held = held_out_captions(captions, 0.1)
    assert 20 <= len(held) <= 60 and held_out_captions(captions[::-1] + ["new"], 0.1) - {"new"} == held
    assert len(held_out_captions(captions[:5], 0.001)) == 1 and held_out_captions(captions, 0) == set()
    assert held_out_captions(["one", "one"], 0.5) == set()  # nothing would be left to train on
    with pytest.raises(ValueError, match="a share"):
        held_out_captions(captions, 1)


def test_pack_folder_makes_shards_and_leaves_the_folder_alone(folder, tmp_path):
    caption_all(folder)
    (folder / "bad.png").write_bytes(b"not a picture")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    calls = []
    report = pack_folder(folder, tmp_path / "out", size=16, progress=lambda *at: calls.append(at))
    assert report.unreadable[0][0] == "bad.png" and calls[-1] == (4, 4)
    assert verify_shards(tmp_path / "out") == []
    dataset = ShardDataset(tmp_path / "out")
    assert [s["caption"] for s in dataset] == [f"the picture {n}" for n in ("a", "b", "more/c", "more/d")]
    assert len(ShardDataset(tmp_path / "out", split="train")) == 3
    assert len(ShardDataset(tmp_path / "out", split="heldout")) == 1
    assert dataset.meta(2)["source"] == "user" and dataset.meta(2)["name"] == "more/c.webp"
    assert json.loads((tmp_path / "out/00000_stats.json").read_text())["failed_to_resize"] == 1
    with pytest.raises(ValueError, match="outside the pictures"):
        pack_folder(folder, folder / "shards")
    with pytest.raises(ValueError, match="already holds shards"):
        pack_folder(folder, tmp_path / "out")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before

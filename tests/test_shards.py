"""ShardWriter, and the reports on what it wrote: layout, determinism, atomicity, every fault named."""

import hashlib
import io
import json
import subprocess
import sys
import tarfile

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from diffusionfm.data.reader import ShardDataset
from diffusionfm.data.report import attribution, inspect_shards, trained_words, verify_shards
from diffusionfm.data.shards import ShardWriter


def picture(seed: int, size: int = 16) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 4), dtype=np.uint8))


def meta(i: int) -> dict:
    return {
        "source": "twins" if i % 2 else "solo",
        "package": "icons",
        "version": "1.2",
        "licence": "MIT" if i % 2 else "CC0-1.0",
        "attribution": "The Twins",
        "style": ["flat", "round"],
        "palette": "color",
        "background": None,
        "split": "heldout" if i == 4 else "train",
    }


def write(folder, count=5, start=0, **options):
    with ShardWriter(folder, samples_per_shard=2, **options) as writer:
        for i in range(start, start + count):
            writer.write(f"{i:08d}", picture(i), f"a picture of number {i}", meta(i))
    return folder


def files(folder) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def test_layout_is_img2datasets_and_the_bytes_are_the_same_each_time(tmp_path):
    one, two = files(write(tmp_path / "one")), files(write(tmp_path / "two"))
    assert one == two
    names = {f"{n:05d}{end}" for n in range(3) for end in (".tar", ".parquet", "_stats.json")}
    assert set(one) == names
    with tarfile.open(tmp_path / "one" / "00000.tar") as tar:
        assert tar.getnames() == [f"0000000{i}.{end}" for i in (0, 1) for end in ("json", "txt", "webp")]
        assert {(m.mtime, m.uid, m.mode) for m in tar} == {(0, 0, 0o644)}
        webp = tar.extractfile("00000001.webp").read()
        stored = json.loads(tar.extractfile("00000001.json").read())
    assert np.array_equal(
        np.array(Image.open(io.BytesIO(webp))), np.array(picture(1))
    )  # lossless, hidden colours too
    assert stored["sha256"] == hashlib.sha256(webp).hexdigest()
    assert (stored["key"], stored["width"], stored["height"]) == ("00000001", 16, 16)
    rows = pyarrow.parquet.read_table(tmp_path / "one" / "00000.parquet").to_pylist()
    assert [row["status"] for row in rows] == ["success"] * 2
    assert rows[1]["caption"] == "a picture of number 1" and rows[1]["style"] == "flat, round"
    assert json.loads(one["00002_stats.json"])["successes"] == 1


def test_failures_go_to_parquet_and_stats(tmp_path):
    with ShardWriter(tmp_path) as writer:
        writer.fail("bad", "no glyph", {"source": "solo"})
        writer.write("good", picture(0), "good", {})
    stats = json.loads((tmp_path / "00000_stats.json").read_text())
    assert (stats["count"], stats["successes"], stats["status_dict"]["no glyph"]) == (2, 1, 1)
    assert verify_shards(tmp_path) == [] and writer.failed == 1


@pytest.mark.parametrize("key", ["", "a.b", "../a", "a/b", "a" * 91, "0"])
def test_bad_or_repeated_keys_are_refused(tmp_path, key):
    with pytest.raises(ValueError, match="key"), ShardWriter(tmp_path / "out") as writer:
        writer.write("0", picture(0), "nought", {})
        writer.write(key, picture(1), "one", {})
    assert not (tmp_path / "out").exists()


def test_empty_captions_and_empty_writers_are_refused(tmp_path):
    with pytest.raises(ValueError, match="empty caption"), ShardWriter(tmp_path) as writer:
        writer.write("0", picture(0), "  ", {})
    with pytest.raises(ValueError, match="no sample"), ShardWriter(tmp_path):
        pass


def test_old_shards_are_refused_kept_on_failure_and_replaced_on_success(tmp_path):
    old = files(write(tmp_path))
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(ValueError, match="already holds shards"):
        write(tmp_path)
    with pytest.raises(RuntimeError), ShardWriter(tmp_path, overwrite=True) as writer:
        writer.write("x", picture(9), "nine", {})
        raise RuntimeError("the source broke")
    assert files(tmp_path) == old | {"notes.md": b"mine"}
    write(tmp_path, count=1, start=7, overwrite=True)
    assert sorted(files(tmp_path)) == ["00000.parquet", "00000.tar", "00000_stats.json", "notes.md"]
    assert [sample["key"] for sample in ShardDataset(tmp_path)] == ["00000007"]


def test_a_killed_writer_leaves_the_old_shards_whole_and_does_not_block_the_next(tmp_path):
    old = files(write(tmp_path))
    code = (
        "import os, sys; from PIL import Image; from diffusionfm.data.shards import ShardWriter\n"
        "with ShardWriter(sys.argv[1], samples_per_shard=1, overwrite=True) as writer:\n"
        "    for i in range(3): writer.write(str(i), Image.new('RGBA', (4, 4)), 'x', {})\n"
        "    os._exit(9)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)]).returncode == 9
    assert files(tmp_path) == old
    assert len(ShardDataset(tmp_path)) == 5 and verify_shards(tmp_path) == []
    write(tmp_path, count=3, overwrite=True)
    assert len(ShardDataset(tmp_path)) == 3 and not list(tmp_path.glob(".w*"))


def test_two_writers_do_not_share_a_folder(tmp_path):
    with ShardWriter(tmp_path) as writer:
        with pytest.raises(ValueError, match="another process"), ShardWriter(tmp_path):
            pass
        writer.write("0", picture(0), "nought", {})
    assert len(ShardDataset(tmp_path)) == 1


def test_an_interrupted_replacement_is_refused_by_name(tmp_path):
    write(tmp_path)
    (tmp_path / ".publishing").touch()
    with pytest.raises(ValueError, match="interrupted"):
        ShardDataset(tmp_path)
    write(tmp_path, overwrite=True)
    assert len(ShardDataset(tmp_path)) == 5


def test_verify_names_each_fault(tmp_path):
    assert verify_shards(write(tmp_path)) == []
    tar = tmp_path / "00000.tar"
    data = tar.read_bytes()
    at = data.index(b"RIFF") + 40
    tar.write_bytes(data[:at] + bytes([data[at] ^ 255]) + data[at + 1 :])
    (tmp_path / "00001_stats.json").write_text('{"successes": 7}')
    (tmp_path / "00002.parquet").write_bytes(b"PAR1 or not")
    found = "\n".join(verify_shards(tmp_path))
    assert "00000.tar: 00000000: the webp does not have the sha256" in found
    assert "00000.parquet: 00000000: another sha256" in found
    assert "00001_stats.json: tells 7 samples, the shard has 2" in found
    assert "00002.parquet: unreadable" in found
    tar.write_bytes(data[: at + 10])
    assert any("00000.tar" in line and "truncated" in line for line in verify_shards(tmp_path))
    tar.unlink()
    assert any("00000.tar, is missing" in line for line in verify_shards(tmp_path))


def test_a_copied_shard_is_a_duplicate(tmp_path):
    write(tmp_path, count=2)
    (tmp_path / "00001.tar").write_bytes((tmp_path / "00000.tar").read_bytes())
    assert "00001.tar: 00000000: already in 00000.tar" in verify_shards(tmp_path)
    dataset = ShardDataset(tmp_path)
    assert len(dataset) == 2 and len(dataset.problems) == 2


def test_reports_refuse_a_folder_without_shards(tmp_path):
    for report in (verify_shards, inspect_shards, attribution):
        with pytest.raises(ValueError, match="holds no shards"):
            report(tmp_path)
        with pytest.raises(ValueError, match="not a folder"):
            report(tmp_path / "absent")


def test_inspect_counts_and_draws_a_sheet(tmp_path):
    write(tmp_path / "shards")
    calls = []
    report = inspect_shards(
        tmp_path / "shards", tmp_path / "sheet.png", progress=lambda *at: calls.append(at)
    )
    assert (report["samples"], report["distinct"], report["shards"]) == (5, 5, 3)
    assert report["source"] == {"solo": 3, "twins": 2} and report["split"] == {"train": 4, "heldout": 1}
    assert report["background"] == {"none": 5} and report["style"] == {"flat, round": 5}
    assert calls[-1] == (5, 5)
    sheet = np.array(Image.open(tmp_path / "sheet.png").convert("L"))
    assert sheet.shape[1] == 5 * 172 + 12 and (sheet[175:, :] < 64).any()  # dark letters below the pictures


def test_trained_words_are_those_of_what_is_not_held_out(tmp_path):
    folder = write(tmp_path, count=3)
    assert trained_words(folder) == ["a", "number", "of", "picture"]
    with ShardWriter(tmp_path / "held", samples_per_shard=2) as writer:
        for i in range(4):
            writer.write(f"{i:08d}", picture(i), "a zebra", meta(i) | {"split": "heldout"})
    assert trained_words(tmp_path / "held") == []


def test_attribution_has_a_section_a_source_and_licence_totals(tmp_path):
    text = attribution(write(tmp_path))
    assert "| CC0-1.0 | 3 |" in text and "| MIT | 2 |" in text
    section = text[text.index("## twins") :]
    for line in (
        "* package: icons",
        "* version: 1.2",
        "* licence: MIT",
        "* attribution: The Twins",
        "* pictures: 2",
    ):
        assert line in section

"""ShardDataset over real tars, whole and broken; nothing in them is ever executed."""

import io
import json
import os
import pickle
import shutil
import struct
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import webdataset
from PIL import Image

from diffusionfm.data.reader import BadSample, ShardDataset, decode_picture
from diffusionfm.data.shards import ShardWriter


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 4), dtype=np.uint8))


def encoded(seed: int, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    (picture(seed).convert("RGB") if form == "JPEG" else picture(seed)).save(file, form)
    return file.getvalue()


def write(folder, count=6, per_shard=4):
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for i in range(count):
            writer.write(f"{i}", picture(i), f"number {i}", {"split": "heldout" if i % 3 == 0 else "train"})
    return folder


def tar(path, members: list[tuple[str, bytes]], form=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=form) as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path


def test_random_access_gives_pictures_captions_and_meta(tmp_path):
    dataset = ShardDataset(write(tmp_path))
    assert len(dataset) == 6 and dataset.problems == []
    for i in (5, 0, 3):
        sample = dataset[i]
        assert (sample["key"], sample["caption"], sample["meta"]["key"]) == (str(i), f"number {i}", str(i))
        assert sample["picture"].mode == "RGBA"
        assert np.array_equal(np.array(sample["picture"]), np.array(picture(i)))
    assert dataset.raw(4)["txt"] == b"number 4" and dataset.shard(4).name == "00001.tar"
    assert dataset[-1]["key"] == "5"
    with pytest.raises(IndexError):
        dataset[6]


def test_webdataset_reads_what_we_wrote(tmp_path):
    write(tmp_path)
    theirs = webdataset.WebDataset(str(tmp_path / "00000.tar"), shardshuffle=False)
    assert [sample["__key__"] for sample in theirs] == ["0", "1", "2", "3"]


@pytest.mark.parametrize("with_parquet", [True, False])
def test_split(tmp_path, with_parquet):
    write(tmp_path)
    if not with_parquet:
        [path.unlink() for path in tmp_path.glob("*.parquet")]
    assert [s["key"] for s in ShardDataset(tmp_path, split="heldout")] == ["0", "3"]
    assert len(ShardDataset(tmp_path, split="train")) == 4
    with pytest.raises(ValueError, match="no usable sample of split 'test'"):
        ShardDataset(tmp_path, split="test")


def test_a_split_opens_without_reading_the_headers_of_later_shards(tmp_path):
    """Their bytes are spoilt: only when one of their samples is asked for does it show."""
    write(tmp_path, count=12)
    by_headers = [dataset.key(i) for dataset in [ShardDataset(tmp_path)] for i in range(12) if i % 3]
    spoilt = tmp_path / "00002.tar"
    spoilt.write_bytes(b"x" * spoilt.stat().st_size)
    dataset = ShardDataset(tmp_path, split="train")
    assert [dataset.key(i) for i in range(len(dataset))] == by_headers and dataset.faults == []
    assert dataset.columns("split", "caption", "width") == [
        ("train", f"number {key}", 8) for key in by_headers
    ]
    assert [sample["key"] for sample in dataset] == [key for key in by_headers if int(key) < 8]
    assert dataset.faults == [
        "00002.tar: unreadable at byte 0: not a tar header (is it a plain, uncompressed tar?)"
    ]
    assert len(ShardDataset(tmp_path)) == 8


@pytest.mark.parametrize("name", ["00001.parquet", "00001_stats.json"])
def test_where_parquet_and_stats_do_not_fit_the_tar_its_headers_tell(tmp_path, name):
    write(tmp_path / "a", count=12)
    write(tmp_path / "b", count=8)
    shutil.copy(tmp_path / "b/00000.tar", tmp_path / "a/00001.tar")  # keys 0 to 3 where 4 to 7 are told
    (tmp_path / "a" / name).write_bytes(b"broken")
    dataset = ShardDataset(tmp_path / "a", split="train")
    assert [dataset.key(i) for i in range(len(dataset))] == ["1", "2", "8", "10", "11"]
    assert sum("already in 00000.tar" in text for text in dataset.problems) == 4


def test_a_shard_of_which_only_the_parquet_is_left_is_missed(tmp_path):
    write(tmp_path)
    (tmp_path / "00001.tar").unlink()
    with pytest.raises(
        ValueError, match=r"00001.tar is missing, its parquet is there \(1 such\): put the tar back"
    ):
        ShardDataset(tmp_path)
    assert len(ShardDataset(tmp_path / "00000.tar")) == 4


def test_sizes_by_metadata_or_header(tmp_path):
    long_profile = io.BytesIO()
    Image.new("RGB", (5, 7)).save(long_profile, "JPEG", icc_profile=b"x" * 200_000)
    members = [("a.png", encoded(0)), ("a.txt", b"a"), ("b.jpg", long_profile.getvalue()), ("b.txt", b"b")]
    members += [("c.png", b"junk"), ("c.txt", b"c"), ("c.json", b'{"width": 3, "height": 4}')]
    dataset = ShardDataset(tar(tmp_path / "0.tar", members))
    assert dataset.sizes().tolist() == [[8, 8], [5, 7], [3, 4]]
    tar(tmp_path / "1.tar", members[4:6])
    with pytest.raises(BadSample, match="1.tar: c"):
        ShardDataset(tmp_path / "1.tar").sizes()


def test_pictures_are_turned_upright_by_their_exif(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn a quarter clockwise to see it upright
    stored = picture(0).resize((8, 4))
    members = []
    for form in ("PNG", "JPEG", "WEBP"):
        file = io.BytesIO()
        stored.convert("RGB").save(file, form, exif=exif)
        members += [(f"{form}.{form.lower()}", file.getvalue()), (f"{form}.txt", b"a")]
    dataset = ShardDataset(tar(tmp_path / "0.tar", members))
    assert dataset.sizes().tolist() == [[4, 8]] * 3 and {s["picture"].size for s in dataset} == {(4, 8)}
    turned = stored.transpose(Image.Transpose.ROTATE_270).convert("RGB")
    assert np.array_equal(np.array(dataset[0]["picture"].convert("RGB")), np.array(turned))


def test_missing_shards(tmp_path):
    for paths, words in (
        (tmp_path, "no shards"),
        ([tmp_path / "9.tar"], "is missing"),
        ([], "no shards given"),
    ):
        with pytest.raises(ValueError, match=words):
            ShardDataset(paths)


def test_truncated_tar_is_named_and_the_rest_used(tmp_path):
    path = write(tmp_path) / "00000.tar"
    data = path.read_bytes()
    cut = data.rindex(b"RIFF") + 20
    for end, kept in ((cut, 5), (cut // 512 * 512 - 512, 5), (100, 2), (0, 2)):
        path.write_bytes(data[:end])
        dataset = ShardDataset(tmp_path)
        assert len(dataset) == kept and "00000.tar" in dataset.problems[0]
        assert [sample["key"] for sample in dataset][-1] == "5"
        with pytest.raises(BadSample, match="00000.tar"):
            ShardDataset(tmp_path, on_error="raise")


def test_a_file_that_is_no_tar_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "00002.tar").write_bytes(b"<html>not found</html>" * 100)
    dataset = ShardDataset(tmp_path)
    assert len(dataset) == 6 and "00002.tar: unreadable at byte 0: not a tar header" in dataset.problems[0]


def test_incomplete_and_repeated_samples_are_named(tmp_path):
    members = [("a.png", encoded(0)), ("a.txt", b"first"), ("b.png", encoded(1)), ("c.txt", b"no picture")]
    members += [
        ("d.png", encoded(2)),
        ("d.txt", b""),
        ("a.png", encoded(3)),
        ("e.PNG", encoded(4)),
        ("e.txt", b"e"),
    ]
    tar(tmp_path / "0.tar", members)
    tar(tmp_path / "1.tar", [("a.png", encoded(5)), ("a.txt", b"again")])
    dataset = ShardDataset(tmp_path)
    assert [(s["key"], s["caption"], s["meta"]) for s in dataset] == [("a", "first", {}), ("e", "e", {})]
    assert np.array_equal(np.array(dataset[0]["picture"]), np.array(picture(0)))
    text = "\n".join(dataset.problems)
    for words in (
        "a.png: twice",
        "b: no caption",
        "c: no picture",
        "d: empty caption",
        "1.tar: a: already in 0.tar",
    ):
        assert words in text
    for one in ("0.tar", "1.tar"):
        tar(tmp_path / "0.tar", members[:2] + members[2:] * (one == "0.tar"))
        with pytest.raises(BadSample, match=one):
            ShardDataset(tmp_path, on_error="raise")


@pytest.mark.parametrize("bad", [b"junk", b"", encoded(0)[:60], b"RIFF\x10\0\0\0WEBPVP8L"])
def test_undecodable_pictures_are_noted_once_and_their_neighbour_taken(tmp_path, bad):
    members = [("a.png", encoded(0)), ("a.txt", b"a"), ("b.png", bad), ("b.txt", b"b"), ("c.png", encoded(2))]
    path = tar(tmp_path / "0.tar", [*members, ("c.txt", b"c"), ("d.png", encoded(3)), ("d.txt", b"\xff\xfe")])
    dataset = ShardDataset(path)
    assert [sample["key"] for sample in dataset] == ["a", "c"]
    assert [dataset[i]["key"] for i in range(len(dataset))] == (
        ["a", "c", "c", "a"] if bad else ["a", "c", "a"]
    )
    assert sum(": b: " in text for text in dataset.problems) == 1
    assert sum(": d: " in text for text in dataset.problems) == 1
    with pytest.raises(BadSample, match="b"):
        list(ShardDataset(path, on_error="raise"))


def test_broken_json_is_a_bad_sample(tmp_path):
    members = [
        ("a.png", encoded(0)),
        ("a.txt", b"a"),
        ("a.json", b"[1]"),
        ("b.png", encoded(1)),
        ("b.txt", b"b"),
    ]
    dataset = ShardDataset(tar(tmp_path / "0.tar", members))
    assert [sample["key"] for sample in dataset] == ["b"] and "a.json: not an object" in dataset.problems[0]


def test_all_bad_ends_in_one_line(tmp_path):
    dataset = ShardDataset(tar(tmp_path / "0.tar", [("a.png", b"x"), ("a.txt", b"a")]))
    with pytest.raises(ValueError, match="no sample of .* can be read"):
        dataset[0]


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_ignored_and_counted(tmp_path):
    bomb = pickle.dumps(Canary(tmp_path / "canary"))
    members = [
        ("a.png", encoded(0)),
        ("a.txt", b"a"),
        ("a.pkl", bomb),
        ("a.pyd", bomb),
        ("a.pth", bomb),
        ("x", bomb),
    ]
    dataset = ShardDataset(tar(tmp_path / "0.tar", members))
    assert set(dataset.raw(0)) == {"png", "txt"} and dataset[0]["caption"] == "a"
    assert dataset.ignored == {"pkl": 1, "pyd": 1, "pth": 1, "": 1}
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_strange_names(tmp_path, form):
    names = ["deep/" * 30 + "a", "ünï/b" + "x" * 200, "../c"]
    members = [
        (f"{name}.{end}", data)
        for name in names
        for end, data in (("jpg", encoded(1, "JPEG")), ("txt", b"t"))
    ]
    dataset = ShardDataset(tar(tmp_path / "0.tar", members, form))
    assert [sample["key"] for sample in dataset] == names and dataset.problems == []


def test_links_in_a_tar_are_not_followed(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as file:
        link = tarfile.TarInfo("a.txt")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        file.addfile(link)
    with pytest.raises(ValueError, match="no usable sample"):
        ShardDataset(tmp_path)


def test_a_member_too_large_for_a_picture_is_named_and_left_out(tmp_path):
    rest = tar(tmp_path / "rest", [("a.txt", b"a"), ("b.png", encoded(1)), ("b.txt", b"b")]).read_bytes()
    huge = tarfile.TarInfo("a.png")
    huge.size = 3 * 2**30
    with open(tmp_path / "0.tar", "wb") as file:  # a hole: nothing of it lies on the disk
        file.write(huge.tobuf(tarfile.USTAR_FORMAT))
        file.seek(huge.size, 1)
        file.write(rest)
    dataset = ShardDataset(tmp_path)
    assert [sample["caption"] for sample in dataset] == ["b"]
    assert f"a.png: {huge.size} bytes, more than" in "\n".join(dataset.problems)


def test_latent_shards(tmp_path):
    from safetensors.numpy import load, save

    latent = np.arange(12, dtype=np.float32).reshape(3, 2, 2)
    with ShardWriter(tmp_path) as writer:
        writer.write_members("a", {"safetensors": save({"latent": latent})}, "a latent", {})
    with pytest.raises(ValueError, match="no picture"):
        ShardDataset(tmp_path)
    dataset = ShardDataset(tmp_path, needs=("safetensors", "txt"))
    assert np.array_equal(load(dataset.raw(0)["safetensors"])["latent"], latent)
    assert np.array_equal(load(dataset[0]["safetensors"])["latent"], latent) and "picture" not in dataset[0]
    assert dataset.tensor_shape(0, "latent") == (3, 2, 2)
    with pytest.raises(BadSample, match="no tensor 'text'"):
        dataset.tensor_shape(0, "text")


def test_latents_with_parquets_are_no_pictures(tmp_path):
    with ShardWriter(tmp_path, samples_per_shard=1) as writer:
        for key in "ab":
            writer.write_members(key, {"safetensors": b"x"}, "a latent", {"split": "train"})
    with pytest.raises(ValueError, match="no usable sample of split 'train'.*no picture"):
        ShardDataset(tmp_path, split="train")


def test_picture_bombs_are_refused_by_their_header():
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 9000, 9000, 8, 6, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    with pytest.raises(ValueError, match="more than 64 Mpixel"):
        decode_picture(bomb)


def test_sixteen_bit_grey_is_scaled():
    file = io.BytesIO()
    Image.fromarray(np.array([[0, 32896, 65535]], dtype=np.uint16)).save(file, "PNG")
    assert np.array(decode_picture(file.getvalue()))[0, :, 0].tolist() == [0, 128, 255]


def test_threads_forks_and_pickled_copies_read_the_same(tmp_path):
    dataset = ShardDataset(write(tmp_path, count=40))
    captions = [f"number {i}" for i in range(40)]
    with ThreadPoolExecutor(8) as pool:
        assert [s["caption"] for s in pool.map(dataset.__getitem__, range(40))] == captions
    assert [s["caption"] for s in pickle.loads(pickle.dumps(dataset))] == captions
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, json.dumps([dataset.caption(i) for i in reversed(range(40))]).encode())
        os._exit(0)
    mine = [dataset.caption(i) for i in range(40)]
    os.waitpid(child, 0)
    assert mine == captions and json.loads(os.read(reader, 65536)) == captions[::-1]
    os.close(reader)
    os.close(writer)

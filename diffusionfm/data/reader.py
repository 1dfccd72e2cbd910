"""Reading shards: random access to the samples of WebDataset tars by their headers, no unpickling."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

from diffusionfm.data.index import manifest, tar_members
from diffusionfm.data.shards import SIZE_COLUMNS, TEXT_COLUMNS, shard_paths
from diffusionfm.inputs import DECODE_ERRORS, MAX_PIXELS, to_rgba

PICTURES = ("webp", "png", "jpg", "jpeg")
FORMATS = ("WEBP", "PNG", "JPEG")
EXTENSIONS = {*PICTURES, "txt", "json", "safetensors"}
MAX_MEMBER = 2**28  # bytes; a larger member is no picture and no caption
MAX_OPEN = 256  # files kept open a process
HEAD = 2**16  # bytes in which a picture's size is looked for first
Members = dict[str, tuple[int, int]]  # extension -> (offset, size)


class BadSample(ValueError):
    """A sample that cannot be used; the message names shard, key and reason."""


class ShardDataset:
    """The samples of a folder of shards (or of some shards), in tar order, at random access.

    paths: a folder, a shard, or a list of shards.
    split: None for all, or the `split` of the samples wanted ("train", "heldout"). The parquets then tell which
        samples there are, and a tar's headers are read when the first of its samples is: a large set opens at once.
        Where parquet, stats and tar disagree, and with no split, headers and JSONs tell.
    on_error: "skip" names bad samples in `problems` and leaves them out; "raise" raises BadSample.
    needs: what a sample must hold: "picture" (webp, png, jpg or jpeg) or an extension ("txt", "safetensors").

    Only pictures, .txt, .json and .safetensors are ever read; `ignored` counts other members by extension.
    `faults` names the shards that are cut short or no tars: what they should hold is not here.
    Safe to share by threads and across forks. ValueError where there is no shard or no usable sample.
    """

    def __init__(
        self,
        paths: str | os.PathLike | Sequence[str | os.PathLike],
        split: str | None = None,
        on_error: str = "skip",
        needs: Sequence[str] = ("picture", "txt"),
    ) -> None:
        if on_error not in ("skip", "raise"):
            raise ValueError(f'on_error is {on_error!r}; it must be "skip" or "raise"')
        self.paths = _paths(paths)
        self.split = split
        self.on_error = on_error
        self.needs = tuple(needs)
        self.problems: list[str] = []
        self.faults: list[str] = []
        self.ignored: Counter[str] = Counter()
        self._bad: set[int] = set()
        self._files: dict[int, int] = {}
        self._tables: dict[int, dict[str, Members]] = {}  # of the shards whose headers were read
        self._samples: list[tuple[str, int]] = []  # key, shard
        self._index()
        if not self._samples:
            of = f" of split {split!r}" if split else ""
            ignored = [f"{count} .{suffix} members are not read" for suffix, count in self.ignored.items()]
            why = "; ".join([*self.problems[:3], *ignored[:3]]) or "none found"
            raise ValueError(f"no usable sample{of} in {self.paths[0].parent}: {why}")

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"key", "picture" (PIL RGBA), "caption", "meta"} of sample i, less what it lacks.

        With on_error="skip" an undecodable sample is noted in `problems`; its neighbour comes instead."""
        if not -len(self) <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        for j in range(i, i + len(self)):
            try:
                return self.read(j % len(self))
            except BadSample as error:
                if self.on_error == "raise":
                    raise
                self._note_once(j % len(self), str(error))
        raise ValueError(f"no sample of {self.paths[0].parent} can be read: {'; '.join(self.problems[:3])}")

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for i in range(len(self)):
            try:
                yield self.read(i)
            except BadSample as error:
                if self.on_error == "raise":
                    raise
                self._note_once(i, str(error))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_files": {}}

    def __del__(self) -> None:
        for handle in self.__dict__.get("_files", {}).values():
            os.close(handle)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, hexadecimal, over the names and sizes of the shards, the split and the keys in their order."""
        digest = hashlib.sha256(repr(self.split).encode())
        for path in self.paths:
            digest.update(f"\n{path.name} {path.stat().st_size}".encode())
        digest.update("\n".join(["", *(key for key, _ in self._samples)]).encode())
        return digest.hexdigest()

    def read(self, i: int) -> dict[str, Any]:
        """Sample i itself, as `__getitem__` gives it. BadSample when it cannot be decoded."""
        key, shard = self._samples[i]
        members = self._members(i)
        sample: dict[str, Any] = {"key": key, "meta": self.meta(i)}
        picture = next((extension for extension in PICTURES if extension in members), None)
        wanted = [picture] if picture and "picture" in self.needs else []
        data = {name: self._member(i, name) for name in (*wanted, "txt", "safetensors") if name in members}
        try:
            if picture in data:
                sample["picture"] = decode_picture(data[picture])
            if "txt" in data:
                sample["caption"] = data["txt"].decode("utf-8").strip()
        except DECODE_ERRORS as error:
            raise BadSample(f"{self.paths[shard].name}: {key}: {error}") from error
        if "safetensors" in data:
            sample["safetensors"] = data["safetensors"]
        return sample

    def raw(self, i: int) -> dict[str, bytes]:
        """The members of sample i as stored: extension -> bytes (pictures, txt, json, safetensors only)."""
        return {extension: self._member(i, extension) for extension in self._members(i)}

    def key(self, i: int) -> str:
        """The key of sample i; no file is read."""
        return self._samples[i][0]

    def members(self, i: int) -> tuple[str, ...]:
        """The extensions that sample i has."""
        return tuple(self._members(i))

    def shard(self, i: int) -> Path:
        """The tar that sample i lies in."""
        return self.paths[self._samples[i][1]]

    def caption(self, i: int) -> str:
        """The caption of sample i; its picture is not read."""
        return self._member(i, "txt").decode("utf-8", "replace").strip()

    def meta(self, i: int) -> dict[str, Any]:
        """The JSON of sample i, {} where it has none. BadSample when it is no JSON object."""
        key, shard = self._samples[i]
        if "json" not in self._members(i):
            return {}
        try:
            meta = json.loads(self._member(i, "json"))
        except ValueError as error:
            raise BadSample(f"{self.paths[shard].name}: {key}.json: {error}") from error
        if not isinstance(meta, dict):
            raise BadSample(f"{self.paths[shard].name}: {key}.json: not an object")
        return meta

    def columns(self, *names: str) -> list[tuple[Any, ...]]:
        """What the metadata tells of every sample under `names`, None where nothing.

        From the parquets where these are to be trusted, which opens no tar, else from the JSONs."""
        told: dict[int, dict[str, tuple[Any, ...]]] = {}
        for shard in {shard for _, shard in self._samples if {*names} <= {*TEXT_COLUMNS, *SIZE_COLUMNS}}:
            if table := manifest(self.paths[shard], names):
                rows = zip(*(table[name] for name in names), strict=True)
                told[shard] = dict(zip(table["key"], rows, strict=True))
        return [
            told[shard][key] if key in told.get(shard, {}) else tuple(map(self.meta(i).get, names))
            for i, (key, shard) in enumerate(self._samples)
        ]

    def sizes(self) -> np.ndarray:
        """Width and height of every picture in pixels, int64 (n, 2), by the metadata or by the picture's header.

        BadSample for a picture whose size neither tells."""
        told = self.columns("width", "height")
        return np.array([size if all(size) else self._picture_size(i) for i, size in enumerate(told)])

    def tensor_shape(self, i: int, name: str) -> tuple[int, ...]:
        """The shape of a tensor in sample i's safetensors, by its header. BadSample when it has none."""
        try:
            start = self._member(i, "safetensors", 8)
            header = json.loads(self._member(i, "safetensors", 8 + int.from_bytes(start, "little"))[8:])
            return tuple(header[name]["shape"])
        except (ValueError, KeyError, TypeError) as error:
            raise BadSample(f"{self.shard(i).name}: {self.key(i)}: no tensor {name!r} ({error})") from error

    def _picture_size(self, i: int) -> tuple[int, int]:
        extension = next(name for name in PICTURES if name in self._members(i))
        try:
            try:
                return _upright_size(open_picture(self._member(i, extension, HEAD)))
            except OSError:  # a long profile or thumbnail before the size
                return _upright_size(open_picture(self._member(i, extension)))
        except DECODE_ERRORS as error:
            raise BadSample(f"{self.shard(i).name}: {self.key(i)}: {error}") from error

    def _members(self, i: int) -> Members:
        key, shard = self._samples[i]
        table = self._tables.get(shard)
        if table is None:
            table = self._read_table(shard)
        if key not in table:
            raise BadSample(f"{self.paths[shard].name}: {key}: told by the parquet, but not whole in the tar")
        return table[key]

    def _member(self, i: int, extension: str, most: int | None = None) -> bytes:
        """The bytes of a member, or its first `most`."""
        key, shard = self._samples[i]
        offset, size = self._members(i)[extension]
        size = size if most is None else min(size, most)
        handle = self._files.get(shard)
        if handle is None:
            try:
                handle = os.open(self.paths[shard], os.O_RDONLY)
            except OSError as error:
                raise ValueError(
                    f"shard {self.paths[shard]} is gone ({error}); put it back and run again"
                ) from error
            if len(self._files) >= MAX_OPEN or self._files.setdefault(shard, handle) != handle:
                data = os.pread(handle, size, offset)  # too many, or another thread was first
                os.close(handle)
                return self._whole(data, size, key, extension)
        return self._whole(os.pread(handle, size, offset), size, key, extension)

    def _whole(self, data: bytes, size: int, key: str, extension: str) -> bytes:
        if len(data) != size:
            raise BadSample(f"{key}.{extension}: the shard was cut short while it was being read")
        return data

    def _problem(self, text: str) -> None:
        if self.on_error == "raise":
            raise BadSample(text)
        self.problems.append(text)

    def _note_once(self, i: int, text: str) -> None:
        if i not in self._bad:
            self._bad.add(i)
            self.problems.append(text)

    def _index(self) -> None:
        """Lists the samples wanted. Parquets are believed if the first of them tells what its tar holds and we need."""
        seen: dict[str, int] = {}
        believed = self.split is not None
        for shard, path in enumerate(self.paths):
            told = manifest(path, ["split"]) if believed else None
            splits = dict(zip(told["key"], told["split"], strict=True)) if told else {}
            if told is None or shard == 0:
                found = list(self._read_table(shard))
                believed = believed and (shard > 0 or found == list(splits))
            for key in self._tables.get(shard, splits):
                if key in seen:
                    self._problem(
                        f"{path.name}: {key}: already in {self.paths[seen[key]].name}, the first is used"
                    )
                    continue
                seen[key] = shard
                self._samples.append((key, shard))
                if self.split is not None and not self._of_split(splits.get(key)):
                    self._samples.pop()

    def _of_split(self, told: str | None) -> bool:
        """Whether the sample listed last is of the split, told by the parquet if it knows, else by its JSON."""
        try:
            return (told or self.meta(len(self._samples) - 1).get("split")) == self.split
        except BadSample as error:
            self._problem(str(error))
            return False

    def _read_table(self, shard: int) -> dict[str, Members]:
        """Reads a shard's headers and keeps the whole samples; names the others."""
        name = self.paths[shard].name
        members, trouble = tar_members(self.paths[shard])
        problems = [f"{name}: {trouble}"] if trouble else []
        ignored: Counter[str] = Counter()
        samples: dict[str, Members] = {}
        for path, offset, size in members:
            key, _, extension = path.rpartition("/")[2].partition(".")
            extension = extension.lower()
            key = path[: len(path) - len(extension) - 1] if extension else path
            if extension not in EXTENSIONS:
                ignored[extension] += 1
            elif size > MAX_MEMBER:
                problems.append(f"{name}: {path}: {size} bytes, more than {MAX_MEMBER}")
            elif extension in samples.setdefault(key, {}):
                problems.append(f"{name}: {path}: twice in the shard, the first is used")
            else:
                samples[key][extension] = offset, size
        lacks = {key: self._lack(held) for key, held in samples.items()}
        problems += [f"{name}: {key}: {lack}" for key, lack in lacks.items() if lack]
        table = {key: held for key, held in samples.items() if not lacks[key]}
        if self._tables.setdefault(shard, table) is table:  # no other thread was first
            self.ignored.update(ignored)
            self.faults += problems[:1] if trouble else []
            for problem in problems:
                self._problem(problem)
        return table

    def _lack(self, held: Members) -> str:
        for need in self.needs:
            wanted = PICTURES if need == "picture" else (need,)
            found = [extension for extension in wanted if extension in held]
            what = "caption" if need == "txt" else need
            if not found:
                return f"no {what}"
            if not held[found[0]][1]:
                return f"empty {what}"
        return ""


def told_captions(meta: dict[str, Any]) -> list[str]:
    """The captions that a sample's JSON lists, the fullest first; [] where it lists none, or no texts."""
    told = meta.get("captions")
    return [text for text in told if isinstance(text, str) and text.strip()] if isinstance(told, list) else []


def decode_picture(data: bytes) -> Image.Image:
    """RGBA picture from WebP, PNG or JPEG bytes, turned upright, refused by its header when larger than 64 Mpixel.

    Raises one of DECODE_ERRORS (mostly OSError or ValueError) when it cannot be decoded."""
    picture = open_picture(data)
    ImageOps.exif_transpose(picture, in_place=True)  # else it copies what is upright already
    return to_rgba(picture)


def _upright_size(picture: Image.Image) -> tuple[int, int]:
    """The size that an opened picture has once it is turned upright by its EXIF."""
    lies = "exif" in picture.info and picture.getexif().get(ExifTags.Base.Orientation, 1) >= 5
    return (picture.height, picture.width) if lies else picture.size


def open_picture(data: bytes) -> Image.Image:
    """An opened picture whose pixels are not decoded yet, its size checked. Errors as `decode_picture`."""
    picture = Image.open(io.BytesIO(data), formats=FORMATS)
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{picture.width}x{picture.height} pixels, more than {MAX_PIXELS // 2**20} Mpixel")
    return picture


def _paths(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    if isinstance(paths, str | os.PathLike):
        path = Path(paths)
        return [path] if path.is_file() else _whole_folder(path)
    found = [Path(path) for path in paths]
    for path in found:
        if not path.is_file():
            raise ValueError(f"shard {path} is missing; give shards that exist, or their folder")
    if not found:
        raise ValueError("no shards given; give a folder of shards or a list of .tar files")
    return found


def _whole_folder(folder: Path) -> list[Path]:
    """The shards of a folder. ValueError when one is missing whose parquet is there."""
    paths = shard_paths(folder)
    manifests = (path for path in folder.glob("*.parquet") if re.fullmatch(r"\d{5,}", path.stem))
    if gone := sorted({path.stem for path in manifests} - {path.stem for path in paths}):
        raise ValueError(
            f"{folder / gone[0]}.tar is missing, its parquet is there ({len(gone)} such): put the tar back, or "
            "remove its .parquet and _stats.json too"
        )
    return paths

"""Reading shards: random access to the samples of WebDataset tars by their headers, no unpickling."""

from __future__ import annotations

import io
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffusionfm.data.shards import shard_paths

PICTURES = ("webp", "png", "jpg", "jpeg")
EXTENSIONS = {*PICTURES, "txt", "json", "safetensors"}
MAX_PIXELS = 64 * 2**20
MAX_MEMBER = 2**28  # bytes; a larger member is no picture and no caption
MAX_OPEN = 256  # files kept open a process
Sample = tuple[str, int, dict[str, tuple[int, int]]]  # key, shard, extension -> (offset, size)
DECODE_ERRORS = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)


class BadSample(ValueError):
    """A sample that cannot be used; the message names shard, key and reason."""


class ShardDataset:
    """The samples of a folder of shards (or of some shards), in tar order, at random access.

    paths: a folder, a shard, or a list of shards.
    split: None for all, or the `split` of the samples wanted ("train", "heldout").
    on_error: "skip" names bad samples in `problems` and leaves them out; "raise" raises BadSample.
    needs: what a sample must hold: "picture" (webp, png, jpg or jpeg) or an extension ("txt", "safetensors").

    Only pictures, .txt, .json and .safetensors are ever read; `ignored` counts other members by extension.
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
        self.on_error = on_error
        self.needs = tuple(needs)
        self.problems: list[str] = []
        self.ignored: dict[str, int] = {}
        self._bad: set[int] = set()
        self._files: dict[int, int] = {}
        self._samples: list[Sample] = []
        seen: dict[str, int] = {}
        for shard in range(len(self.paths)):
            self._index(shard, seen)
        if split is not None:
            self._samples = self._of_split(split)
        if not self._samples:
            of = f" of split {split!r}" if split else ""
            why = "; ".join(self.problems[:3]) or "none found"
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

    def read(self, i: int) -> dict[str, Any]:
        """Sample i itself, as `__getitem__` gives it. BadSample when it cannot be decoded."""
        key, shard, members = self._samples[i]
        sample: dict[str, Any] = {"key": key, "meta": self.meta(i)}
        picture = next((extension for extension in PICTURES if extension in members), None)
        try:
            if picture and "picture" in self.needs:
                sample["picture"] = decode_picture(self._member(i, picture))
            if "txt" in members:
                sample["caption"] = self._member(i, "txt").decode("utf-8").strip()
        except DECODE_ERRORS as error:
            raise BadSample(f"{self.paths[shard].name}: {key}: {error}") from error
        if "safetensors" in members:
            sample["safetensors"] = self._member(i, "safetensors")
        return sample

    def raw(self, i: int) -> dict[str, bytes]:
        """The members of sample i as stored: extension -> bytes (pictures, txt, json, safetensors only)."""
        return {extension: self._member(i, extension) for extension in self._samples[i][2]}

    def key(self, i: int) -> str:
        """The key of sample i; no file is read."""
        return self._samples[i][0]

    def members(self, i: int) -> tuple[str, ...]:
        """The extensions that sample i has; no file is read."""
        return tuple(self._samples[i][2])

    def shard(self, i: int) -> Path:
        """The tar that sample i lies in."""
        return self.paths[self._samples[i][1]]

    def caption(self, i: int) -> str:
        """The caption of sample i; its picture is not read."""
        return self._member(i, "txt").decode("utf-8", "replace").strip()

    def meta(self, i: int) -> dict[str, Any]:
        """The JSON of sample i, {} where it has none. BadSample when it is no JSON object."""
        key, shard, members = self._samples[i]
        if "json" not in members:
            return {}
        try:
            meta = json.loads(self._member(i, "json"))
        except ValueError as error:
            raise BadSample(f"{self.paths[shard].name}: {key}.json: {error}") from error
        if not isinstance(meta, dict):
            raise BadSample(f"{self.paths[shard].name}: {key}.json: not an object")
        return meta

    def _member(self, i: int, extension: str) -> bytes:
        key, shard, members = self._samples[i]
        offset, size = members[extension]
        handle = self._files.get(shard)
        if handle is None:
            handle = os.open(self.paths[shard], os.O_RDONLY)
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

    def _index(self, shard: int, seen: dict[str, int]) -> None:
        """Adds the whole samples of one shard; names and leaves out the others."""
        name = self.paths[shard].name
        members, trouble = tar_members(self.paths[shard])
        if trouble:
            self._problem(f"{name}: {trouble}")
        samples: dict[str, dict[str, tuple[int, int]]] = {}
        for path, offset, size in members:
            key, _, extension = path.rpartition("/")[2].partition(".")
            extension = extension.lower()
            key = path[: len(path) - len(extension) - 1] if extension else path
            if extension not in EXTENSIONS:
                self.ignored[extension] = self.ignored.get(extension, 0) + 1
            elif size > MAX_MEMBER:
                self._problem(f"{name}: {path}: {size} bytes, more than {MAX_MEMBER}")
            elif extension in samples.setdefault(key, {}):
                self._problem(f"{name}: {path}: twice in the shard, the first is used")
            else:
                samples[key][extension] = offset, size
        for key, held in samples.items():
            if key in seen:
                self._problem(f"{name}: {key}: already in {self.paths[seen[key]].name}, the first is used")
            elif lack := self._lack(held):
                self._problem(f"{name}: {key}: {lack}")
            else:
                seen[key] = shard
                self._samples.append((key, shard, held))

    def _lack(self, held: dict[str, tuple[int, int]]) -> str:
        for need in self.needs:
            wanted = PICTURES if need == "picture" else (need,)
            found = [extension for extension in wanted if extension in held]
            what = "caption" if need == "txt" else need
            if not found:
                return f"no {what}"
            if not held[found[0]][1]:
                return f"empty {what}"
        return ""

    def _of_split(self, split: str) -> list[Sample]:
        """The samples of a split, told by the parquets where they know, else by the JSONs."""
        known: dict[tuple[int, str], str | None] = {}
        for shard, path in enumerate(self.paths):
            manifest = path.with_suffix(".parquet")
            if manifest.exists():
                known.update({(shard, key): value for key, value in _split_column(manifest)})
        chosen = []
        for i, sample in enumerate(self._samples):
            value = known.get((sample[1], sample[0]))
            try:
                if (value or self.meta(i).get("split")) == split:
                    chosen.append(sample)
            except BadSample as error:
                self._problem(str(error))
        return chosen


def decode_picture(data: bytes, formats: Sequence[str] = ("WEBP", "PNG", "JPEG")) -> Image.Image:
    """RGBA picture from WebP, PNG or JPEG bytes, refused by its header when larger than 64 Mpixel.

    Raises one of DECODE_ERRORS (mostly OSError or ValueError) when it cannot be decoded."""
    return to_rgba(open_picture(data, formats))


def open_picture(data: bytes, formats: Sequence[str]) -> Image.Image:
    """An opened picture whose pixels are not decoded yet, its size checked. Errors as `decode_picture`."""
    picture = Image.open(io.BytesIO(data), formats=list(formats))
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(f"{picture.width}x{picture.height} pixels, more than {MAX_PIXELS // 2**20} Mpixel")
    return picture


def to_rgba(picture: Image.Image) -> Image.Image:
    """Any mode to RGBA; 16-bit grey is scaled, not clipped."""
    if picture.mode.startswith("I"):
        picture = picture.convert("I").point(lambda value: value / 257).convert("L")
    return picture.convert("RGBA")


def tar_members(path: Path) -> tuple[list[tuple[str, int, int]], str]:
    """The regular files of a tar as (name, offset of its data, size), and what is wrong, '' if nothing.

    All before the first fault are listed. Only headers are read (POSIX ustar, GNU long names, pax paths)."""
    members: list[tuple[str, int, int]] = []
    at, long_name = 0, ""
    try:
        with open(path, "rb") as file:
            end = file.seek(0, os.SEEK_END)
            handle = file.fileno()
            while True:
                header = os.pread(handle, 512, at)
                if len(header) < 512:
                    return members, "truncated: no end-of-archive mark" if end else "empty file"
                if not any(header):
                    return members, ""
                name, kind, size = _header(header)
                data = at + 512
                if data + size > end:
                    return members, f"truncated in {long_name or name}"
                if kind in b"Lx":
                    long_name = _long_name(kind, os.pread(handle, min(size, 2**16), data)) or long_name
                elif kind != b"g":
                    if kind in b"0\0":
                        members.append((long_name or name, data, size))
                    long_name = ""
                at = data + (size + 511) // 512 * 512
    except (OSError, ValueError) as error:
        return members, f"unreadable at byte {at}: {error}"


def _header(block: bytes) -> tuple[str, bytes, int]:
    """(name, type, size) of a tar header block. ValueError when its checksum does not hold."""
    checksum = block[148:156].split(b"\0")[0].strip()
    if not checksum.isdigit() or int(checksum, 8) != sum(block) - sum(block[148:156]) + 256:
        raise ValueError("not a tar header (is it a plain, uncompressed tar?)")
    name = block[:100].split(b"\0")[0]
    if block[257:263] == b"ustar\0" and block[345]:
        name = block[345:500].split(b"\0")[0] + b"/" + name
    if block[124] & 128:
        size = int.from_bytes(block[125:136], "big")
    else:
        size = int(block[124:136].split(b"\0")[0].strip() or b"0", 8)
    return name.decode("utf-8", "replace"), block[156:157], size


def _long_name(kind: bytes, data: bytes) -> str:
    if kind == b"L":
        return data.split(b"\0")[0].decode("utf-8", "replace")
    while data:
        length = int(data.split(b" ", 1)[0])
        if length < 5:
            raise ValueError("broken pax header")
        record, data = data[:length], data[length:]
        word, _, value = record.split(b" ", 1)[1].partition(b"=")
        if word == b"path":
            return value.rstrip(b"\n").decode("utf-8", "replace")
    return ""


def _split_column(path: Path) -> list[tuple[str, str | None]]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path, columns=["key", "split"])
    except (pyarrow.ArrowException, OSError):
        return []  # a manifest of another kind, or a broken one (`shards verify` names it): the JSONs tell
    columns = table.to_pydict()
    return list(zip(columns["key"], columns["split"], strict=True))


def _paths(paths: str | os.PathLike | Sequence[str | os.PathLike]) -> list[Path]:
    if isinstance(paths, str | os.PathLike):
        path = Path(paths)
        return [path] if path.is_file() else shard_paths(path)
    found = [Path(path) for path in paths]
    for path in found:
        if not path.is_file():
            raise ValueError(f"shard {path} is missing; give shards that exist, or their folder")
    if not found:
        raise ValueError("no shards given; give a folder of shards or a list of .tar files")
    return found

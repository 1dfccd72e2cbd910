"""Where a batch's pictures go: files in a folder, WebDataset shards, or Parquet; each kept when a record says so.

A store is told which pictures the manifest knows. Whatever else a killed run left behind is not there for it.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from diffusionfm.batch.manifest import MANIFEST
from diffusionfm.batch.report import REPORT, SHEETS
from diffusionfm.images import TEMPORARY, sync_folder, write_atomic

STORES = ("folder", "webdataset", "parquet")
SAMPLES = (1, 10_000)  # in a shard: four digits of a key
GROWING = ".part"  # ends the name of a shard that is not full yet
ROW_GROUP = 100


@dataclass(frozen=True)
class Sample:
    """A picture to keep: the name and bytes of its file, its prompt, and what is told of it beside."""

    stem: str
    suffix: str
    data: bytes
    caption: str
    meta: dict[str, Any]


class Store(Protocol):
    """What the three have in common."""

    def has(self, file: str) -> bool:
        """Whether the file that a record names is there."""

    def resume(self, recorded: Counter[str]) -> None:
        """Begin, or go on where the manifest ends; recorded: how many pictures it knows in each file."""

    def room(self) -> int:
        """How many pictures may come before the next record must be written."""

    def put(self, samples: Sequence[Sample]) -> list[dict[str, str]]:
        """Keep pictures, on disk when this returns; gives each one's `file`, and its `member` in that file."""

    def close(self) -> None:
        """Finish the last file, once everything is recorded."""


def open_store(kind: str, out: Path, suffix: str, samples: int) -> Store:
    """The store of a kind in `out`. ValueError for a kind that there is not, for SVG in anything but a folder, and for
    a folder with somebody's files where the batch would write its own."""
    if kind not in STORES:
        raise ValueError(f"unknown output {kind!r}: use {', '.join(STORES)}")
    if not SAMPLES[0] <= samples <= SAMPLES[1]:
        raise ValueError(f"a shard holds from {SAMPLES[0]} to {SAMPLES[1]:,} pictures, got {samples}")
    if kind == "folder":
        _refuse_foreign(out, [f"*{suffix}"])
        return FolderStore(out)
    if suffix == ".svg":
        raise ValueError(f"SVG goes to a folder, not to {kind}: its readers know pixels; take PNG or WebP")
    names = [f"{'[0-9]' * 5}{end}" for end in (".tar", ".parquet", "_stats.json")]
    _refuse_foreign(out, [*names, f"[0-9]*.tar{GROWING}"])
    return (ShardStore if kind == "webdataset" else ParquetStore)(out, samples)


def _refuse_foreign(out: Path, names: Sequence[str]) -> None:
    """ValueError where a folder has no manifest, and yet files of a batch's names: those are not ours to replace."""
    found = (file for name in (*names, REPORT, SHEETS) for file in out.glob(name))
    first = next(found, None)
    if first is not None and not (out / MANIFEST).exists():
        raise ValueError(
            f"{out} holds {first.name}, which is not of a batch ({MANIFEST} is not there) and could be overwritten: "
            "use a new --out folder"
        )


class FolderStore:
    """A file a picture: temporary file, sync, rename, sync of the folder."""

    def __init__(self, out: Path):
        self.out = out

    def has(self, file: str) -> bool:
        return (self.out / file).is_file()

    def resume(self, recorded: Counter[str]) -> None:
        for leftover in self.out.glob(f"{TEMPORARY}*.tmp"):
            leftover.unlink()

    def room(self) -> int:
        return SAMPLES[1]

    def put(self, samples: Sequence[Sample]) -> list[dict[str, str]]:
        for sample in samples:
            write_atomic(self.out / (sample.stem + sample.suffix), sample.data)
        return [{"file": sample.stem + sample.suffix} for sample in samples]

    def close(self) -> None:
        pass


class ShardStore:
    """WebDataset tars in img2dataset's layout, NNNNN.tar with keys NNNNNIIII, parquet and stats beside each.

    A tar grows as NNNNN.tar.part, synced before its pictures are recorded; what a killed run added without a record is
    cut off. A full one is renamed. So no picture is written twice, and none is lost with its shard.
    """

    suffix = ".tar"

    def __init__(self, out: Path, samples: int):
        self.out = out
        self.samples = samples
        self.number = self.index = 0
        self.file: io.BufferedRandom | None = None

    def has(self, file: str) -> bool:
        return (self.out / file).is_file() or self._part(int(Path(file).stem)).is_file()

    def _part(self, number: int) -> Path:
        return self.out / f"{number:05d}.tar{GROWING}"

    def _final(self, number: int) -> Path:
        return self.out / f"{number:05d}{self.suffix}"

    def resume(self, recorded: Counter[str]) -> None:
        for leftover in self.out.glob(f"{TEMPORARY}*.tmp"):
            leftover.unlink()
        self.number = max((int(Path(file).stem) for file in recorded), default=0)
        name = self._final(self.number).name
        for part in self.out.glob(f"[0-9]*.tar{GROWING}"):
            if part != self._part(self.number) or self._final(self.number).exists():
                part.unlink()  # nothing in it was recorded, or all of it is in the finished file
        if self._final(self.number).exists():
            self._check(self._final(self.number), recorded[name])
            self.number += 1
        elif self._part(self.number).exists():
            self._open(recorded[name])
            self.index = recorded[name]

    def _check(self, final: Path, count: int) -> None:
        """Refuse the last finished shard unless it is recorded picture by picture; see that it has its index."""
        found = self._count(final)
        if found != count:
            raise ValueError(
                f"{final} holds {found} pictures, the manifest knows {count}: restore manifest.jsonl, or delete "
                f"{final.name} to have its pictures drawn again"
            )

    def _count(self, final: Path) -> int:
        if not final.with_name(f"{final.stem}_stats.json").exists():
            self._index(final)
        return sum(1 for _ in _read(final))

    def _open(self, count: int) -> None:
        """Open the growing shard behind its first `count` samples."""
        from diffusionfm.data.index import tar_members

        part = self._part(self.number)
        end = 0
        if count:
            members, _ = tar_members(part)
            if len(members) < 3 * count:
                raise ValueError(
                    f"{part} holds fewer than the {count} pictures that the manifest knows: delete it to have "
                    "them drawn again"
                )
            _, at, size = members[3 * count - 1]
            end = at + (size + 511) // 512 * 512
        self.file = open(part, "r+b" if part.exists() else "w+b")  # noqa: SIM115 (closed by _finish)
        self.file.truncate(end)
        self.file.seek(end)
        self.tar = tarfile.TarFile(fileobj=self.file, mode="w", format=tarfile.USTAR_FORMAT)
        sync_folder(self.out)

    def room(self) -> int:
        if self.index >= self.samples:  # more where an earlier run made larger shards
            self._finish()
        return self.samples - self.index

    def put(self, samples: Sequence[Sample]) -> list[dict[str, str]]:
        if self.file is None:
            self._open(0)
        assert self.file is not None and len(samples) <= self.samples - self.index
        places = []
        for sample in samples:
            key = f"{self.number:05d}{self.index:04d}"
            meta = json.dumps({**sample.meta, "key": key}, ensure_ascii=False, sort_keys=True)
            self._add(key + sample.suffix, sample.data)
            self._add(f"{key}.txt", sample.caption.encode())
            self._add(f"{key}.json", meta.encode())
            places.append({"file": self._final(self.number).name, "member": key + sample.suffix})
            self.index += 1
        self.file.flush()
        os.fsync(self.file.fileno())
        return places

    def _add(self, name: str, data: bytes) -> None:
        info = tarfile.TarInfo(name)
        info.size, info.mode, info.uname, info.gname = len(data), 0o644, "root", "root"
        self.tar.addfile(info, io.BytesIO(data))

    def _finish(self) -> None:
        assert self.file is not None
        self.tar.close()
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        self._publish(self._part(self.number), self._final(self.number))
        self.file, self.number, self.index = None, self.number + 1, 0

    def _publish(self, part: Path, final: Path) -> None:
        os.replace(part, final)
        sync_folder(self.out)
        self._index(final)

    def _index(self, final: Path) -> None:
        from diffusionfm.data.shards import write_index

        told = {"status": "success", "error_message": None}
        write_index(final, [{**meta, "caption": caption, **told} for _, _, caption, meta in _read(final)])

    def close(self) -> None:
        if self.file is not None and self.index:
            self._finish()
        elif self.file is not None:
            self.file.close()
            self._part(self.number).unlink()


class ParquetStore(ShardStore):
    """Parquet files with embedded pictures, a column `image` of {bytes, path} as Hugging Face datasets reads it.

    Parquet cannot grow: pictures gather in a tar, as they do for shards, which becomes a Parquet file when it is full.
    """

    suffix = ".parquet"

    def _publish(self, part: Path, final: Path) -> None:
        import pyarrow
        import pyarrow.parquet

        temporary = self.out / f"{TEMPORARY}{final.name}.tmp"
        with open(temporary, "wb") as file:
            with pyarrow.parquet.ParquetWriter(file, _schema()) as writer:
                rows: list[dict[str, Any]] = []
                for name, data, caption, meta in _read(part):
                    rows.append({**meta, "image": {"bytes": data, "path": name}, "prompt": caption})
                    if len(rows) == ROW_GROUP:
                        writer.write_table(pyarrow.Table.from_pylist(rows, _schema()))
                        rows = []
                if rows:
                    writer.write_table(pyarrow.Table.from_pylist(rows, _schema()))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, final)
        sync_folder(self.out)
        part.unlink()

    def _count(self, final: Path) -> int:
        import pyarrow.parquet

        return pyarrow.parquet.read_metadata(final).num_rows


def _schema() -> Any:
    import pyarrow

    kinds: dict[str, Any] = dict.fromkeys(("seed", "width", "height", "steps", "repeat"), pyarrow.int64())
    kinds["guidance"] = pyarrow.float64()
    names = ["key", "id", "repeat", "prompt", "read_as", "negative_prompt", "seed", "steps", "guidance"]
    names += ["width", "height", "model", "model_hash", "sha256"]
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    features = {"image": {"_type": "Image"}} | {
        name: {"_type": "Value", "dtype": str(kinds.get(name, "string")).replace("double", "float64")}
        for name in names
    }
    fields = [("image", image), *((name, kinds.get(name, pyarrow.string())) for name in names)]
    return pyarrow.schema(fields, {"huggingface": json.dumps({"info": {"features": features}})})


def _read(tar: Path) -> Iterator[tuple[str, bytes, str, dict[str, Any]]]:
    """File name, bytes, caption and meta of the samples of a shard that this module wrote, one after the other."""
    with tarfile.open(tar, "r:") as file:
        found: list[tuple[str, bytes]] = []
        for member in file:
            stream = file.extractfile(member)
            assert stream is not None
            found.append((member.name, stream.read()))
            if len(found) == 3:
                (name, data), (_, caption), (_, meta) = found
                yield name, data, caption.decode(), json.loads(meta)
                found = []

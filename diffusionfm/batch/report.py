"""What a batch did: counts, speed, memory and failures as report.json, and contact sheets of its pictures."""

from __future__ import annotations

import io
import json
import resource
import sys
import tarfile
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any

from PIL import Image

from diffusionfm.batch.advice import WORD, Advice, keep
from diffusionfm.batch.manifest import MANIFEST
from diffusionfm.images import TEMPORARY, contact_sheet, fitted, in_common, save_png, write_atomic

REPORT = "report.json"
PERCENTILES = (50, 90, 99)
SHEET = 100  # pictures on a contact sheet
CELL = 96  # pixels that each has there
SHEETS = "sheets"  # a folder of their own: no row can have that name
MOST_SHEETS = 100


@dataclass
class Summary:
    """What a run did.

    made: pictures now; skipped: found finished; failed: of all rows, now or before; failures: in the whole manifest, by
    kind.
    seconds: of this run after the model was loaded (load_seconds). latencies: seconds of the network call of each
    picture. peak_memory: bytes of this process; peak_gpu_memory: of its GPU, None without one. advice: of all rows.
    otherwise: pictures made now that were drawn in other words than their row's; readings: some of both.
    """

    made: int = 0
    skipped: int = 0
    failed: int = 0
    seconds: float = 0.0
    load_seconds: float | None = None
    failures: dict[str, int] = field(default_factory=dict)
    peak_memory: int = 0
    peak_gpu_memory: int | None = None
    advice: Advice = field(default_factory=Advice)
    otherwise: int = 0
    readings: list[str] = field(default_factory=list)
    latencies: array[float] = field(default_factory=lambda: array("f"), repr=False)

    def read(self, prompt: str, read: str) -> None:
        """Add a picture that was drawn in other words than its prompt's."""
        self.otherwise += 1
        keep(self.readings, [f'"{prompt[:WORD]}" as "{read[:WORD]}"'])

    def report(self) -> dict[str, Any]:
        """As JSON."""
        found = {name: value for name, value in vars(self).items() if name != "latencies"}
        found["advice"] = vars(self.advice)
        found["pictures_per_second"] = self.made / self.seconds if self.made and self.seconds else None
        ordered = sorted(self.latencies)
        found["latency_seconds"] = {
            f"p{percent}": ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
            for percent in PERCENTILES
            if ordered
        }
        return {name: round(value, 4) if isinstance(value, float) else value for name, value in found.items()}

    def text(self) -> str:
        """In a few lines."""
        found = self.report()
        head = f"{self.made:,} made, {self.skipped:,} already there, {self.failed:,} failed, {self.seconds:.1f} s"
        lines = [head]
        if self.made:
            latency = ", ".join(f"{name} {value:.2f} s" for name, value in found["latency_seconds"].items())
            lines.append(f"{found['pictures_per_second']:.2f} pictures/s; a network call took {latency}")
        memory = f"peak memory {self.peak_memory / 2**20:,.0f} MiB"
        if self.peak_gpu_memory is not None:
            memory += f", on the GPU {self.peak_gpu_memory / 2**20:,.0f} MiB"
        if self.load_seconds is not None:
            memory = f"the model was loaded in {self.load_seconds:.1f} s; {memory}"
        lines.append(memory)
        if self.failures:
            lines.append("failed: " + ", ".join(f"{n:,} {kind}" for kind, n in sorted(self.failures.items())))
        lines += self.advice.lines()
        if self.otherwise:
            told = ", ".join(self.readings)
            lines.append(f"{self.otherwise:,} drawn in words that the model knows, such as: {told}")
        return "\n".join(lines)

    def write(self, out: Path, failures: Counter[str]) -> None:
        """Complete the summary, and write it to DIR/report.json."""
        self.failures = dict(sorted(failures.items()))
        unit = 1 if sys.platform == "darwin" else 1024
        self.peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        import torch

        if torch.cuda.is_available():
            self.peak_gpu_memory = torch.cuda.max_memory_allocated()
        write_atomic(out / REPORT, (json.dumps(self.report(), indent=1) + "\n").encode())


def write_sheets(
    out: Path,
    records: Iterable[dict[str, Any]],
    count: int,
    describe: Callable[[str, int, dict[str, Any]], dict[str, Any]] | None,
) -> list[Path]:
    """Contact sheets of the first pictures on record, SHEET on each, at most `count`: DIR/sheets/1.png, 2.png, ...

    The first is written last: where it is there and no older than the manifest, all are.
    describe: a picture's parameters, of its prompt, seed and settings; None leaves them out of the sheets."""
    for leftover in (out / SHEETS).glob(f"{TEMPORARY}*.tmp"):
        leftover.unlink()
    done = (record for record in records if record["status"] == "ok")
    sheets: list[Path] = []
    first: tuple[Image.Image, Path, dict[str, Any] | None] | None = None
    for number in range(1, count + 1):
        page = list(islice(done, SHEET))
        if not page:
            break
        pictures = list(_pictures(out, page))
        labels = [record["prompt"][:200] for record in page]
        sheet = contact_sheet(pictures, labels, columns=min(10, len(pictures)), cell=CELL)
        said = describe and in_common([describe(r["prompt"], r["seed"], r["settings"]) for r in page])
        (out / SHEETS).mkdir(exist_ok=True)
        sheets.append(out / SHEETS / f"{number}.png")
        if number == 1:
            first = sheet, sheets[0], said
        else:
            save_png(sheet, sheets[-1], said)
    if first is not None:
        save_png(*first)
    return sheets


def sheets_are_old(out: Path) -> bool:
    """Whether the sheets were not finished since the manifest was last written."""
    first = out / SHEETS / "1.png"
    return not first.is_file() or first.stat().st_mtime_ns < (out / MANIFEST).stat().st_mtime_ns


def _pictures(out: Path, records: list[dict[str, Any]]) -> Iterator[Image.Image]:
    """The pictures as a sheet shows them: a hundred of 4096 pixels would take 6 GB."""
    for name, group in groupby(records, lambda record: record["file"]):
        members = [record.get("member") for record in group]
        file = out / name
        if members == [None]:
            yield _small(file.read_bytes(), file.suffix)
            continue
        found: dict[str | None, Image.Image] = {
            member: _small(data, file.suffix) for member, data in _members(file, set(members))
        }
        yield from (found[member] for member in members)


def _small(data: bytes, suffix: str) -> Image.Image:
    if suffix == ".svg":
        from resvg_py import svg_to_bytes

        data = bytes(svg_to_bytes(svg_string=data.decode(), width=CELL))
    with Image.open(io.BytesIO(data)) as image:
        return fitted(image, CELL)


def _members(file: Path, wanted: set[str | None]) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of pictures in a shard or a Parquet file, one after the other."""
    if file.suffix == ".tar":
        with tarfile.open(file, "r:") as tar:
            streams = ((member.name, tar.extractfile(member)) for member in tar if member.name in wanted)
            yield from ((name, stream.read()) for name, stream in streams if stream is not None)
        return
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(8, columns=["image"]):
            images = batch["image"].to_pylist()
            yield from ((image["path"], image["bytes"]) for image in images if image["path"] in wanted)

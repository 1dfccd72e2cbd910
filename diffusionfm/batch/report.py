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

from diffusionfm.batch.advice import Advice
from diffusionfm.images import contact_sheet, in_common, save_png, write_atomic

REPORT = "report.json"
PERCENTILES = (50, 90, 99)
SHEET = 100  # pictures on a contact sheet
SHEETS = "sheets"  # a folder of their own: no row can have that name
MOST_SHEETS = 100


@dataclass
class Summary:
    """What a run did.

    made: pictures now; skipped: found finished or failed; failed: of all rows, in the whole manifest, failures by kind.
    seconds: of this run after the model was loaded (load_seconds). latencies: seconds of the network call of each
    picture. peak_memory: bytes of this process; peak_gpu_memory: of its GPU, None without one. advice: of all rows.
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
    latencies: array[float] = field(default_factory=lambda: array("f"), repr=False)

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
        return "\n".join(lines + self.advice.lines())

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

    describe: a picture's parameters, of its prompt, seed and settings; None leaves them out of the sheets."""
    done = (record for record in records if record["status"] == "ok")
    sheets = []
    for number in range(1, count + 1):
        page = list(islice(done, SHEET))
        if not page:
            break
        pictures = list(_pictures(out, page))
        labels = [record["prompt"][:200] for record in page]
        sheet = contact_sheet(pictures, labels, columns=min(10, len(pictures)), cell=96)
        (out / SHEETS).mkdir(exist_ok=True)
        sheets.append(out / SHEETS / f"{number}.png")
        said = describe and in_common([describe(r["prompt"], r["seed"], r["settings"]) for r in page])
        save_png(sheet, sheets[-1], said)
    return sheets


def _pictures(out: Path, records: list[dict[str, Any]]) -> Iterator[Image.Image]:
    for name, group in groupby(records, lambda record: record["file"]):
        members = [record.get("member") for record in group]
        found = {None: (out / name).read_bytes()} if members == [None] else _members(out / name, set(members))
        for member in members:
            data = found[member]
            if name.endswith(".svg"):
                from resvg_py import svg_to_bytes

                data = bytes(svg_to_bytes(svg_string=data.decode(), width=96))
            yield Image.open(io.BytesIO(data)).convert("RGBA")


def _members(file: Path, wanted: set[str | None]) -> dict[str | None, bytes]:
    """Pictures in a shard or a Parquet file, by their names there."""
    if file.suffix == ".tar":
        with tarfile.open(file, "r:") as tar:
            streams = ((member.name, tar.extractfile(member)) for member in tar if member.name in wanted)
            return {name: stream.read() for name, stream in streams if stream is not None}
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        images = (
            row["image"] for batch in table.iter_batches(100, columns=["image"]) for row in batch.to_pylist()
        )
        return {image["path"]: image["bytes"] for image in images if image["path"] in wanted}

"""What the tests of batches share: a few rows, quiet runs, and a stranger's look at what a run left."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet
from PIL import Image

from diffusionfm.batch import generate_batch

PROMPTS = [{"id": f"row-{k}", "prompt": f"a red apple {k}"} for k in range(5)]
ENDS = {"folder": "*.png", "webdataset": "*.tar", "parquet": "*.parquet"}


def make(rows, pipe, out, **options):
    return generate_batch(rows, pipe, out, progress=False, **{"sheets": 0, **options})


def state(out: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in out.iterdir() if p.suffix == ".png"}


def records_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "manifest.jsonl").read_text().splitlines()]


def pictures(out: Path) -> dict[str, bytes]:
    """The bytes of every finished picture by "file/member", read as a stranger would."""
    found = {
        path.name: path.read_bytes() for path in out.iterdir() if path.suffix in (".png", ".webp", ".svg")
    }
    for path in out.glob("*.tar"):
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if name.endswith((".png", ".webp"))]
            found |= {f"{path.name}/{name}": tar.extractfile(name).read() for name in names}
            assert tar.getnames() == sorted(tar.getnames(), key=lambda name: name.split(".")[0])
    for path in [] if list(out.glob("*.tar")) else out.glob("*.parquet"):
        images = pyarrow.parquet.read_table(path)["image"].to_pylist()
        found |= {f"{path.name}/{image['path']}": image["bytes"] for image in images}
    return found


def check(out: Path, count: int) -> list[dict]:
    """Each picture is there once, whole, and recorded once; nothing else is there."""
    records = records_of(out)
    assert len({(r["id"], r["repeat"]) for r in records}) == len(records) == count
    found = pictures(out)
    done = [r for r in records if r["status"] == "ok"]
    for record in done:
        name = f"{record['file']}/{record['member']}" if "member" in record else record["file"]
        assert hashlib.sha256(found.pop(name)).hexdigest() == record["sha256"]
    assert not found and not list(out.rglob(".diffusionfm-*")) and not list(out.glob("*.part"))
    return records


def near(one: bytes, two: bytes) -> bool:
    a, b = (np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (one, two))
    return abs(a - b).max() <= 1

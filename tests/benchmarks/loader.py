"""How fast the loader is, a core: beside a plain PIL loop over the same bytes, a DataLoader over a folder, `datasets`.

Every row decodes the same pictures, drawn at random from the same shards, to RGBA. Seconds are processor time, so that
rates are those of one core. The plain loop has its bytes in memory and gives no batch: it is the roof. With
--train-steps a real autoencoder is trained on the loader, and the share of the time that it waited is told.
"""

from __future__ import annotations

import importlib.util
import io
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import arguments, interleaved, show
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from diffusionfm.data.buckets import BucketConfig
from diffusionfm.data.order import Batches
from diffusionfm.data.reader import PICTURES
from diffusionfm.data.training import DataConfig, picture_batches


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Time each loader over --pictures pictures, then print and return the rows."""
    parser = arguments(__doc__)
    parser.add_argument("--shards", default="data/icons", help="a folder of picture shards")
    parser.add_argument("--pictures", type=int, default=1024, help="pictures a round")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--train-steps", type=int, default=0, help="train so long and tell how long it waited"
    )
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    steps = max(1, args.pictures // args.batch)
    cfg = DataConfig(shards=args.shards, workers=0)
    batches = picture_batches(cfg, args.batch, seed=0)
    ids = [i for step in range(steps) for i in batches.indices(step)]
    with tempfile.TemporaryDirectory() as folder:
        encoded = write_folder(batches, ids, Path(folder))
        calls: dict[str, Callable[[], Any]] = {
            "plain PIL decode": lambda: plain(encoded),
            "ours": lambda: ours(batches, steps),
            "torch DataLoader over a folder": lambda: consume(folder_loader(folder, args.batch)),
        }
        side = Image.open(io.BytesIO(encoded[0])).width
        buckets = BucketConfig(args.batch * side * side // 256, [side], max(8, side // 8), 16)
        own = picture_batches(DataConfig(args.shards, buckets=buckets, workers=0), 1, seed=0)
        calls["ours, in buckets"] = lambda: in_buckets(own, len(ids))
        if importlib.util.find_spec("datasets"):
            calls["datasets, imagefolder"] = hub_loader(folder, args.batch)
        seconds = interleaved(calls, "cpu", args.rounds)
    rows = [
        {
            "loader": name,
            "pictures": len(ids),
            "pictures/s a core": len(ids) / spent,
            "of the plain loop": seconds["plain PIL decode"] / spent,
        }
        for name, spent in seconds.items()
    ]
    if "datasets, imagefolder" not in calls:
        rows.append({"loader": "datasets, imagefolder (not installed: skipped)"})
    if args.train_steps:
        rows.append(waiting(args.shards, args.batch, args.train_steps))
    show(rows, args.json)
    return rows


def write_folder(batches: Batches, ids: list[int], folder: Path) -> list[bytes]:
    """The pictures of these samples as files with captions, as folder loaders want them; gives their bytes."""
    encoded, told = [], []
    for k, i in enumerate(ids):
        raw = batches.dataset.raw(i)
        extension = next(name for name in PICTURES if name in raw)
        encoded.append(raw[extension])
        (folder / f"{k:06d}.{extension}").write_bytes(raw[extension])
        (folder / f"{k:06d}.txt").write_bytes(raw["txt"])
        told.append(json.dumps({"file_name": f"{k:06d}.{extension}", "text": raw["txt"].decode()}))
    (folder / "metadata.jsonl").write_text("\n".join(told) + "\n")
    return encoded


def plain(encoded: list[bytes]) -> None:
    """What cannot be saved: every picture decoded to an array of RGBA."""
    for data in encoded:
        np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))


def ours(batches: Batches, steps: int) -> None:
    """Batches with captions and metadata, made when they are asked for."""
    for step in range(steps):
        batches.batch(step)


def in_buckets(batches: Batches, pictures: int) -> None:
    """As many pictures or a few more, by batches of many sizes."""
    step = 0
    while pictures > 0:
        pictures -= len(batches.batch(step)["key"])
        step += 1


class Folder(Dataset):
    """Pictures and captions of a folder, read as tutorials do."""

    def __init__(self, folder: str) -> None:
        self.paths = sorted(path for path in Path(folder).iterdir() if path.suffix[1:] in PICTURES)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, str]:
        with Image.open(self.paths[i]) as picture:
            array = np.array(picture.convert("RGBA"))
        return torch.from_numpy(array).permute(2, 0, 1), self.paths[i].with_suffix(".txt").read_text()


def folder_loader(folder: str, batch: int) -> DataLoader:
    """torch's loader over the folder, shuffled, in this process."""
    return DataLoader(Folder(folder), batch_size=batch, shuffle=True)


def hub_loader(folder: str, batch: int) -> Callable[[], None]:
    """`datasets`' imagefolder over the same files, as torch tensors."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from datasets import load_dataset

    def stack(samples: list[dict[str, Any]]) -> torch.Tensor:
        arrays = [np.array(sample["image"].convert("RGBA")) for sample in samples]
        return torch.stack([torch.from_numpy(array).permute(2, 0, 1) for array in arrays])

    data = load_dataset("imagefolder", data_dir=folder, split="train", cache_dir=f"{folder}/.cache")
    return lambda: consume(DataLoader(data, batch_size=batch, shuffle=True, collate_fn=stack))


def consume(batches: DataLoader | Iterator) -> None:
    """Reads a loader to its end."""
    for _ in batches:
        pass


def waiting(shards: str, batch: int, steps: int) -> dict[str, Any]:
    """The share of training time spent waiting for a batch, by the run's own metrics, its first two steps apart."""
    from diffusionfm.autoencoder import AutoencoderKL
    from diffusionfm.objectives import Reconstruction
    from diffusionfm.trainer import Trainer, TrainerConfig

    with tempfile.TemporaryDirectory() as folder:
        cfg = TrainerConfig(output_dir=folder, steps=steps + 2, batch_size=batch, tracker="none")
        vae = AutoencoderKL(widths=(16, 32, 64), encoder_depths=(1, 1), decoder_depths=(1, 1, 1))
        Trainer(cfg, Reconstruction(vae), picture_batches(DataConfig(shards), batch, 0)).fit()
        lines = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()][2:]
    waits = [line["wait_s"] * line["images_per_s"] / batch for line in lines]
    name = f"training a small autoencoder, {len(lines)} steps"
    return {"loader": name, "median wait": statistics.median(waits), "mean wait": statistics.fmean(waits)}


if __name__ == "__main__":
    main()

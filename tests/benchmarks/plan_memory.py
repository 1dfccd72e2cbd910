"""Is `diffusionfm plan` right about memory? Its prediction beside what a real run's allocator hands out, on this CPU.

The run is the real one: Trainer, FlowMatching with a frozen text encoder, optimisers, averages. Measured are the bytes
that torch's profiler sees the allocator give and take back, at their most; not the process's size, which is noise.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from diffusionfm.config import load_config
from diffusionfm.objectives import FlowMatching
from diffusionfm.plan import build, predict, shapes_of
from diffusionfm.text import build_text_encoder, train_tokenizer
from diffusionfm.trainer import Trainer
from train.denoiser import DenoiserConfig

WORDS = ["a red circle", "a blue star on white", "a green heart"]
SMALL = {"width": 128, "depth": 4, "heads": 4, "condition_dim": 64, "grid": 8}
CASES: dict[str, dict[str, Any]] = {
    "DiT, AdamW, fp32": {"denoiser": SMALL, "trainer": {"batch_size": 16}},
    "DiT, Muon, bf16, two averages": {
        "denoiser": SMALL,
        "trainer": {"batch_size": 16, "optimizer": "muon", "precision": "bf16", "ema": [0.05, 0.1]},
    },
    "DiT, 4 pieces": {"denoiser": SMALL, "trainer": {"batch_size": 32, "grad_accum": 4}},
    "DiT, little batch": {"denoiser": SMALL | {"width": 256}, "trainer": {"batch_size": 2}},
    "DiT, routed, sdpa": {
        "denoiser": SMALL
        | {"grid": 16, "attention_kernel": "sdpa", "route": {"share": 0.5, "start": 1, "end": -1}},
        "trainer": {"batch_size": 8},
    },
    "U-Net, AdamW": {
        "kind": "unet",
        "denoiser": {"widths": [64, 128], "blocks": 1, "text_width": 64, "condition_dim": 64, "grid": 16},
        "trainer": {"batch_size": 8},
    },
}


class Latents:
    """Random latents and words, as the loader gives them."""

    def __init__(self, shape: tuple[int, ...]):
        self.shape = shape

    def batch(self, step: int) -> dict[str, Any]:
        b = self.shape[0]
        return {
            "key": [str(k) for k in range(b)],
            "latent": torch.randn(self.shape),
            "caption": [WORDS[k % len(WORDS)] for k in range(b)],
        }


def compare(case: dict[str, Any], folder: Path, steps: int = 3) -> dict[str, float]:
    """Predicted and measured bytes of a run of `steps` steps of a case, and their ratio."""
    tokenizer = train_tokenizer(WORDS, vocab_size=300, context=24)
    small = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    text_encoder = build_text_encoder(tokenizer, **small)
    text_encoder.save_pretrained(folder / "text_encoder")
    trainer = {"precision": "fp32", "device": "cpu", "steps": steps, "tracker": "none", **case["trainer"]}
    overrides = [f"trainer.{key}={json.dumps(value)}" for key, value in trainer.items()]
    overrides += [
        f"trainer.output_dir={folder / 'run'}",
        f"text_encoder={folder / 'text_encoder'}",
        "vae=none",
    ]
    overrides += [f"kind={case.get('kind', 'transformer')}"]
    cfg = load_config(DenoiserConfig, overrides=overrides)
    cfg.denoiser = {"in_channels": 8, "text_dim": 32, **case["denoiser"]}
    plan = predict(cfg, 1, "cpu")

    denoiser = build(cfg, shapes_of(cfg, 1, None, []), "auto")
    data = Latents((cfg.trainer.batch_size, 8, plan.shapes.side, plan.shapes.side))
    run = Trainer(cfg.trainer, FlowMatching(denoiser, text_encoder, tokenizer), data)
    before = sum(
        p.numel() * p.element_size() for network in (denoiser, text_encoder) for p in network.parameters()
    )
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run.fit()
    measured = before + most_allocated(prof)
    return {"predicted": plan.memory["total"], "measured": measured, "ratio": plan.memory["total"] / measured}


def most_allocated(prof: profile) -> int:
    """The most bytes that were allocated at a time while the profile was taken, over those at its start."""
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        most = max(most, total)
    return most


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    args = parser.parse_args(argv)
    rows = {}
    print(f"{'case':<32}{'predicted MiB':>14}{'measured MiB':>14}{'ratio':>8}")
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = row = compare(case, Path(folder))
        print(
            f"{name:<32}{row['predicted'] / 2**20:>14.1f}{row['measured'] / 2**20:>14.1f}{row['ratio']:>8.3f}"
        )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

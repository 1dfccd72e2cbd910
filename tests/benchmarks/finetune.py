"""LoRA steps a second and peak memory: our run against a plain diffusers + peft training loop at equal settings.

python tests/benchmarks/finetune.py [--steps 30] [--batch 16] [--rank 16] [--threads 2]

The plain loop is that of diffusers' text-to-image LoRA example: `add_adapter`, prompts encoded in every step, MSE on
the velocity, gradient clipping, AdamW. Ours has the trainer's guard, weight average and log besides. Both train the
shipped denoiser on the same random latents and captions in the same precision, each in a process of its own. Time is
the median from one step's beginning to the next, memory the peak of the process with all that is loaded.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
from typing import Any

import torch
from common import clock, show
from peft import LoraConfig

from diffusionfm import flow
from diffusionfm.data.order import Batches
from diffusionfm.devices import has_fast_bf16
from diffusionfm.finetune import FinetuneConfig
from diffusionfm.finetune.methods import build
from diffusionfm.finetune.pictures import Sample, collate
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.text import encode_prompts
from diffusionfm.trainer import Trainer

WARM = 3  # steps left out of the time
LR = 1e-3


def pictures(pipe: DiffusionFMPipeline, count: int = 32) -> list[Sample]:
    """Random latents of the model's size with captions, the same for both."""
    side = pipe.defaults["height"] // pipe.vae.downsample
    latents = torch.randn(
        count, pipe.vae.latent_channels, side, side, generator=torch.Generator().manual_seed(0)
    )
    return [
        {"key": str(k), "latent": latent, "captions": [f"a flat icon of thing number {k}"], "heldout": False}
        for k, latent in enumerate(latents)
    ]


def ours(pipe: DiffusionFMPipeline, steps: int, batch: int, rank: int) -> list[float]:
    """When each step of a run began."""
    began: list[float] = []
    with tempfile.TemporaryDirectory() as out:
        cfg = FinetuneConfig(rank=rank)
        cfg.trainer.steps, cfg.trainer.batch_size, cfg.trainer.lr, cfg.trainer.output_dir = (
            steps,
            batch,
            LR,
            out,
        )
        objective = build(pipe, cfg)
        objective.register_forward_pre_hook(lambda *_: began.append(clock("cpu")))
        data = Batches(pictures(pipe), collate, batch, 0, workers=0)
        Trainer(cfg.trainer, objective, data, resolved_config=cfg).fit()
    return began


def plain(pipe: DiffusionFMPipeline, steps: int, batch: int, rank: int) -> list[float]:
    """The same by diffusers and peft alone."""
    began: list[float] = []
    network, text_encoder = pipe.transformer.requires_grad_(False), pipe.text_encoder.requires_grad_(False)
    network.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(network.lora_targets)))
    weights = [p for p in network.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    data = Batches(pictures(pipe), collate, batch, 0, workers=0)
    bf16 = has_fast_bf16(torch.device("cpu"))
    network.train()
    for step in range(steps):
        began.append(clock("cpu"))
        samples = data.batch(step)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            with torch.no_grad():
                text, mask, _ = encode_prompts(pipe.tokenizer, text_encoder, samples["caption"], multiple=32)
            x0, t = samples["latent"], torch.rand(batch)
            noise = torch.randn_like(x0)
            v = network(flow.interpolate(x0, noise, t), t, text, mask)
            loss = (v.float() - flow.velocity(x0, noise)).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return began


LOOPS = {"ours": ours, "plain": plain}


def measure(name: str, steps: int, batch: int, rank: int) -> dict[str, Any]:
    """One loop's figures, in this process."""
    pipe = DiffusionFMPipeline.from_pretrained(dtype="float32")
    began = LOOPS[name](pipe, steps, batch, rank)
    seconds = statistics.median(b - a for a, b in zip(began[WARM:], began[WARM + 1 :], strict=False))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"loop": name, "steps/s": round(1 / seconds, 3), "peak MiB": round(peak)}


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """Measure both, each in a process of its own, then print and return the rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", metavar="FILE", help="write the rows there as well")
    parser.add_argument("--only", choices=LOOPS, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.steps < WARM + 2:
        raise SystemExit(f"--steps is {WARM + 2} or more: the first {WARM} are not timed")
    if args.only:
        torch.set_num_threads(args.threads)
        row = measure(args.only, args.steps, args.batch, args.rank)
        print(json.dumps(row))
        return [row]
    same = [f"--{key}={getattr(args, key)}" for key in ("steps", "batch", "rank", "threads")]
    rows = []
    for name in LOOPS:
        command = [sys.executable, __file__, *same, f"--only={name}"]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
    show(rows, args.json)
    return rows


if __name__ == "__main__":
    main()

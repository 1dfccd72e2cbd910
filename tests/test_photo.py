"""The run for photographs: full size on the meta device, and all its stages at toy size with the real classes."""

from __future__ import annotations

import importlib
import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path

import pytest
import torch

from diffusionfm import flow
from diffusionfm.config import load_config
from diffusionfm.data.shapes import shape_samples
from diffusionfm.data.shards import ShardWriter
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.precompute.encoder import load_encoder
from tests.photo_toys import write_text, write_vae

ROOT = Path(__file__).resolve().parents[1]
STAGES = (256, 512, 1024)
TOY = {256: 32, 512: 48, 1024: 64}  # pixels a side of the toy run's stages


def read(name: str):
    recipe, cls = (
        ("precompute", "PrecomputeConfig")
        if name.startswith("precompute")
        else ("denoiser", "DenoiserConfig")
    )
    return load_config(
        getattr(importlib.import_module(f"train.{recipe}"), cls), ROOT / f"configs/photo/{name}.yaml"
    )


def test_every_file_is_a_stage_and_says_what_it_is():
    names = {f"{kind}-{side}.yaml" for kind in ("precompute", "denoiser") for side in STAGES}
    files = list((ROOT / "configs/photo").glob("*.yaml"))
    assert {path.name for path in files} == names
    for path in files:
        text = path.read_text()
        assert text.startswith("# ") and "://" not in text
    assert len({read(name[:-5]).trainer.output_dir for name in names}) == len(names)


def test_each_stage_goes_on_from_the_one_before():
    for before, side in zip((None, *STAGES), STAGES, strict=False):
        latents, run = read(f"precompute-{side}"), read(f"denoiser-{side}")
        assert run.data.shards == f"{latents.trainer.output_dir}/latents"
        assert (run.vae, run.text_encoder, run.tokenizer) == (
            latents.vae,
            latents.text_encoder,
            latents.tokenizer,
        )
        assert run.trainer.init == (before and read(f"denoiser-{before}").trainer.output_dir)
        buckets, patch = run.data.buckets, run.denoiser["patch"]
        assert buckets.sides == [side // 8] and buckets.patch == patch and run.trainer.precision == "bf16"
        tokens = (side // 8 // patch) ** 2
        shift = flow.shift_for_tokens(tokens, run.denoiser["grid"] ** 2)
        assert run.objective["times"]["shift"] == run.sample.shift == shift
        assert bool(run.denoiser.get("route")) == (side == 1024)
        assert run.trainer.optimizer == "muon" and run.trainer.ema == [0.05, 0.1]


def test_the_stages_are_one_network_but_for_its_route():
    networks = [
        {k: v for k, v in read(f"denoiser-{side}").denoiser.items() if k != "route"} for side in STAGES
    ]
    assert networks[0] == networks[1] == networks[2]


@pytest.mark.parametrize("side", STAGES)
def test_the_network_is_what_it_says_at_full_size(side):
    from train.denoiser import build_denoiser

    cfg = read(f"denoiser-{side}")
    with torch.device("meta"):
        network = build_denoiser(cfg, 16, 1024).train()
        assert 0.33e9 < sum(p.numel() for p in network.parameters()) < 0.37e9
        latent = torch.empty(2, 16, side // 8, side // 8 - 8)
        text, mask = torch.empty(2, 128, 1024), torch.ones(2, 128, dtype=torch.bool)
        with torch.no_grad():
            assert network(latent, torch.rand(2), text, mask).shape == latent.shape


def test_encoders_of_other_widths_are_named():
    from train.denoiser import build_denoiser

    with pytest.raises(ValueError, match=r"denoiser.text_dim=1024, but encoders/text gives 2048"):
        build_denoiser(read("denoiser-256"), 16, 2048)
    with pytest.raises(ValueError, match=r"denoiser.in_channels=16, but encoders/vae gives 4"):
        build_denoiser(read("denoiser-256"), 4, 1024)


# ---- the whole run at toy size ---------------------------------------------------------------------------


class Studio:
    """A folder like the repository's root, with toy encoders and toy photographs of two aspect ratios."""

    def __init__(self, root: Path, vae: str, text: str) -> None:
        self.root = root
        (root / "configs").symlink_to(ROOT / "configs")
        write_vae(root / "encoders/vae", vae)
        write_text(root / "encoders/text", text)
        self.channels = {"sdxl": 4, "flux": 16, "dcae": 8}[vae]
        for stage, side in TOY.items():
            with ShardWriter(root / f"data/photo-{stage}") as writer:
                for k, (key, picture, caption, meta) in enumerate(shape_samples(60, side, seed=0)):
                    size = (side, side) if k % 3 else (side + 16, side)
                    writer.write(key, picture.resize(size), caption, meta)

    def run(self, recipe: str, name: str, *overrides: str) -> str:
        """Run a recipe on a shipped config here; gives what it printed."""
        load_encoder.cache_clear()  # it knows networks by their folders, which here depend on where we are
        before = Path.cwd()
        os.chdir(self.root)
        try:
            with redirect_stdout(io.StringIO()) as out:
                importlib.import_module(f"train.{recipe}").main([f"configs/photo/{name}.yaml", *overrides])
        finally:
            os.chdir(before)
        return out.getvalue()

    def stage(self, side: int, patch: int) -> str:
        """Precompute and two training steps of a stage; gives what the training printed."""
        self.run("precompute", f"precompute-{side}", "trainer.batch_size=4")
        tokens = (TOY[side] // 8 // patch) ** 2
        network = {"width": 32, "depth": 6, "heads": 2, "condition_dim": 16, "grid": 2, "patch": patch}
        network |= {"in_channels": self.channels, "text_dim": 32}
        small = [f"denoiser.{key}={value}" for key, value in network.items()]
        trainer = {"steps": 2, "batch_size": 2, "compile": "false", "device": "cpu", "tracker": "none"}
        small += [f"trainer.{key}={value}" for key, value in trainer.items()]
        small += [f"data.buckets.tokens={8 * tokens}", f"data.buckets.patch={patch}", "data.workers=1"]
        small += ["sample.steps=2", "sample.prompts=[a red heart]", "validation_latents=4"]
        return self.run("denoiser", f"denoiser-{side}", *small)


@pytest.mark.slow
@pytest.mark.parametrize(("vae", "text", "patch"), [("flux", "qwen3", 2), ("dcae", "t5", 1)])
def test_all_stages_run_from_pictures_to_pictures(tmp_path, vae, text, patch):
    studio = Studio(tmp_path, vae, text)
    for side in STAGES:
        said = studio.stage(side, patch)
        run = tmp_path / f"runs/photo/denoiser-{side}"
        assert ("warm start from" in said) == (side > 256)
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == [1, 2] and "heldout_loss" in lines[-1]
        assert (run / "samples/0000002.png").is_file()
    pipe = DiffusionFMPipeline.from_pretrained(tmp_path / "runs/photo/denoiser-1024/pipeline")
    assert pipe.defaults["shift"] == 4.0 and pipe.transformer.config.route["share"] == 0.5
    picture = pipe("a red heart", width=64, height=96, num_inference_steps=2).images[0]
    assert picture.size == (64, 96) and picture.getextrema()[3] == (255, 255)

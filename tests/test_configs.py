"""Shipped configs load into their recipes, agree with each other, and `needs` makes what is missing."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch
import yaml

from diffusionfm.config import load_config
from diffusionfm.data.icons import load_corpus_config
from diffusionfm.needs import make_missing, require
from diffusionfm.transformer import DiffusionTransformer
from diffusionfm.unet import DiffusionUNet

ROOT = Path(__file__).resolve().parents[1]
CLASSES = {
    "tokenizer": ("tokenizer", "TokenizerConfig"),
    "vae": ("vae", "VAEConfig"),
    "upscaler": ("upscaler", "UpscalerConfig"),
    "text_encoder": ("text_encoder", "TextEncoderConfig"),
    "precompute": ("precompute", "PrecomputeConfig"),
    "denoiser": ("denoiser", "DenoiserConfig"),
    "unet": ("denoiser", "DenoiserConfig"),
}
FAMILIES = ("tiny", "icons")


def read(family: str, name: str):
    module, cls = CLASSES[name]
    config_class = getattr(importlib.import_module(f"train.{module}"), cls)
    return load_config(config_class, ROOT / f"configs/{family}/{name}.yaml")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_is_complete_and_says_what_it_is(family):
    files = sorted((ROOT / "configs" / family).glob("*.yaml"))
    assert {path.stem for path in files} >= set(CLASSES)
    assert all(path.read_text().startswith("# ") for path in files)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_stage_reads_what_the_one_before_writes(family):
    made = {name: read(family, name).trainer.output_dir for name in CLASSES}
    assert len(set(made.values())) == len(CLASSES)
    shards = {read(family, name).shards for name in ("tokenizer", "precompute")}
    shards |= {read(family, name).data.shards for name in ("vae", "text_encoder")}
    assert len(shards) == 1
    assert read(family, "upscaler").vae == f"{made['vae']}/vae"
    assert read(family, "precompute").vae == f"{made['vae']}/vae"
    assert read(family, "text_encoder").tokenizer == f"{made['tokenizer']}/tokenizer"
    for name in ("denoiser", "unet"):
        cfg = read(family, name)
        assert cfg.data.shards == f"{made['precompute']}/latents"
        assert (cfg.vae, cfg.tokenizer) == (f"{made['vae']}/vae", f"{made['tokenizer']}/tokenizer")
        assert cfg.text_encoder == f"{made['text_encoder']}/text_encoder"


@pytest.mark.parametrize("name", CLASSES)
def test_tiny_configs_say_how_to_make_what_they_need(name):
    cfg = read("tiny", name)
    assert not getattr(cfg.trainer, "compile", False)
    assert getattr(cfg.trainer, "tracker", "tensorboard") == "tensorboard"
    for path, command in cfg.needs.items():
        first = command.split()[0]
        if first == "-m":
            assert importlib.util.find_spec(command.split()[1]) and path in command
        else:
            config = command.split()[1]
            made = yaml.safe_load((ROOT / config).read_text())["trainer"]["output_dir"]
            assert (ROOT / first).is_file() and path.startswith(made)
    paths = [getattr(cfg, key, None) for key in ("shards", "vae", "tokenizer", "text_encoder")]
    paths += [getattr(getattr(cfg, "data", None), "shards", None)]
    assert {path for path in paths if isinstance(path, str)} <= set(cfg.needs)


def test_transformer_and_unet_are_rivals_on_equal_terms():
    ours, rival = read("icons", "denoiser"), read("icons", "unet")
    assert ours.data == rival.data and ours.trainer.batch_size == rival.trainer.batch_size

    def size(cls: type, name: str) -> int:
        with torch.device("meta"):
            return sum(p.numel() for p in cls(**read("icons", name).denoiser).parameters())

    assert 0.8 < size(DiffusionUNet, "unet") / size(DiffusionTransformer, "denoiser") < 1.25


def test_the_corpus_config_loads_and_refuses_unknown_keys(tmp_path):
    config = load_corpus_config(ROOT / "configs/data/icons.yaml")
    assert config.size == 128 and "noto" in config.sources
    (tmp_path / "bad.yaml").write_text("packages: {}\nsources: {}\nsise: 3\n")
    with pytest.raises(ValueError, match="sise"):
        load_corpus_config(tmp_path / "bad.yaml")
    (tmp_path / "bad.yaml").write_text("packages: {}\nsources: {a: {package: b}}\n")
    with pytest.raises(ValueError, match="lacks"):
        load_corpus_config(tmp_path / "bad.yaml")


def test_needs_are_made_once_in_order_and_without_a_shell(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    note = """-c "import sys; open(sys.argv[1], 'w').write(sys.argv[2])" """
    make_missing({"a": note + "a '$(echo no shell); x'", "b": note + "b two"})
    assert (tmp_path / "a").read_text() == "$(echo no shell); x" and (tmp_path / "b").read_text() == "two"
    make_missing({"a": "-c 'raise SystemExit(3)'"})
    with pytest.raises(ValueError, match="exit code 3"):
        make_missing({"c": "-c 'raise SystemExit(3)'", "d": note + "d never"})
    assert not (tmp_path / "d").exists()
    with pytest.raises(ValueError, match="did not make c"):
        make_missing({"c": "-c pass"})
    (run := tmp_path / "run").mkdir()  # a run that was stopped has written its network
    (run / "vae").mkdir()
    (run / "config.yaml").write_text("trainer: {steps: 9}")
    (run / "ledger.json").write_text('{"steps": 4}')
    make_missing({str(run / "vae"): note + f"""{run / "ledger.json"} '{{"steps": 9}}'"""})
    assert "run/vae is unfinished: python" in capfd.readouterr().out
    make_missing({str(run / "vae"): "-c 'raise SystemExit(3)'"})


def test_require_names_the_key(tmp_path):
    require(vae=str(tmp_path))
    with pytest.raises(ValueError, match="tokenizer=.*nowhere"):
        require(vae=str(tmp_path), tokenizer=str(tmp_path / "nowhere"))

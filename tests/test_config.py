"""Config loading: layers, names of near keys, types, dump and the command line."""

from dataclasses import dataclass, field

import pytest

from diffusionfm.config import ConfigError, dump_config, load_config, parse_args
from diffusionfm.trainer import TrainerConfig


@dataclass
class Data:
    path: str = "shards"
    weights: list[float] = field(default_factory=lambda: [1.0])
    limit: int | None = None


@dataclass
class Run:
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    data: Data = field(default_factory=Data)
    transformer: dict = field(default_factory=dict)


def test_layers_override_each_other(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("trainer: {steps: 5, lr: 1e-4}\ntransformer: {width: 8, heads: {n: 2}}\n")
    cfg = load_config(
        Run, path, ["trainer.steps=7", "transformer.depth=3", "data.limit=2", "data.weights=[1,2]"]
    )
    assert (cfg.trainer.steps, cfg.trainer.lr, cfg.trainer.batch_size) == (7, 1e-4, 64)
    assert cfg.transformer == {"width": 8, "heads": {"n": 2}, "depth": 3}
    assert cfg.data == Data(limit=2, weights=[1.0, 2.0])
    dump_config(cfg, tmp_path / "out.yaml")
    assert load_config(Run, tmp_path / "out.yaml") == cfg


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("data.weights=1", ["data.weights", "takes a list, as [one, two]"]),
        ("trainer.stepz=3", ["trainer.stepz", "trainer.steps"]),
        ("steps=3", ["steps", "trainer.steps"]),
        ("trainer.steps=many", ["trainer.steps", "many"]),
        ("trainer=3", ["trainer", "trainer.output_dir"]),
        ("trainer.steps=0", ["trainer.steps", "at least 1"]),
        ("trainer.optimizer=sgd", ["trainer.optimizer", "muon"]),
        ("trainer.ema=0.5", ["EMA"]),
        ("trainer.betas=[0.9]", ["trainer.betas", "two numbers"]),
        ("trainer.steps", ["key=value"]),
        ("zebra=1", ["zebra", "trainer"]),
        ("data.path=${nowhere}", ["data.path", "nowhere"]),
    ],
)
def test_bad_overrides_are_one_line_that_names_the_fix(override, words):
    with pytest.raises(ValueError) as error:
        load_config(Run, None, [override])
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


@pytest.mark.parametrize("text", ["[1, 2]", "a: [", "trainer: {nope: 1}"])
def test_bad_files(tmp_path, text):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load_config(Run, path)
    with pytest.raises(ConfigError, match="no such config"):
        load_config(Run, tmp_path / "missing.yaml")


def test_command_line(tmp_path, capsys):
    path = tmp_path / "run.yaml"
    path.write_text("trainer: {steps: 5}\n")
    assert parse_args(Run, [str(path), "trainer.seed=3"]).trainer.seed == 3
    assert parse_args(Run, ["trainer.seed=4"]).trainer.seed == 4
    assert parse_args(Run, []).trainer.steps == 1000
    for argv in ([str(path), "trainer.sed=3"], ["trainer.steps=-1"], ["nowhere.yaml"]):
        with pytest.raises(SystemExit) as left:
            parse_args(Run, argv)
        assert left.value.code == 2
        assert capsys.readouterr().err.startswith("error: ")
    with pytest.raises(SystemExit) as left:
        parse_args(Run, ["--help"], "Trains.", "python train/x.py configs/x.yaml trainer.steps=9")
    out = capsys.readouterr().out
    assert left.value.code == 0 and "trainer.steps = 1000" in out and "trainer.steps=9" in out


def test_a_file_holds_what_differs_from_its_base(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "first.yaml").write_text("trainer: {steps: 5, lr: 1e-4}\ndata: {path: here}\n")
    (tmp_path / "deep/second.yaml").write_text("base: ../first.yaml\ntrainer: {steps: 6}\n")
    (tmp_path / "deep/third.yaml").write_text("base: second.yaml\ndata: {limit: 3}\n")
    cfg = load_config(Run, tmp_path / "deep/third.yaml", ["trainer.warmup=2"])
    assert (cfg.trainer.steps, cfg.trainer.lr, cfg.trainer.warmup) == (6, 1e-4, 2)
    assert cfg.data == Data(path="here", limit=3)


@pytest.mark.parametrize(
    ("base", "words"),
    [("run.yaml", "leads back"), ("gone.yaml", "no such config file"), ("[a, b]", "not the path")],
)
def test_a_base_that_cannot_be_is_refused(tmp_path, base, words):
    (tmp_path / "run.yaml").write_text(f"base: {base}\ntrainer: {{steps: 5}}\n")
    with pytest.raises(ConfigError, match=words):
        load_config(Run, tmp_path / "run.yaml")

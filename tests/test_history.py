"""The scorecard's history: reports in, one line a model, a table and a plot of one protocol at a time."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from train.history import FILE, drawing, main, of_protocol, plot, read, table

SHARE = {"share": 2 / 3, "low": 0.3, "high": 0.9, "right": 4, "of": 6}


def report(
    folder, model="aaa", protocol="f" * 64, fast=False, vae="v" * 12, sound=True, guidance=4.0, **lines
):
    """The file of a report such as `evaluate` writes, with people and pictures' words that no history keeps."""
    lines = {"rules.count": SHARE, "loss": {"mean": 0.5, "low": 0.4, "high": 0.6, "of": 9}} | lines
    told = {
        "protocol": {"version": 1, "hash": protocol, "quick": False, "pictures": 15, "training_pictures": 7},
        "model": {
            "name": "icons",
            "fingerprint": model,
            "vae_hash": vae,
            "steps": 20,
            "guidance": guidance,
            "shift": 1.0,
            "phrasebook": "",
            "fast": fast,
            "dtype": "bfloat16",
            "device": "cpu",
        },
        "version": "1.2.3",
        "date": "2026-01-02",
        "sound": sound,
        "complaints": [] if sound else ["counts: blank pictures break it"],
        "lines": {name: {"title": name, "model": figure, "real": SHARE} for name, figure in lines.items()},
        "people": {"a doctor": {"nearest": {"health worker": 3}}},
    }
    file = folder / f"{model}.json"
    file.write_text(json.dumps(told))
    return file


@pytest.fixture
def history(tmp_path):
    """A function that adds a report to a history of the test's own, and that history's file."""
    file = tmp_path / "history.json"

    def add(path, samples="1000"):
        main(
            [
                "--file",
                str(file),
                "add",
                str(path),
                "--label",
                "a <b>",
                "--samples",
                samples,
                "--flops",
                "2e9",
            ]
        )

    return add, file


def test_a_report_becomes_one_line_of_figures(history, tmp_path):
    add, file = history
    add(report(tmp_path, likeness={"distance": 54.271, "of": 6}))
    (entry,) = read(file)["models"]
    assert entry["figures"] == {
        "rules.count": [0.6667, 0.3, 0.9, 6],
        "loss": [0.5, 0.4, 0.6, 9],
        "likeness": [54.27, 54.27, 54.27, 6],
    }
    assert (entry["samples"], entry["flops"], entry["label"]) == (1000, 2e9, "a <b>")
    made_by = [entry[name] for name in ("dtype", "device", "fast", "vae_hash", "date", "version")]
    assert made_by == ["bfloat16", "cpu", False, "v" * 12, "2026-01-02", "1.2.3"]
    assert read(file)["protocols"]["f" * 64]["real"]["rules.count"] == [0.6667, 0.3, 0.9, 6]
    assert len(file.read_text().splitlines()) == 6 and "doctor" not in file.read_text()


def test_only_one_protocol_is_plotted(history, tmp_path, capsys):
    add, file = history
    add(report(tmp_path, "old"), "500")
    add(report(tmp_path, "other", protocol="e" * 64, **{"rules.count": SHARE | {"share": 0.01}}))
    add(report(tmp_path, "few", fast=True))
    add(report(tmp_path, "new"), "3000")
    plot(file)
    printed = capsys.readouterr().out
    rows = printed.splitlines()
    assert len(rows) == 2 + 3 + 1 and "a &lt;b&gt; | 500 | 2e09 | 0.500 (0.40–0.60)" in rows[2]
    assert printed.count("66.7 (30–90)") == 4 and "| 1 (30–90)" not in printed
    drawn = ElementTree.parse(file.with_suffix(".svg")).getroot()
    texts = ["".join(text.itertext()) for text in drawn.iter("{http://www.w3.org/2000/svg}text")]
    assert "counts" in texts and "places" not in texts and "Rings" in texts[-1]
    rings = [circle for circle in drawn.iter("{http://www.w3.org/2000/svg}circle") if circle.get("r") == "5"]
    assert len(rings) == 1  # of shares; a few-step network's loss is not drawn
    assert [entry["model"] for entry in of_protocol(read(file), "e")[1]] == ["other"]
    for begins in ("", "f" * 70):
        with pytest.raises(ValueError, match="0 protocols begin|nothing to plot"):
            of_protocol(read(file) if begins else read(tmp_path / "none.json"), begins)
    with pytest.raises(ValueError, match="2 protocols begin with 'f'.*within one alone"):
        add(report(tmp_path, "third", protocol="f" * 63 + "0"))
        of_protocol(read(file), "f")


def test_mistakes_are_named_and_nothing_is_written(history, tmp_path, capsys):
    add, file = history
    good = report(tmp_path)
    (tmp_path / "none.json").write_text("{}")
    unsound = report(tmp_path, "unsound", sound=False)
    silent = report(tmp_path, "silent")
    silent.write_text(silent.read_text().replace('"sound": true, ', ""))
    for path, samples, words in (
        (tmp_path / "none.json", "1", "none.json is no report of"),
        (tmp_path / "nowhere.json", "1", "nowhere.json is no report of"),
        (unsound, "1", "its controls rank wrongly: counts: blank pictures break it"),
        (silent, "1", "KeyError('sound')"),
        (good, "0", "--samples and --flops are more than 0"),
    ):
        with pytest.raises(SystemExit):
            add(path, samples)
        assert words in capsys.readouterr().err and not file.exists()
    add(good)
    before = file.read_bytes()
    with pytest.raises(SystemExit):
        add(good, "2000")
    assert "by this protocol already, as 'a <b>'" in capsys.readouterr().err and file.read_bytes() == before
    add(report(tmp_path, guidance=7.0))  # the same weights otherwise used are another entry
    assert [entry["guidance"] for entry in read(file)["models"]] == [4.0, 7.0]


def test_shares_that_are_not_whole_show_a_tenth():
    kept = {"rules.count": [0.705, 0.6384, 0.7639, 200], "rules.ink": [0.995, 0.9722, 0.9991, 200]}
    kept |= {"rules.background": [1.0, 0.98, 1.0, 200], "rules.relation": [0.0, 0.0, 0.0188, 200]}
    row = table({"real": kept}, []).splitlines()[-1]
    for words in ("| 70.5 (64–76) |", "| 99.5 (97–100) |", "| 100 (98–100) |", "| 0 (0–2) |"):
        assert words in row


def test_losses_of_other_autoencoders_are_not_joined(history, tmp_path):
    add, file = history
    for model, vae in (("a", "v1"), ("b", "v1"), ("c", "v2")):
        add(report(tmp_path, model, vae=vae), str(1000 * (1 + ord(model) - ord("a"))))

    def joined(told):
        """How many dots each line of the chart of losses joins."""
        svg = ElementTree.fromstring(drawing(*of_protocol(told)))
        lines = [
            line
            for line in svg.iter("{http://www.w3.org/2000/svg}polyline")
            if line.get("stroke") == "#334155"
        ]
        return [len(line.get("points").split()) for line in lines]

    told = read(file)
    assert joined(told) == [2, 1]
    del told["models"][0]["vae_hash"]
    assert joined(told) == [1, 1, 1]


def test_what_is_kept_tells_how_its_models_drew():
    kept = read(FILE)
    assert all({"fast", "dtype", "vae_hash"} <= set(entry) for entry in kept["models"])
    few = [entry for entry in kept["models"] if entry["label"] == "the same in four steps"]
    assert few and [entry["fast"] for entry in few] == [True] * len(few)


def test_the_readme_shows_the_tables_of_the_history_that_is_kept():
    kept = read(FILE)
    readme = FILE.parents[1].joinpath("README.md").read_text(encoding="utf-8")
    assert len(kept["protocols"]) >= 1
    for name in kept["protocols"]:
        assert table(*of_protocol(kept, name)) in readme
    drawn = FILE.with_suffix(".svg").read_text(encoding="utf-8")
    assert any(drawn == drawing(*of_protocol(kept, name)) for name in kept["protocols"])

"""Rows: formats, ids, line flags, matrices and wildcards, what is refused, how little they keep."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from diffusionfm.batch.jobs import Run, seed_of
from diffusionfm.batch.phrases import FLAGS, MAX_LINE, Wildcards, parse_line
from diffusionfm.batch.readers import Row
from diffusionfm.batch.rows import Rows, file_stem

SETTINGS = {"steps": 3, "guidance": 3.0, "width": 32, "height": 32, "negative_prompt": ""}


def jobs(rows, wildcards=None, seed=0, repeats=1):
    rows = rows if isinstance(rows, Rows) else Rows(rows, wildcards)
    return list(Run(seed, SETTINGS, {}, {}, repeats).jobs(rows))


# ------------------------------------------------------------------ formats


def test_formats_agree(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"id": "x", "prompt": "a, b", "seed": 5}\n\n{"prompt": "c", "guidance": 2}\n'
    )
    (tmp_path / "a.csv").write_bytes(b'\xef\xbb\xbfid,prompt,seed,guidance\r\nx,"a, b",5,\r\n,c,,2\r\n')
    (tmp_path / "a.tsv").write_text("id\tprompt\tseed\tguidance\nx\ta, b\t5\t\n\tc\t\t2.0\n")
    columns = {
        "id": ["x", None],
        "prompt": ["a, b", "c"],
        "seed": [5.0, float("nan")],
        "guidance": [None, 2.0],
    }
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    rows = list(Rows(tmp_path / "a.jsonl"))
    for name in ("a.csv", "a.tsv", "a.parquet"):
        assert list(Rows(tmp_path / name)) == rows, name
    assert (rows[0].id, rows[0].seed, rows[1].guidance) == ("x", 5, 2.0)
    assert len(Rows(str(tmp_path / "a.csv"))) == 2


def test_plain_lines_and_their_flags(tmp_path):
    text = "a red apple\n\nnaïve fish --w 64 --h 48 --s 9 --l 2.5 --d 11 --n blurry, dark -- or so\n"
    text += "a red apple\nx --q 3\ny --w\nz --w wide\na tea--pot\n--s 3\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    first, fish, third, unknown, bare, wide, pot, empty = Rows(tmp_path / "a.txt")
    assert first.prompt == third.prompt and third.id == first.id + "-2"
    assert (fish.prompt, fish.width, fish.height, fish.steps) == ("naïve fish", 64, 48, 9)
    assert (fish.guidance, fish.seed, fish.negative_prompt) == (2.5, 11, "blurry, dark -- or so")
    assert "unknown flag --q: use --w" in unknown.error and unknown.id.startswith("line-5-")
    assert "--w has no value" in bare.error and "width must be a whole number" in wide.error
    assert pot.prompt == "a tea--pot" and pot.error is None and empty.prompt == ""
    assert set(FLAGS) == set("whsldn")
    only_words = list(Rows(["naïve fish --w 64"]))  # in Python a prompt is a prompt
    assert only_words[0].prompt == "naïve fish --w 64"


def test_ids_depend_on_content_and_not_on_the_order(tmp_path):
    one = list(Rows(["naïve fish", "a red apple", "a red apple"]))
    two = list(Rows(["a red apple", "naïve fish", "a red apple"]))
    assert sorted(row.id for row in one) == sorted(row.id for row in two) and len({r.id for r in one}) == 3
    rows = Rows({"prompt": f"fish {k}"} for k in range(3))  # an iterator is kept, to be read again
    assert [row.prompt for row in rows] == [row.prompt for row in rows] == ["fish 0", "fish 1", "fish 2"]


def test_standard_input_holds_json_or_plain_lines(monkeypatch):
    text = '{"id": "a", "prompt": "fish"}\nsun --s 4\n{red|blue} cat\n{"id": "b", "prompt": \n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    rows = Rows("-")
    for _ in range(2):
        a, sun, red, blue, broken = rows
        assert a.id == "a" and sun.steps == 4 and (red.prompt, blue.prompt) == ("red cat", "blue cat")
        assert "not JSON" in broken.error
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\n")))
    with pytest.raises(ValueError, match="- holds no prompt"):
        Rows("-")


def test_csv_with_bom_quotes_newlines_and_emoji(tmp_path):
    text = '\ufeffid,prompt\r\na,"two\r\nlines, ""quoted"" 🦊"\r\nb,plain\r\nc,too,many\r\n'
    (tmp_path / "a.csv").write_bytes(text.encode())
    a, b, c = Rows(tmp_path / "a.csv")
    assert a.prompt == 'two\r\nlines, "quoted" 🦊' and b.prompt == "plain"
    assert c.id == "c" and "does not have 2 fields" in c.error


def test_a_broken_line_is_one_broken_row(tmp_path):
    lines = [
        '{"id": "a", "prompt": "x"}',
        '{"id": "b", ',
        '{"id": "c", "prompt": "\\ud800"}',
        "[1]",
        '"word"',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    a, b, c, one, word = jobs(tmp_path / "a.jsonl")
    assert (
        a.error is None
        and b.id.startswith("line-2-")
        and "not JSON" in b.error
        and "lone surrogate" in c.error
    )
    assert "must be an object" in one.error and word.prompt == "word"
    nested = "[" * 100_000
    (tmp_path / "b.jsonl").write_text(nested + "\n")
    assert "not JSON" in jobs(tmp_path / "b.jsonl")[0].error


def test_an_id_is_text_in_unicode(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "\\udfff", "prompt": "fish"}\n{"id": "\\udfff", "x": 1}\n')
    for row in (*Rows(tmp_path / "a.jsonl"), *Rows([Row("\udfff", "fish"), {"id": 2.5, "prompt": "fish"}])):
        assert re.fullmatch(r"(line|row)-\d-[0-9a-f]{10}", row.id), row.id
        assert re.search("an id must be text in Unicode|unknown field 'x'", row.error)


def test_a_broken_line_takes_nobody_s_id(tmp_path):
    lines = ['{"id": "line-2", "prompt": "x"}', "{", '{"id": "line-1", "prompt": "y"}', "{"]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    assert len({row.id for row in Rows(tmp_path / "a.jsonl")}) == 4


def test_a_prompt_of_a_megabyte_is_one_broken_row(tmp_path):
    for text in ("a" * 2**20, "{a|" * 2**18, "__a__" * 2**18, "x --" * 2**18):
        (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": text}) + '\n{"prompt": "fish"}\n')
        big, fish = jobs(tmp_path / "a.jsonl")
        assert "1,048,576 characters" in big.error or "786,432" in big.error or "1,310,720" in big.error
        assert fish.error is None and len(big.stem) < 120


@pytest.mark.parametrize("name", ["a.txt", "-"])
def test_a_line_of_a_megabyte_is_one_broken_row(tmp_path, monkeypatch, name):
    longest = "a" + " " * (MAX_LINE - 2) + "b"
    text = "\n".join(["a" + " " * 2**20 + "b", "x --" * 2**18, longest, f"{longest} ", "fish --s 3"])
    if name == "-":
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    else:
        name = tmp_path / name
        name.write_text(text)
    spaces, flags, whole, also, fish = jobs(Rows(name))
    assert "the line has 1,048,578 characters: shorten it to 21,000" in spaces.error
    assert "1,048,576 characters" in flags.error
    assert "prompt has 21,000 characters" in whole.error and whole.error == also.error
    assert fish.error is None and fish.settings["steps"] == 3


def test_flags_stand_after_any_space():
    for line in ("a fish \t  --w 64 --n no birds ", "a fish --n no birds\u3000--w 64"):
        assert parse_line(line) == {"prompt": "a fish", "width": "64", "negative_prompt": "no birds"}


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", "", "holds no prompt"),
        ("a.xlsx", "x", "cannot tell the format"),
        ("a.csv", "prompt,stpes\nx,3\n", "unknown column 'stpes': did you mean steps"),
        ("a.csv", "id\nx\n", "no column named prompt"),
        ("a.csv", 'prompt\n"open\n', "check its quotes"),
        ("a.parquet", "no parquet", "cannot be read as Parquet"),
        (
            "a.jsonl",
            '{"id": "x", "prompt": "a"}\n{"id": "X", "prompt": "b"}\n',
            "rows 1 and 2 have the same id 'X'",
        ),
        (
            "a.jsonl",
            '{"id": "x-2", "prompt": "a"}\n{"id": "x", "prompt": "{b|c}"}\n',
            "rows 1 and 2 .* 'x-2'",
        ),
        ("a.txt", b"caf\xe9\n", "not UTF-8"),
        ("a.txt", b"\xed\xa0\x80\n", "not UTF-8"),  # a lone surrogate, as bytes
    ],
)
def test_files_that_are_refused(tmp_path, name, text, words):
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=words):
        Rows(tmp_path / name)
    with pytest.raises(ValueError, match="no such file"):
        Rows(tmp_path / "none.txt")


def test_ids_made_and_ids_given_may_not_meet():
    made = list(Rows(["fish", "fish"]))[1].id
    with pytest.raises(ValueError, match="rows 2 and 3 have the same id"):
        Rows(["fish", "fish", {"id": made, "prompt": "cat"}])
    with pytest.raises(ValueError, match="rows 1 and 2 have the same id"):
        Rows(["fish", {"id": made.removesuffix("-2"), "prompt": "cat"}])


def test_file_names_are_safe_and_distinct():
    ids = [
        "a",
        "a/b",
        "../../etc/passwd",
        "a b",
        "a-b",
        ".hidden",
        "x" * 300,
        "苹果",
        "a~1",
        "CON",
        "",
        "\ud800",
    ]
    stems = [file_stem(i, r) for i in ids for r in (0, 1)]
    assert len(set(stems)) == len(stems)
    assert not any("/" in s or s.startswith(".") or len(s) > 120 for s in stems)
    assert (file_stem("cat.2_b", 0), file_stem("cat.2_b", 3)) == ("cat.2_b", "cat.2_b~3")
    assert re.fullmatch(r"a-b\+[0-9a-f]{20}", file_stem("a/b", 0))


def test_the_rows_given_are_not_written_out():
    class Untold(list):
        def __repr__(self):
            raise AssertionError("a million rows in one text")

    assert len(Rows(Untold(["fish", "cat"]))) == 2


# ------------------------------------------------------------------ matrices and wildcards


@pytest.fixture
def words(tmp_path):
    folder = tmp_path / "words"
    (folder / "big").mkdir(parents=True)
    (folder / "animals.txt").write_text("# beasts\ncat\ndog\n\nowl\n")
    (folder / "big" / "pets.txt").write_text("fat __animals__\n")
    (folder / "loop.txt").write_text("a __loop__\n")
    (folder / "none.txt").write_text("# nothing\n")
    return Wildcards(folder)


def test_a_matrix_is_every_combination(words):
    rows = list(
        Rows([{"id": "m", "prompt": "{red|blue} {__animals__}", "seed": 3}, "{big |}house {x}"], words)
    )
    assert [row.prompt for row in rows[:6]] == [
        f"{c} {a}" for c in ("red", "blue") for a in ("cat", "dog", "owl")
    ]
    assert [row.id for row in rows[:6]] == [f"m-{k}" for k in range(1, 7)] and rows[5].seed == 3
    assert [row.prompt for row in rows[6:]] == ["big house {x}", "house {x}"]
    assert len({row.id for row in rows}) == len(rows) == 8
    assert [job.prompt for job in jobs([r"\{a|b} \__animals__"], words)] == ["{a|b} __animals__"]


def test_a_matrix_is_capped_before_it_is_made():
    many = "{" + "|".join(map(str, range(200))) + "}"
    good, bad, good_too = jobs(["fish", many * 9, "cat"])
    (nested,) = jobs(["{a|{b|c}}"])
    assert "braces inside braces" in nested.error
    assert "makes 512,000,000,000,000,000,000 prompts: at most 10,000" in bad.error
    assert good.error is good_too.error is None
    assert len(Rows([many + "{a|b}"])) == 400


def test_more_rows_than_are_taken_are_not_counted_to_the_end(tmp_path):
    matrix = "{a|b}" * 10
    assert len(Rows([matrix], most=1024)) == 1024
    (tmp_path / "a.txt").write_bytes(f"{matrix}\n".encode() * 2 + b"\n" * 2**16 + b"\xff")
    with pytest.raises(ValueError, match="more than 1,500 rows"):  # and no word of what is no UTF-8
        Rows(tmp_path / "a.txt", most=1500)


def test_a_wildcard_is_picked_by_seed_row_and_repeat(words):
    asked = [{"id": f"r{k}", "prompt": "a __animals__ and a __animals__"} for k in range(30)]
    found = {(job.id, job.repeat): job.prompt for job in jobs(asked, words, seed=1, repeats=2)}
    again = {(job.id, job.repeat): job.prompt for job in jobs(asked[::-1], words, seed=1, repeats=2)}
    assert found == again and len(set(found.values())) == 9
    assert found != {(job.id, job.repeat): job.prompt for job in jobs(asked, words, seed=2, repeats=2)}
    assert jobs(["__big/pets__"], words)[0].prompt in {"fat cat", "fat dog", "fat owl"}


def test_wildcards_that_are_not_there_are_broken_rows(words, tmp_path):
    for prompt, told in (
        ("__birds__", "asks for __birds__, but .*birds.txt cannot be read"),
        ("{__birds__}", "birds.txt cannot be read"),
        ("__loop__", "more than 100 wildcards"),
        ("__none__", "has no lines"),
        ("__../secret__ fish", None),
    ):
        (job,) = jobs([prompt], words)
        assert job.error is None if told is None else re.search(told, job.error)
    assert "--wildcards DIR" in jobs(["__animals__"])[0].error
    with pytest.raises(ValueError, match="no wildcards folder"):
        Wildcards(tmp_path / "nowhere")


# ------------------------------------------------------------------ jobs


def test_columns_override_the_run_and_seeds_are_their_own():
    plain, own = jobs(
        [{"id": "a", "prompt": "x"}, {"id": "b", "prompt": "y", "seed": 4, "steps": 9, "width": 64}]
    )
    assert plain.seed == seed_of(0, "a", 0) and plain.settings == SETTINGS
    assert own.seed == 4 and own.shape == (9, 3.0, 64, 32)
    assert [job.seed for job in jobs([{"id": "b", "prompt": "y", "seed": 4}], repeats=3)] == [4, 5, 6]
    bad = {"seed": -1}, {"steps": 0}, {"guidance": float("nan")}, {"width": 100}, {"negative_prompt": 5}
    for fields in bad:
        (job,) = jobs([{"prompt": "x", **fields}])
        assert next(iter(fields)) in job.error


def stream(tmp_path, count: int) -> int:
    """Bytes at the peak of reading a file of so many rows twice."""
    file = tmp_path / f"{count}.txt"
    with file.open("w") as out:
        out.writelines(f"a red apple number {k}\n" for k in range(count))
    tracemalloc.start()
    try:
        rows = Rows(file)
        assert sum(1 for _ in rows) == count
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


STREAMED = """
import resource, sys
from diffusionfm.batch.jobs import Run, groups
from diffusionfm.batch.rows import Rows
from tests.test_rows import SETTINGS

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = groups(Run(0, SETTINGS, {}, {}).jobs(Rows(sys.argv[1])), lambda shape: 8)
print(sum(map(len, found)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.slow
def test_a_million_rows_stream_through_rows_jobs_and_groups(tmp_path):
    """In a process of its own, whose memory was never higher."""
    count, file = 1_000_000, tmp_path / "rows.txt"
    with file.open("w") as out:
        out.writelines(f"a red apple number {k} --w {32 + 16 * (k % 3)}\n" for k in range(count))
    command = [sys.executable, "-c", STREAMED, str(file)]
    said = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    rows, grown = map(int, said.stdout.split())
    assert rows == count and grown * 1024 < 128 * 2**20  # 8 MB are the ids


def test_rows_stream(tmp_path):
    few, many = stream(tmp_path, 1000), stream(tmp_path, 30_000)
    assert (many - few) / 29_000 < 64  # bytes a row; a list of rows takes ten times that

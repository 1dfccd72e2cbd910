"""The Batch tab: rows in, a plan, pictures drawn by the library's command, watched, taken away.

As in fine-tuning, a run is a folder of the person's own and a process (runs.py); the page only shows it.
"""

from __future__ import annotations

import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from diffusionfm.batch import jobs
from diffusionfm.batch.options import Options
from diffusionfm.batch.readers import FORMATS
from diffusionfm.batch.report import SHEETS
from diffusionfm.batch.rows import Rows
from diffusionfm.batch.watch import Look, look

from . import runcards
from .adapters import NONE, choices, chosen
from .batch_controls import EMPTY, Controls, lay_out
from .cards import bar, note
from .lane import Lane, Update
from .processes import Command, ask
from .request import small
from .runs import Run, State
from .runtab import HIDDEN, RunTab, packed, told, turn_of, waiting

MOST = 10_000  # pictures of a run in the studio, and its work in pictures of the model's own size and steps
LIVE = 12  # pictures shown while it draws
SETTINGS = ("repeats", "seed", "format", "to", "adapter", "weight", "model")
NUMBERS = {"repeats": "pictures a row", "seed": "the seed of the run", "weight": "the adapter's weight"}


def batch(lane: Lane) -> None:
    """Lay out the tab inside the open Blocks and wire it to the runs."""
    at = lay_out(lane)
    tab = Tab(lane, at)
    asked = [lane.person, at.key, at.rows, at.file, at.repeats, at.seed, at.format, at.to]
    asked += [at.adapter.choice, at.adapter.weight, lane.model.choice]
    at.plan.click(tab.plan, asked, at.all(), trigger_mode="once", **HIDDEN | {"concurrency_limit": 1})
    at.start.click(tab.start, asked, at.all(), trigger_mode="once", **HIDDEN)
    tab.wire(at.all())


class Tab(RunTab):
    """What the tab's components do."""

    kind, verb = "batch", "Draw them"
    at: Controls

    def __init__(self, lane: Lane, at: Controls):
        form = [at.rows, at.file, at.repeats, at.seed, at.format, at.to, at.adapter.choice, at.adapter.weight]
        super().__init__(lane, at, form)

    # -------------------------------------------------------------- what is asked for

    @told
    def write(self, person: str, key: str, rows: str, file: str | None, *chosen: Any) -> Run:
        """The draft that is open, or a new one, with what is asked for checked and counted; else ValueError."""
        settings = dict(zip(SETTINGS, chosen, strict=True))
        for name, what in NUMBERS.items():
            if settings[name] is None:
                raise ValueError(f"{what} is empty: write a number there")
        title = Path(file).stem if file else rows.strip().split("\n")[0][:40]
        draft = self.draft(person, key)
        run = draft or self.runs.new(person, self.kind, title)
        try:
            source = _source(run, rows, file)
            command = self._command(person, run, source, settings)
            found = Rows(source, most=MOST // int(settings["repeats"]))
            flagged = self._flagged(found, settings)
            total = len(found) * int(settings["repeats"])
            run.keep(flagged=flagged, rows=rows, settings=settings, total=total, command=command)
        except BaseException:
            if draft is None:
                self.runs.delete(run)
            raise
        return run

    def _flagged(self, rows: Rows, settings: dict[str, Any]) -> list[str]:
        """The prompts that are flagged, as the manifest will have them; ValueError for too much work, one or all."""
        engine, safety = self.lane.models.engine(settings["model"]), self.lane.models.first.safety
        usual = {"negative_prompt": "", **engine.pipe.settings()}
        worn = () if settings["adapter"] == NONE else (settings["adapter"],)
        own, work = engine.check_work(*(usual[name] for name in ("height", "width", "steps"))), 0
        flagged = []
        for job in jobs.Run(int(settings["seed"]), usual, {}, {}, check=engine.pipe.settings).jobs(rows):
            if job.error:  # it will fail alone
                continue
            try:
                work += engine.check_work(*(job.settings[name] for name in ("height", "width", "steps")))
            except ValueError as error:
                raise ValueError(f"row {job.id}: {error}") from error
            if safety.check(f"{job.prompt}\n{engine.pipe.read_as(job.prompt, worn)}"):
                flagged.append(job.prompt)
        if work * int(settings["repeats"]) > MOST * own:
            raise ValueError(
                f"these rows are more work than {MOST:,} pictures of the model's own size and steps, the most of one "
                "run: ask for fewer of them, or fewer steps"
            )
        return flagged

    def _command(self, person: str, run: Run, source: Path, settings: dict[str, Any]) -> Command:
        """The command line that draws the rows."""
        repeats, seed, form, to = (settings[name] for name in SETTINGS[:4])
        Options(repeats=int(repeats), seed=int(seed), format=form, to=to)
        if form == "svg" and to != "folder":
            raise ValueError("SVG comes in a zip alone: readers of shards and Parquet know pixels")
        pipe = self.lane.models.engine(settings["model"]).pipe
        worn = chosen(self.lane, person, settings["adapter"], settings["weight"], pipe)
        model = Path(pipe.config["_name_or_path"]).resolve()
        many, start, device = str(int(repeats)), str(int(seed)), pipe.device.type
        command = ["batch", run.inside(source), "--out", run.inside(run.out), "--n", many, "--seed", start]
        command += ["--format", form, "--to", to, "--model", str(model), "--device", device]
        command += [] if self.lane.metadata else ["--no-metadata"]
        command += ["--fast"] if pipe.fast else []
        command += ["--dtype", str(pipe.transformer.dtype).removeprefix("torch.")]
        command += ["--lora", f"{worn.source.resolve()}:{worn.weight:g}"] if worn else []
        return command + (
            ["--lora-any"] if worn and worn.public else []
        )  # loaded already, by who opened the studio

    def plan(self, person: str, key: str, *asked: Any) -> Iterator[Update]:
        """Count the rows and estimate the time, by the command's own dry run."""
        run = self.write(person, key, *asked)
        told = {self.at.status: note("Counting, and timing a trial …"), self.at.said: "Counting."}
        yield self._drafted(person, run) | told
        code, said, problem = ask(run.folder, [*run.facts["command"], "--dry-run"])
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        run.keep(plan=lines)
        yield {
            self.at.status: note(problem, "warn") if code else "",
            self.at.said: problem if code else " ".join(lines),
            self.at.report: runcards.lines("The plan", lines) if lines else "",
        }

    @told
    def start(self, person: str, key: str, request: gr.Request, *asked: Any) -> Update:
        """Draw the rows, or take up the batch that was stopped: the same command again."""
        run = self.runs.get(person, self.kind, key)
        if run is None or self.runs.state(run).word == "draft":
            run = self.write(person, key, *asked)
        command = run.facts["command"]
        again = ["--retry-failed"] if self.runs.state(run).word == "failed" else []
        self.runs.start(run, [[*command, *again]], turn_of(request, run))
        return self.shown(person, run)

    # -------------------------------------------------------------- what is seen

    def fresh(self, person: str) -> Update:
        """An empty page for other rows."""
        at = self.at
        blank: Update = {at.key: "", at.seen: (), at.stage: EMPTY, at.status: "", at.report: ""}
        blank |= {
            at.said: "A new batch.",
            at.plan: gr.Button(interactive=True),
            at.take: gr.File(visible=False),
        }
        blank |= self.filled(True, {at.rows: "", at.file: None})
        return blank | self.listed(person, None) | self.buttons(State("draft"), there=False)

    def _drafted(self, person: str, run: Run) -> Update:
        return (
            {self.at.key: run.key, self.at.seen: ()} | self.listed(person, run) | self.buttons(State("draft"))
        )

    def shown(self, person: str, run: Run) -> Update:
        """All of a run."""
        at, facts, is_draft = self.at, run.facts, self.runs.state(run).word == "draft"
        settings, plan, offered = facts["settings"], facts.get("plan"), choices(self.lane, person)
        values = {at.rows: facts["rows"], at.adapter.weight: settings["weight"]}
        values |= {getattr(at, name): settings[name] for name in SETTINGS[:4]}
        shown: Update = self._drafted(person, run) | self.filled(is_draft, values)
        shown |= {at.report: runcards.lines("The plan", plan) if plan else "", at.stage: EMPTY, at.status: ""}
        shown |= {at.plan: gr.Button(interactive=is_draft), at.take: gr.File(visible=False)}
        choice = settings["adapter"] if settings["adapter"] in dict(offered).values() else NONE
        shown[at.adapter.choice] = gr.Dropdown(choices=offered, value=choice, interactive=is_draft)
        return shown if is_draft else shown | self.progress(person, run, ())

    def progress(self, person: str, run: Run, seen: tuple) -> Update:
        """Status and the latest pictures, as far as they are new. seen: (state, pictures) shown before."""
        at, state, found = self.at, self.runs.state(run), look(run.out, LIVE)
        now = (state, found.done + found.failed)
        if now == seen:
            return self.same
        new: Update = {at.seen: now, at.status: self._status(run, state, found)} | self.buttons(state)
        new[at.stage] = _pictures(run, found) or EMPTY
        if not seen or seen[0].word != state.word:
            new[at.said] = f"Batch {state.word}: {found.done} pictures, {found.failed} failed."
            if not state.busy and found.done:
                new[at.take] = self._taken(run)
        return new

    def _status(self, run: Run, state: State, found: Look) -> str:
        total, gone = run.facts["total"], found.done + found.failed
        broken = "".join(note(f"{record['id']}: {record['error']}", "warn") for record in found.problems[:3])
        if state.word == "waiting":
            return waiting(state)
        if state.word == "stopping":
            return note("Stopping …")
        if state.word == "done":
            return note(f"{found.done} pictures drawn.")
        if state.word == "failed":
            some = f"{found.done} pictures drawn, {found.failed} failed."
            return note(some if found.failed else f"It failed: {run.problem}", "warn") + broken
        if state.word == "stopped":
            return note(f"Stopped after {gone} of {total} pictures. Resume goes on from there.") + broken
        if not gone:
            return bar(0, total, "Loading the model …", "Drawing")
        left = found.seconds / max(1, found.done) * (total - gone)
        return bar(gone, total, f"{gone} of {total} pictures{runcards.left(left)}", "Drawing") + broken

    def _taken(self, run: Run) -> gr.File:
        """What was drawn, to take away: a zip, or the shards."""
        if run.facts["settings"]["to"] == "folder":
            files = [packed(run, run.folder / f"{run.slug}.zip", _made(run), zipfile.ZIP_STORED)]
        else:
            names = ("*.tar", "*.parquet", "manifest.jsonl")
            files = [file for name in names for file in sorted(run.out.glob(name))]
        return self.handed(files)


def _source(run: Run, rows: str, file: str | None) -> Path:
    """The rows as a file of the run."""
    if file:
        kind = Path(file).suffix.lower()
        if kind not in FORMATS:
            raise ValueError(f"rows come as {', '.join(FORMATS)}, not {kind}")
        return Path(shutil.copyfile(small(file), run.folder / f"rows{kind}"))
    if not rows.strip():
        raise ValueError("write a prompt a line, or upload a file of rows")
    source = run.folder / "rows.txt"
    source.write_bytes(rows.encode("utf-8", "surrogatepass"))
    return source


def _pictures(run: Run, found: Look) -> str:
    """The latest pictures of a folder; of SVG and of shards the contact sheet, once there is one.

    Those of flagged prompts are not shown here, but handed over like all others."""
    flagged = run.facts["flagged"]
    hidden = "".join(note(f"Not shown, for what its prompt says: {prompt}", "warn") for prompt in flagged[:3])
    files = [(r["prompt"], run.out / r["file"]) for r in found.latest if r["prompt"] not in flagged]
    shown = [(prompt, file) for prompt, file in files if file.suffix in (".png", ".webp") and file.is_file()]
    if shown:
        return hidden + runcards.pictures([(prompt, file.read_bytes()) for prompt, file in shown])
    sheet = run.out / SHEETS / "1.png"
    return hidden or (runcards.sheet(sheet, "The first pictures") if sheet.is_file() else "")


def _made(run: Run) -> Iterator[tuple[Path, str]]:
    """The files of a batch's folder, and their names in its zip."""
    for path in sorted(run.out.rglob("*")):
        if path.is_file() and not path.name.startswith("."):
            yield path, f"{run.slug}/{path.relative_to(run.out)}"

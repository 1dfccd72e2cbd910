"""The Fine-tune tab: pictures in, looked through, trained on by the library's command, watched, taken away.

A run is a folder of the person's own (runs.py) and a process; the page only shows it, so that closing or reloading
the page changes nothing.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import gradio as gr

from diffusionfm.data.captions import TRIGGER
from diffusionfm.finetune import RECORD, configure, load_preset
from diffusionfm.finetune.report import REPORT
from diffusionfm.finetune.settings import check_settings
from diffusionfm.finetune.watch import Look, look
from diffusionfm.lora import CONFIG, WEIGHTS
from diffusionfm.pipeline import DiffusionFMPipeline

from . import models, runcards
from .adapters import refreshed
from .cards import bar, note, notes
from .controls import QUIET
from .dataset import SHEET, Rows, look_through, pictures_of, settle, take_in
from .finetune_controls import EMPTY, Controls, lay_out
from .lane import Lane, Update
from .processes import Command
from .runs import Run, State
from .runtab import HIDDEN, RunTab, packed, told, turn_of, waiting

FORM = ("name", "missing", "trigger", "preset", "method", "steps", "prior")  # what a draft keeps
SHEETS = 6  # a run draws about so many
TO_CREATE = "() => document.querySelector('#tabs button[role=tab]').click()"


def finetune(lane: Lane) -> None:
    """Lay out the tab inside the open Blocks and wire it to the runs."""
    at = lay_out()
    tab = Tab(lane, at)
    pickers = [picker.choice for picker in lane.pickers.values()]
    everything, who, model = [*at.all(), *pickers], [lane.person, at.key], lane.model.choice
    captions = [at.missing, at.trigger]
    slow = HIDDEN | {"show_progress": "minimal", "concurrency_limit": 4}
    form = [getattr(at, name) for name in FORM]
    kept: dict[str, Any] = {"fn": tab.keep, "inputs": [*who, *form], "outputs": None, **HIDDEN}
    taken = at.files.upload(tab.take, [*who, at.files, at.name, *captions, model], everything, **slow)
    taken.success(**kept)
    gr.on([part.input for part in form if part is not at.preset], trigger_mode="always_last", **kept)
    at.table.input(tab.edit, [*who, at.table], None, trigger_mode="always_last", **HIDDEN)
    at.missing.input(tab.look, [*who, at.table, at.missing], everything, **HIDDEN)
    settings = [at.name, at.preset, at.method, at.steps, at.prior, *captions, model]
    at.start.click(tab.start, [*who, at.table, *settings], everything, trigger_mode="once", **HIDDEN)
    usual = at.preset.input(
        lambda preset: load_preset(preset).trainer.steps, at.preset, at.steps, queue=False, **HIDDEN
    )
    usual.then(**kept)  # with its steps
    drawn_with = at.use.click(tab.use, [*who, model], models.following(lane), **HIDDEN)
    drawn_with.then(None, models.kept(lane), js=models.KEEP, **QUIET).then(None, js=TO_CREATE, **QUIET)
    tab.wire(everything)


class Tab(RunTab):
    """What the tab's components do."""

    kind, verb = "finetune", "Start training"
    at: Controls

    def __init__(self, lane: Lane, at: Controls):
        form = [at.files, at.missing, at.trigger, at.name, at.preset, at.method, at.steps, at.prior]
        super().__init__(lane, at, form)

    # -------------------------------------------------------------- pictures

    @told
    def take(
        self, person: str, key: str, files: list[str], name: str, missing: str, trigger: str, model: str | None = None
    ) -> Update:  # fmt: skip
        """Pictures were uploaded: into the draft that is open, or a new one."""
        size = self.lane.models.engine(model).pipe.defaults["height"]
        draft = self.draft(person, key)
        run = draft or self.runs.new(person, self.kind, name)
        asked = {"missing": missing, "trigger": trigger}
        try:
            take_in(run, files)
            form = run.facts.get("form", {}) | asked | {"name": name}
            run.keep(settings=asked, form=form, edited={}, size=size)
        except BaseException:
            if draft is None:
                self.runs.delete(run)
            raise
        return self.shown(person, run)

    @told
    def keep(self, person: str, key: str, *form: Any) -> None:
        """What is asked for was changed: a draft keeps it over a reload."""
        run = self.draft(person, key)
        if run is not None:
            run.keep(form=dict(zip(FORM, form, strict=True)))

    @told
    def edit(self, person: str, key: str, rows: Rows) -> None:
        """A caption was changed: a draft keeps it over a reload."""
        run = self.draft(person, key)
        if run is not None:
            run.keep(edited=_edited(run, rows))

    @told
    def look(self, person: str, key: str, rows: Rows, missing: str) -> Update:
        """How captions are found was changed: look again, unless training has begun. What was edited stays so."""
        run = self.draft(person, key)
        if run is None or "settings" not in run.facts:
            return self.same
        run.keep(settings=run.facts["settings"] | {"missing": missing}, edited=_edited(run, rows))
        return self._report(run)

    def _report(self, run: Run) -> Update:
        facts, own = run.facts, self.lane.pipe.defaults["height"]
        report, found, sheet = look_through(run, facts.get("size", own), facts["settings"]["missing"])
        run.keep(report=[report.summary(), report.faults()], found=found)
        rows = [[name, facts.get("edited", {}).get(name, text)] for name, text in found]
        return {
            self.at.report: runcards.lines("What is there", report.summary(), report.faults()),
            self.at.stage: runcards.sheet(sheet, "Your pictures, as they are learned") if sheet else EMPTY,
            self.at.table: gr.Dataframe(rows, visible=bool(rows)),
            self.at.said: f"{len(rows)} pictures looked through.",
            **self.buttons(State("draft"), may=bool(rows)),
        }

    # -------------------------------------------------------------- training

    @told
    def start(
        self, person: str, key: str, request: gr.Request, rows: Rows, name: str, preset: str, method: str,
        steps: int | None, prior: bool, missing: str, trigger: str, model: str | None = None,
    ) -> Update:  # fmt: skip
        """Train on the draft that is open, or take up the run that was stopped: the same commands again."""
        run = self.runs.get(person, self.kind, key)
        if run is None:
            raise ValueError("upload some pictures first")
        if self.runs.state(run).word == "draft":
            if steps is None:
                raise ValueError("the steps are empty: write how many it may take at most")
            chosen = {
                "missing": missing, "trigger": trigger.strip(), "preset": preset, "method": method,
                "steps": int(steps), "prior": prior,
            }  # fmt: skip
            self._check(run, rows, chosen)
            settle(run, rows, missing)
            pipe = self.lane.models.engine(model).pipe
            commands, name = self._commands(run, chosen, pipe), name.strip()[:60] or "my style"
            run.keep(name=name, settings=chosen, commands=commands, model=pipe.model_name)
        self.runs.start(run, run.facts["commands"], turn_of(request, run))
        return self.shown(person, run)

    def _check(self, run: Run, rows: Rows, chosen: dict[str, Any]) -> None:
        """ValueError for what the library would refuse once the run has its turn."""
        if not chosen["trigger"] and any(TRIGGER in str(row[1]) for row in rows):
            raise ValueError(f"captions hold {TRIGGER}: give the trigger word that stands for it")
        keys = ("preset", "method", "steps", "trigger")
        check_settings(configure(pictures_of(run), run.out, **{key: chosen[key] for key in keys}))

    def _commands(self, run: Run, chosen: dict[str, Any], pipe: DiffusionFMPipeline) -> list[Command]:
        """The command lines that train on a model, and that make a file for other programs."""
        model = ["--model", str(Path(pipe.config["_name_or_path"]).resolve())]
        out = run.inside(run.out)
        train = ["finetune", run.inside(pictures_of(run)), "--out", out, *model]
        train += ["--preset", chosen["preset"], "--method", chosen["method"], "--steps", str(chosen["steps"])]
        train += ["--sample-every", str(max(1, chosen["steps"] // SHEETS))]
        train += ["--captions", "skip" if chosen["missing"] == "skip" else "refuse"]
        train += [f"--trigger={chosen['trigger']}"] if chosen["trigger"] else []
        train += ["--prior", "1"] if chosen["prior"] else []
        return [train, ["export", out, "--to", "kohya", "--out", run.inside(_kohya(run)), *model]]

    # -------------------------------------------------------------- which run

    def fresh(self, person: str) -> Update:
        """An empty page for another set of pictures."""
        at = self.at
        blank: Update = {at.key: "", at.seen: (), at.stage: EMPTY, at.said: "A new training."}
        blank |= dict.fromkeys((at.status, at.curves, at.report), "")
        blank |= self.listed(person, None) | self.buttons(State("draft"), may=False, there=False)
        blank |= self.filled(True, {at.files: None}) | self._taken(None)
        return blank | {at.table: gr.Dataframe(visible=False)}

    def delete(self, person: str, key: str) -> Update:
        """Remove the run that is open, all it made, and its adapter from the pickers."""
        return super().delete(person, key) | refreshed(self.lane, person, "none")

    @told
    def use(self, person: str, key: str, model: str | None = None) -> Update:
        """Choose the run's adapter wherever one is drawn with, and the model that it was trained on."""
        run = self.runs.get(person, self.kind, key)
        name = run and run.facts.get("model")
        other = models.follow(self.lane, name) if name in self.lane.models.names and name != model else {}
        return other | refreshed(self.lane, person, key if run else None)

    # -------------------------------------------------------------- what is seen

    def shown(self, person: str, run: Run) -> Update:
        """All of a run."""
        at, facts, is_draft = self.at, run.facts, self.runs.state(run).word == "draft"
        asked = {"name": facts["name"]} | facts["settings"] | (facts.get("form", {}) if is_draft else {})
        values = {getattr(at, name): value for name, value in asked.items()}
        shown: Update = {at.key: run.key, at.seen: (), at.curves: "", at.status: "", at.stage: ""}
        shown |= self.listed(person, run) | self.filled(is_draft, values) | self._taken(None)
        if is_draft:
            return shown | self._report(run)
        shown |= {
            at.table: gr.Dataframe(visible=False),
            at.report: runcards.lines("What is there", *facts["report"]),
            at.stage: runcards.sheet(run.folder / SHEET, "Your pictures"),
        }
        return shown | self.progress(person, run, ())

    def progress(self, person: str, run: Run, seen: tuple) -> Update:
        """Status, curves and the latest sheet, as far as they are new. seen: (state, step, sheet and whether
        it is the last, ...) shown before."""
        at, state, found = self.at, self.runs.state(run), look(run.out)
        ended = found.best if found.words else -1
        newest = ended if ended in found.sheets else max(found.sheets, default=-1)
        sheet = newest, bool(found.words)
        now = (state, found.step, sheet, run.said if state.busy else "")
        if now == seen:
            return self.same
        new: Update = {at.seen: now, at.status: self._status(run, state, found)} | self.buttons(state)
        if found.chart and (not seen or seen[1] != found.step):
            new[at.curves] = runcards.curves(found.chart)
        if newest >= 0 and (not seen or tuple(seen[2]) != sheet):
            kept = ", the one that is kept" if found.words else ""
            caption = f"The model's own picture beside the adapted one, step {newest}{kept}"
            new[at.stage] = runcards.sheet(found.sheets[newest], caption)
        if not seen or seen[0].word != state.word:
            new[at.said] = f"Training {state.word}. {' '.join(found.words)}"
            if state.word == "done":
                new |= self._taken(run) | refreshed(self.lane, person)
        return new

    def _status(self, run: Run, state: State, found: Look) -> str:
        if state.word == "waiting":
            return waiting(state)
        if state.word == "stopping":
            return note("Stopping …")
        if state.word == "failed":
            return note(f"It failed: {run.problem}", "warn")
        if state.word == "done":
            return notes(found.words)
        steps = int(run.facts["settings"]["steps"])
        if state.word == "stopped":
            return note(f"Stopped at step {found.step} of {steps}. Resume goes on from there.")
        if not found.step:
            return bar(0, steps, run.said or "Loading the model …", "Training")
        left = found.seconds / found.step * (steps - found.step)
        return bar(found.step, steps, f"Step {found.step} of {steps}{runcards.left(left)}", "Training")

    def _taken(self, run: Run | None) -> Update:
        """The files to take away of a run that is done; of None, none."""
        if run is None:
            return {self.at.take: gr.File(visible=False), self.at.use: gr.Button(visible=False)}
        lora = packed(run, run.folder / f"{run.slug}-lora.zip", _made(run), zipfile.ZIP_DEFLATED)
        files = [file for file in (lora, _kohya(run), run.out / REPORT) if file.is_file()]
        return {self.at.take: self.handed(files), self.at.use: gr.Button(visible=True)}


def _edited(run: Run, rows: Rows) -> dict[str, str]:
    """The captions of a table that are not as they were found, by picture."""
    found = dict(run.facts.get("found", []))
    return {name: text for name, text in rows if found.get(name) != text}


def _kohya(run: Run) -> Path:
    """The file for kohya's tools and ComfyUI."""
    return run.folder / f"{run.slug}.safetensors"


def _made(run: Run) -> list[tuple[Path, str]]:
    """The files of a LoRA and what tells how it came to be, and their names in its zip."""
    told = [f"text_encoder/{CONFIG}", f"text_encoder/{WEIGHTS}", RECORD, "config.yaml", REPORT]
    names = [CONFIG, WEIGHTS, *told]
    return [(run.out / name, f"{run.slug}/{name}") for name in names if (run.out / name).is_file()]

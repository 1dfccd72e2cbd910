"""What a batch would do and how long it would take: counted, and timed on a trial of its commonest shape."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from diffusionfm.batch.advice import Advice
from diffusionfm.batch.jobs import Job, Shape
from diffusionfm.batch.manifest import FAILED

if TYPE_CHECKING:
    from diffusionfm.batch.draw import Drawer

SHOWN = 5  # shapes and broken rows that the text names
SHORT, LONG = 2, 4  # steps of the two calls that are timed


@dataclass
class Plan:
    """Rows, pictures to make by shape, those on record, and those that cannot be drawn.

    seconds: the estimate, None for no picture. workers: how many draw at a time, as far as this machine can tell."""

    rows: int
    pictures: int = 0
    done: int = 0
    failed: int = 0
    broken: int = 0
    errors: list[str] = field(default_factory=list)
    shapes: Counter[Shape] = field(default_factory=Counter)
    seconds: float | None = None
    batch_size: int = 0
    workers: int = 1
    advice: Advice = field(default_factory=Advice)

    def count(self, job: Job, state: int | None) -> None:
        """Add a job, given the state of its record."""
        self.pictures += 1
        if state is not None:
            self.failed += state == FAILED
            self.done += state != FAILED
        elif job.error:
            self.broken += 1
            told = f"{job.id}: {job.error}"
            if len(self.errors) < SHOWN and told not in self.errors:
                self.errors.append(told)
        else:
            self.shapes[job.shape] += 1

    def estimate(self, drawer: Drawer, workers: int = 1) -> None:
        """Time two short calls of the commonest shape; others are scaled by pixels, steps and guidance."""
        if not self.shapes:
            return
        self.workers = workers
        (shape, count), *_ = self.shapes.most_common(1)
        steps, guidance, width, height = shape
        self.batch_size = min(count, drawer.size(shape))
        settings = {"negative_prompt": "", "guidance": guidance, "width": width, "height": height}

        def call(steps: int) -> float:
            jobs = [Job("", 0, "a trial", k, {**settings, "steps": steps}) for k in range(self.batch_size)]
            start = time.monotonic()
            drawn = drawer.draw(jobs)
            if drawn[0].error:
                raise ValueError(f"a trial picture could not be drawn: {drawn[0].error}")
            return time.monotonic() - start

        call(1)  # warms up
        short, long = call(SHORT), call(LONG)
        step = max(0.0, long - short) / (LONG - SHORT)
        fixed = max(0.0, short - SHORT * step)
        self.seconds = 0.0
        for (n, scale, wide, high), pictures in self.shapes.items():
            larger = drawer.pipe.scale(high, wide) / drawer.pipe.scale(height, width)
            area = wide * high / (width * height) / larger**2
            copies = (1 if scale == 1 else 2) / (1 if guidance == 1 else 2)
            self.seconds += pictures / self.batch_size * area * (fixed + n * copies * step) / workers

    def report(self) -> dict[str, Any]:
        """As JSON."""
        names = ("steps", "guidance", "width", "height", "pictures")
        shapes = [
            dict(zip(names, (*shape, count), strict=True)) for shape, count in self.shapes.most_common()
        ]
        return {**vars(self), "shapes": shapes, "to_make": self.shapes.total(), "advice": vars(self.advice)}

    def text(self) -> str:
        """In a few lines."""
        todo = self.shapes.total()
        head = (
            f"{self.rows:,} rows, {self.pictures:,} pictures: {todo:,} to make, {self.done:,} already there"
        )
        lines = [head + (f", {self.failed:,} failed before" if self.failed else "")]
        for (steps, guidance, width, height), count in self.shapes.most_common(SHOWN):
            lines.append(f"  {count:,} of {width} x {height} pixels, {steps} steps, guidance {guidance:g}")
        if len(self.shapes) > SHOWN:
            lines.append(f"  and {len(self.shapes) - SHOWN:,} other shapes")
        if self.broken:
            lines.append(f"{self.broken:,} pictures cannot be drawn, such as:")
            lines += [f"  {error}" for error in self.errors]
        lines += self.advice.lines()
        if self.seconds is not None:
            speed = todo / self.seconds if self.seconds else 0
            where = "this machine" if self.workers == 1 else f"{self.workers} workers as fast as one here"
            lines.append(
                f"about {_span(self.seconds)} on {where}, {speed:.2f} pictures/s, {self.batch_size} a network call"
            )
        return "\n".join(lines)


def _span(seconds: float) -> str:
    for size, name in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {name}"
    return f"{seconds:.0f} s"

"""What the engine is asked for, how far it is with it, and how much it takes on."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from diffusionfm.drawing import OnStep, Pictures, Task
from diffusionfm.edit import Start
from diffusionfm.serve.wardrobe import Loras

Group = tuple[int, int, Loras]  # what pictures of one network call have in common: height, width, LoRAs


class QueueFull(Exception):
    """There is no room for these pictures now; `retry_after` seconds may change that."""

    def __init__(self, message: str, retry_after: float):
        super().__init__(message)
        self.retry_after = retry_after


class Closed(Exception):
    """The engine takes no more requests, or was stopped before it had drawn this one."""


@dataclass(frozen=True)
class Limits:
    """How much the engine takes on.

    batch: pictures in a network call. queue: unfinished pictures at most. client: those of one client at most.
    work: pixels x steps x pictures of a request at most. None is what suits the device.
    """

    batch: int | None = None
    queue: int = 128
    client: int = 64
    work: int | None = None

    def __post_init__(self) -> None:
        for name in ("batch", "queue", "client", "work"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"the limit {name} must be 1 or more, got {value}")


@dataclass(frozen=True)
class Request:
    """What to draw: `DiffusionFMPipeline.__call__` says what the fields mean; None takes the model's own.

    start: a picture to set out from, made by `edit.start_from` at the size to draw.
    """

    prompt: str
    negative_prompt: str = ""
    num_images: int = 1
    seed: int = 0
    steps: int | None = None
    guidance: float | None = None
    height: int | None = None
    width: int | None = None
    loras: Loras = ()
    start: Start | None = None


@dataclass
class Counts:
    """What the engine has done since it began."""

    calls: int = 0
    steps: int = 0  # of pictures: a call with 8 pictures is 8
    pictures: int = 0
    failed: int = 0
    cancelled: int = 0


@dataclass(eq=False)
class Picture:
    """A picture on its path from noise: x at times[step], the velocity that led there, and what a mask holds."""

    job: Job
    task: Task
    turn: float
    step: int = 0
    x: Tensor | None = None
    v: Tensor | None = None
    held: tuple[Tensor, Tensor] | None = None  # the known velocity, and where the picture is free of it

    @property
    def done(self) -> bool:
        return self.step == self.job.steps


@dataclass(eq=False)
class Job:
    """A request under way, and the future that its pictures will settle. told: as of `Pictures`."""

    client: str
    guidance: float
    times: Tensor
    group: Group
    on_step: OnStep | None
    start: Start | None = None
    future: Future[Pictures] = field(default_factory=Future)
    pictures: list[Picture] = field(default_factory=list)
    told: list[dict[str, Any]] = field(default_factory=list)
    flagged: list[str] = field(default_factory=list)
    reported: int = 0

    @property
    def steps(self) -> int:
        return len(self.times) - 1

    @property
    def done(self) -> bool:
        """Whether every picture is at the end of its path."""
        return all(picture.done for picture in self.pictures)


class Attempt(AbstractContextManager):
    """A block whose exception is kept for those it concerns, as a future keeps it."""

    error: Exception | None = None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None

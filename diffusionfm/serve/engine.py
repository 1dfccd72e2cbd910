"""One pipeline, many requests: pictures join and leave the network call between steps (continuous batching).

A single worker thread owns the networks. Before every step it drops what was cancelled, picks by fair turns the
pictures that share the next call, whatever their prompts, seeds, guidance and number of steps, and moves each along
its own path. Only size and LoRAs must agree within a call: pictures that differ in those take calls in turn. The
maths is the pipeline's: `velocity`, `flow.advance`, `finish`. Decoding happens in a thread of its own.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from weakref import WeakMethod

import torch
from PIL import Image
from torch import Tensor

from diffusionfm import flow
from diffusionfm.checks import check_settings
from diffusionfm.drawing import BATCH_SIZE, OnStep, Pictures, plan_tasks
from diffusionfm.pipeline import DiffusionFMPipeline
from diffusionfm.serve.jobs import Attempt, Closed, Counts, Group, Job, Limits, Picture, QueueFull, Request
from diffusionfm.serve.memory import Tidy
from diffusionfm.serve.safety import Safety, blurred
from diffusionfm.serve.turns import Turns
from diffusionfm.serve.wardrobe import Loras, Wardrobe

LOG = logging.getLogger("diffusionfm.serve")
WORK = {"cpu": 2**26, "mps": 2**28, "cuda": 2**30}


class Engine:
    """Draws what is submitted, from any thread. Use it as a context manager, or `close` it.

    LoRAs are those the pipeline was loaded with (`load_lora`), listed to all, and those added since (`add_lora`),
    listed to nobody; a request works with the ones it names and no other.
    The pipeline belongs to the engine: nobody else may draw with it meanwhile.
    """

    def __init__(self, pipe: DiffusionFMPipeline, limits: Limits | None = None, safety: Safety | None = None):
        self.pipe = pipe
        self.safety = safety or Safety()
        self.limits = limits or Limits()
        self.counts = Counts()
        self.wardrobe = Wardrobe(pipe)
        self._cap = self.limits.batch or BATCH_SIZE.get(pipe.device.type, 8)
        self._most_work = self.limits.work or WORK.get(pipe.device.type, 2**26)
        self._jobs: list[Job] = []  # in order of arrival, until settled
        self._errands: list[tuple[Callable[[], None], Future[None]]] = []  # for the worker, between two calls
        self._turns = Turns()
        self._changed = threading.Condition()
        self._closing = self._aborted = False
        self._pace = 0.0  # seconds that a step of a picture takes, of late
        self._served: dict[Group, int] = {}  # the number of the last call of each group there is
        self._fields: dict[Group, tuple[list[Picture], flow.VelocityFn]] = {}
        self._words: dict[Loras, dict[str, Tensor]] = {}
        self._decoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="decode")
        self._tidy = Tidy()
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -------------------------------------------------------------- from any thread

    def submit(self, request: Request, client: str = "", on_step: OnStep | None = None) -> Future[Pictures]:
        """Queue a request: its future gives the pictures, and `future.cancel()` stops them within a step.

        client: whose turn it takes. on_step(step, total, preview): called on the worker, so be brief; preview() may
        be called later and from any thread. Returning True cancels. Raises at once: ValueError for what cannot be
        drawn, QueueFull, Closed.
        """
        job = self._plan(request, client, on_step)
        count = len(job.pictures)
        with self._changed:
            if self._closing:
                raise Closed("the server is shutting down")
            self._refuse_too_many(client, count)
            now = min((p.turn for p in self._unfinished()), default=0.0)
            cost = self._cost(job)
            for picture in job.pictures:
                picture.turn = self._turns.take(client, cost, now)
            self._jobs.append(job)
            self._changed.notify()
        settled = WeakMethod(self._if_cancelled)  # who keeps a future keeps no engine
        job.future.add_done_callback(lambda future: (leave := settled()) and leave(job, future))
        return job.future

    def add_lora(self, source: Path, name: str) -> None:
        """Have a LoRA that only requests can use which know its `name`; waits until it is there.

        Submit within `wardrobe.GRACE` seconds: later the oldest goes when there are too many.
        Raises ValueError as `load_lora`, and Closed."""
        done: Future[None] = Future()

        def add() -> None:
            with self._changed:
                in_use = {lora for job in self._jobs for lora, _ in job.group[2]}
            self.wardrobe.add(source, name, in_use)

        with self._changed:
            if self._closing:
                raise Closed("the server is shutting down")
            self._errands.append((add, done))
            self._changed.notify()
        done.result()

    @property
    def alive(self) -> bool:
        """Whether requests are taken."""
        return self._worker.is_alive() and not self._closing

    @property
    def waiting(self) -> int:
        """Pictures that are not finished yet, those being drawn among them."""
        with self._changed:
            return sum(len(job.pictures) for job in self._jobs)

    def ahead(self, future: Future[Pictures]) -> int:
        """How many other requests are drawn before this one; 0 when it is being drawn, is next, or has ended."""
        with self._changed:
            pictures = sorted(self._unfinished(), key=lambda picture: picture.turn)
        mine = next((k for k, picture in enumerate(pictures) if picture.job.future is future), 0)
        if mine < self._cap or pictures[mine].step:
            return 0
        return len({picture.job for picture in pictures[:mine]})

    def refuse(self) -> None:
        """Take no more requests; those there are will be drawn."""
        with self._changed:
            self._closing = True
            self._changed.notify()

    def close(self, timeout: float | None = None) -> None:
        """Draw what is queued, for `timeout` seconds at most, None for as long as it takes; fail the rest."""
        self.refuse()
        self._worker.join(timeout)
        self._aborted = True
        self._worker.join()
        self._decoder.shutdown()

    # -------------------------------------------------------------- admission

    def check_work(self, height: int, width: int, steps: int, pictures: int = 1) -> int:
        """Pixels x steps x pictures; ValueError for more than one request may be."""
        work = self._pixels(height, width) * steps * pictures
        if work > self._most_work:
            raise ValueError(
                f"{work:,} pixels x steps x pictures are too many for one request: {self._most_work:,} at most, "
                "so ask for fewer pictures or steps, or a smaller size"
            )
        return work

    def _plan(self, request: Request, client: str, on_step: OnStep | None) -> Job:
        """The job of a request; ValueError for what cannot be drawn."""
        check_settings(num_images=request.num_images)
        found = self.pipe.settings(request.steps, request.guidance, request.height, request.width)
        start, size = request.start, (found["width"], found["height"])
        if start is not None and start.picture.size != size:
            raise ValueError(
                f"the picture to set out from must be {size[0]} x {size[1]} pixels: fit it first"
            )
        tasks = plan_tasks(
            request.prompt,
            request.negative_prompt,
            request.seed,
            request.num_images,
            silent=start is not None,
        )
        times = flow.grid(found["steps"], self.pipe.defaults["shift"], start.strength if start else 1.0)
        self.check_work(found["height"], found["width"], len(times) - 1, len(tasks))
        most = min(self.limits.client, self.limits.queue)
        if len(tasks) > most:
            raise ValueError(f"at most {most} pictures a request, got {len(tasks)}: ask several times")
        self.wardrobe.check(request.loras)
        tasks = self.pipe.understood(tasks, [name for name, _ in request.loras])
        flagged = self.safety.check("\n".join(dict.fromkeys([request.prompt, tasks[0].read])))
        group = (found["height"], found["width"], tuple(sorted(request.loras)))
        job = Job(client, float(found["guidance"]), times, group, on_step, start)
        settings = found if start is None else found | {"strength": start.strength}
        worn = self.wardrobe.named(request.loras)
        job.told = [
            self.pipe.describe(
                task.prompt, task.seed, settings | {"negative_prompt": request.negative_prompt}, worn
            )
            for task in tasks
        ]
        job.flagged = flagged
        job.pictures = [Picture(job, task, turn=0.0) for task in tasks]
        return job

    def _refuse_too_many(self, client: str, count: int) -> None:
        held = sum(len(job.pictures) for job in self._jobs)
        own = sum(len(job.pictures) for job in self._jobs if job.client == client)
        per_picture = self._pace * sum(p.job.steps - p.step for p in self._unfinished()) / max(held, 1)
        if held + count > self.limits.queue:
            raise QueueFull(f"the queue is full ({held} pictures): try again a little later", per_picture)
        if own + count > self.limits.client:
            raise QueueFull(
                f"{own} pictures of yours are still waiting: let some of them finish first", per_picture
            )

    def _cost(self, job: Job) -> float:
        height, width, _ = job.group
        return self._pixels(height, width) * job.steps * (1 if job.guidance in (0, 1) else 2)

    def _pixels(self, height: int, width: int) -> int:
        """Of a picture as its latents' own size is: what a step costs goes by that."""
        return height * width // self.pipe.scale(height, width) ** 2

    # -------------------------------------------------------------- the worker

    @torch.inference_mode()
    def _work(self) -> None:
        try:
            while self._turn():
                pass
        finally:  # even after a bug nobody waits for ever
            with self._changed:
                self._closing = True
                left = [job for job in self._jobs if not job.done]
                errands, self._errands = self._errands, []
            for _, done in errands:
                done.set_exception(Closed("the server stopped"))
            for job in left:
                self._fail(job, Closed("the server stopped before these pictures were drawn"))

    def _turn(self) -> bool:
        """One network call for whoever's turn it is; whether there was one."""
        batch = self._next()
        if batch:
            self._step(batch)
        return bool(batch)

    def _next(self) -> list[Picture]:
        """The pictures of the next call; waits for some, and gives none when it is time to stop."""
        while True:
            self._run_errands()
            with self._changed:
                if self._errands:
                    continue
                pictures = [] if self._aborted else sorted(self._unfinished(), key=lambda p: p.turn)
                if pictures or self._closing:
                    break
                self._forget()
                self._changed.wait()
        if not pictures:
            return []
        groups = dict.fromkeys(picture.job.group for picture in pictures[: self._cap])
        group = min(groups, key=lambda one: self._served.get(one, 0))
        self._keep(pictures, group)
        return [picture for picture in pictures if picture.job.group == group][: self._cap]

    def _run_errands(self) -> None:
        """Between two calls, and without the lock: they may take long, and requests come meanwhile."""
        while True:
            with self._changed:
                if not self._errands:
                    return
                errand, done = self._errands.pop(0)
            with Attempt() as attempt, torch.inference_mode(False):
                errand()
            if attempt.error is None:
                done.set_result(None)
            else:
                done.set_exception(attempt.error)

    def _unfinished(self) -> list[Picture]:
        return [p for job in self._jobs if not job.future.done() for p in job.pictures if not p.done]

    def _keep(self, pictures: list[Picture], group: Group) -> None:
        """Note the group's turn; drop what was kept for groups and prompts that nobody draws any more."""
        groups = {picture.job.group for picture in pictures}
        self._served = {one: n for one, n in self._served.items() if one in groups}
        self._served[group] = self.counts.calls + 1
        self._fields = {one: known for one, known in self._fields.items() if one in groups}
        self._words = {one[2]: self._words.get(one[2], {}) for one in groups}
        wanted = {""} | {text for p in pictures for text in (p.task.read or p.task.prompt, p.task.negative)}
        for words in self._words.values():
            for prompt in set(words) - wanted:
                del words[prompt]

    def _forget(self) -> None:
        """Nothing is waiting: keep nothing of what was drawn."""
        self._turns.reset()
        self._served, self._fields, self._words = {}, {}, {}

    def _step(self, batch: list[Picture]) -> None:
        """One network call. If it fails, halves of it are tried, so that only the cause of it fails."""
        began = time.monotonic()
        with Attempt() as attempt:
            self._advance(batch)
        if attempt.error is not None:
            return self._step_apart(batch, attempt.error)
        self.counts.calls += 1
        self.counts.steps += len(batch)
        pace = (time.monotonic() - began) / len(batch)
        self._pace = 0.9 * self._pace + 0.1 * pace if self._pace else pace
        for job in dict.fromkeys(picture.job for picture in batch):
            self._report(job)

    def _step_apart(self, batch: list[Picture], error: Exception) -> None:
        """After a call that failed: its halves, and in the end the picture that is the cause."""
        self._fields.pop(batch[0].job.group, None)
        if len(batch) == 1:
            return self._fail(batch[0].job, error)
        half = len(batch) // 2
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
            self._cap = half
            LOG.warning("out of memory: %d pictures in a call from now on", half)
        for part in (batch[:half], batch[half:]):
            if still := [picture for picture in part if not picture.job.future.done()]:
                self._step(still)

    def _advance(self, batch: list[Picture]) -> None:
        """Move each picture a step along its path."""
        field = self._field(batch)
        x = torch.stack([picture.x for picture in batch])  # type: ignore[misc]
        t, until = (
            torch.stack([picture.job.times[picture.step + k] for picture in batch]).to(x.device)
            for k in (0, 1)
        )
        v = field(x, t)
        for k, picture in enumerate(batch):
            if picture.held is not None:
                v[k] = torch.lerp(picture.held[0], v[k], picture.held[1])
        x = flow.advance(x, v, t, until)
        for picture, x_after, v_there in zip(batch, x, v, strict=True):
            picture.x, picture.v = x_after, v_there
            picture.step += 1

    def _field(self, batch: list[Picture]) -> flow.VelocityFn:
        """The velocity field of these pictures, made anew when one has joined or left."""
        height, width, loras = group = batch[0].job.group
        self.wardrobe.wear(loras)
        known, field = self._fields.get(group, ([], None))
        if field is not None and known == batch:
            return field
        for picture in batch:
            if picture.x is None:
                job = picture.job
                x, held = self.pipe.begin([picture.task.seed], height, width, job.times[0], job.start)
                picture.x, picture.held = x[0], held and (held[0][0], held[1][0])
        field = self.pipe.velocity(
            [picture.task for picture in batch],
            [picture.job.guidance for picture in batch],
            self._words.setdefault(loras, {}),
        )
        self._fields[group] = batch, field
        return field

    def _report(self, job: Job) -> None:
        """Tell who looks on how far the job is, and hand it to the decoder at its end."""
        step = sum(picture.step for picture in job.pictures) // len(job.pictures)
        if job.on_step is not None and step > job.reported and not job.future.done():
            job.reported = step
            with Attempt() as attempt:
                if job.on_step(step, job.steps, _preview(self.pipe, job)):
                    job.future.cancel()
            if attempt.error is not None:
                self._fail(job, attempt.error)
        if job.done and not job.future.done():
            latents = torch.stack([picture.x for picture in job.pictures])  # type: ignore[misc]
            drawn = self._decoder.submit(_finish, self.pipe, job, latents)
            drawn.add_done_callback(partial(self._deliver, job))

    # -------------------------------------------------------------- how a job ends

    def _deliver(self, job: Job, drawn: Future[Pictures]) -> None:
        error = drawn.exception()
        if error is not None:
            return self._fail(job, error)
        if self._settle(job, "pictures"):
            job.future.set_result(drawn.result())
        self._tidy()

    def _fail(self, job: Job, error: BaseException) -> None:
        if self._settle(job, "failed"):
            LOG.error("drawing failed", exc_info=error)
            job.future.set_exception(error)

    def _settle(self, job: Job, how: str) -> bool:
        """Whether the job is still wanted; if so its place is free before anyone can see its end."""
        if job.future.done() or not job.future.set_running_or_notify_cancel():
            return False
        self._leave(job, how)
        return True

    def _if_cancelled(self, job: Job, future: Future[Pictures]) -> None:
        if future.cancelled():
            self._leave(job, "cancelled")

    def _leave(self, job: Job, how: str) -> None:
        with self._changed:
            self._jobs.remove(job)
            setattr(self.counts, how, getattr(self.counts, how) + len(job.pictures))
            self._changed.notify()


# ------------------------------------------------------------------ parts of it


@torch.inference_mode()
def _finish(pipe: DiffusionFMPipeline, job: Job, latents: Tensor) -> Pictures:
    tasks = [picture.task for picture in job.pictures]
    height, width, loras = job.group
    drawn = pipe.finish(latents, pipe.scale(height, width), job.start)
    advice = pipe.advice(tasks, [name for name, _ in loras])
    return Pictures(drawn, [task.seed for task in tasks], advice, job.told, job.flagged)


def _preview(pipe: DiffusionFMPipeline, job: Job) -> Callable[[], list[Image.Image]]:
    """A look, on demand, at the job's pictures as they would end from here; those not begun are left out.

    Of a flagged prompt they are blurred: to see those is for the end, by choice.
    """
    seen = [(p.x, p.v, job.times[p.step]) for p in job.pictures if p.v is not None]

    @torch.inference_mode()
    def preview() -> list[Image.Image]:
        looks = pipe.decode(torch.stack([flow.denoised(x, t, v) for x, v, t in seen]))  # type: ignore[arg-type]
        return [*map(blurred, looks)] if job.flagged else looks

    return preview

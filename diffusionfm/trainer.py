"""The one training loop: any objective over any batches, resumed bit for bit, on one process or many."""

import itertools
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn

from diffusionfm import checkpoint, optim, runtime
from diffusionfm.checkpoint import PowerEMA, write_json
from diffusionfm.runlog import RunLog
from diffusionfm.runtime import Batch

Networks = dict[str, nn.Module]


@dataclass
class TrainerConfig:
    """How to train; what to train is the objective's business. ValueError for settings out of range."""

    output_dir: str = "runs/run"
    steps: int = 1000
    batch_size: int = (
        64  # samples of one step, over all ranks and pieces; recipes build their batches with it
    )
    grad_accum: int = 1  # pieces in which each rank works a batch off
    lr: float = 1e-3
    weight_decay: float = 0.01
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    optimizer: str = "adamw"  # or muon
    warmup: int = 100
    decay_fraction: float = 0.15  # the last part of the run, over which the learning rate falls to 0
    clip: float = 1.0  # largest gradient norm; 0 does not clip
    ema: float = 0.1  # width sigma_rel of the weight average; 0 keeps none
    precision: str = "auto"  # bf16 | fp32 | auto
    device: str = "auto"  # cpu | cuda | mps | auto
    compile: bool = False
    seed: int = 0
    init: str | None = None  # weights to start from: a run folder, a pipeline folder or a safetensors file
    checkpoint_every: int = 1000
    keep: int = 2
    log_every: int = 20
    sample_every: int = 1000
    validate_every: int = 1000
    tensorboard: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "grad_accum", "checkpoint_every", "keep", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"trainer.{name} is at least 1, not {getattr(self, name)}")
        for name in ("lr", "weight_decay", "warmup", "clip", "sample_every", "validate_every"):
            if getattr(self, name) < 0:
                raise ValueError(f"trainer.{name} is not negative, as {getattr(self, name)} is")
        if not 0 <= self.decay_fraction <= 1:
            raise ValueError(f"trainer.decay_fraction is between 0 and 1, not {self.decay_fraction}")
        if self.ema:
            checkpoint.power_of_width(self.ema)
        for name, choices in {
            "optimizer": ("adamw", "muon"),
            "precision": ("bf16", "fp32", "auto"),
            "device": ("auto", "cpu", "cuda", "mps"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"trainer.{name} is one of {', '.join(choices)}, not {getattr(self, name)!r}"
                )


class Batches(Protocol):
    """What feeds the trainer: this rank's batch of a step, a pure function of the step."""

    def batch(self, step: int) -> Batch:
        """Tensors and lists, each with one entry a sample; a list `key` names the samples.

        It may also have `stream(start_step)`, an iterator over the batches from there on, made ahead.
        """
        ...


class TrainingDiverged(FloatingPointError, ValueError):
    """The loss or its gradient is no longer a number; the message names the step and the samples."""


class Interrupted(SystemExit):
    """A signal stopped the training, which has saved; the exit code is 128 + the signal's number."""


class Trainer:
    """Trains `objective.networks()` on `data` into the run folder `cfg.output_dir`; started again it goes on.

    objective(batch) -> (loss, metrics): a scalar that averages over the batch, and scalars to log.
    objective.networks() -> {name: module}: what is optimised, averaged, saved and exported. Optional on it:
    compile_networks(), flops_per_sample (a number), export(folder) in place of each network's usual export.
    Every step draws from a generator seeded by (seed, step, rank), so callbacks cannot disturb training.

    on_sample(step, networks) and validate(step, networks) -> {name: number} run on the first rank with the
    averaged weights in place, in eval mode without gradients.
    """

    def __init__(
        self,
        cfg: TrainerConfig,
        objective: nn.Module,
        data: Batches,
        *,
        resolved_config: Any = None,
        on_sample: Callable[[int, Networks], None] | None = None,
        validate: Callable[[int, Networks], dict[str, float]] | None = None,
    ) -> None:
        self.cfg, self.objective, self.data = cfg, objective, data
        self.resolved_config = cfg if resolved_config is None else resolved_config
        self.on_sample, self.validate = on_sample, validate
        self.run_dir = Path(cfg.output_dir)
        no_gpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        self.accelerator = Accelerator(
            mixed_precision="no", cpu=cfg.device == "cpu" or no_gpu
        )  # joins gloo ranks
        self.device = self.accelerator.device
        if hasattr(data, "split"):
            data.split(self.accelerator.process_index, self.accelerator.num_processes)
        if cfg.device not in ("auto", self.device.type):
            raise ValueError(f"trainer.device={cfg.device} is not there, but {self.device.type} is")
        self.bf16 = cfg.precision == "bf16" or (
            cfg.precision == "auto" and runtime.has_fast_bf16(self.device)
        )
        self.networks: Networks = objective.networks()  # type: ignore[operator]
        self.parameters = optim.trainable(self.networks, objective)
        self.step, self.samples, self.seconds = 0, 0, 0.0
        self._signal, self._enough, self._agreed = 0, False, False

    def fit(self) -> Path:
        """Train up to `cfg.steps` and return the run folder, which then holds weights, metrics and samples.

        Raises ValueError for a checkpoint of other networks, TrainingDiverged, CheckpointError
        when the disk is full, and Interrupted by SIGINT or SIGTERM; each leaves a checkpoint to go on from.
        """
        self._start()
        cfg, began = self.cfg, time.perf_counter()
        finished = self.step >= cfg.steps
        if finished and self.accelerator.is_main_process:
            self._export()
        with ExitStack() as stack:
            stack.enter_context(self._signals())
            batches = stack.enter_context(self._batches())
            self.log.open(self.step, cfg.steps, cfg.tensorboard)
            stack.callback(self.log.close)
            while not finished:
                fetched = time.perf_counter()
                batch = next(batches)
                wait = time.perf_counter() - fetched
                line = self._train_step(batch)
                rate = line.pop("count") / (time.perf_counter() - fetched)
                line |= {"images_per_s": rate, "wait_s": wait}
                if self.validate is not None and self._due(cfg.validate_every):
                    line |= self._validate()
                finished = self.step >= cfg.steps or self._told_to_stop()
                self.seconds, began = self.seconds + time.perf_counter() - began, time.perf_counter()
                line["seconds"] = self.seconds
                self.log.write(line, to_board=finished or self.step % cfg.log_every == 0)
                if self.on_sample is not None and self._due(cfg.sample_every):
                    self._sample()
                if finished or self._due(cfg.checkpoint_every) or self.step == self._decay_start():
                    self._save()
        if self._signal:
            self._leave()
        return self.run_dir

    def _train_step(self, batch: Batch) -> dict[str, Any]:
        """One optimiser step; returns its log line. Raises TrainingDiverged before any weight moves."""
        cfg, many = self.cfg, self.accelerator.num_processes > 1
        torch.manual_seed(runtime.step_seed(cfg.seed, self.step, self.accelerator.process_index))
        lr = cfg.lr * optim.wsd(self.step, cfg.steps, cfg.warmup, cfg.decay_fraction)
        optim.set_lr(self.optimizers, lr)
        pieces = runtime.split(batch, cfg.grad_accum)
        totals: dict[str, Tensor] = {}
        for i, piece in enumerate(pieces):
            last = i == len(pieces) - 1
            with self.accelerator.no_sync(self.model) if many and not last else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    loss, metrics = self.model(runtime.to_device(piece, self.device))
                self.accelerator.backward(loss.float() / len(pieces))
            for name, value in {"loss": loss, **metrics}.items():
                part = torch.as_tensor(value, device=self.device).detach().float() / len(pieces)
                totals[name] = totals[name] + part if name in totals else part
        limit = cfg.clip or float("inf")
        totals["grad_norm"] = self.accelerator.clip_grad_norm_(self.parameters.values(), limit)
        totals["signal"] = torch.tensor(float(self._signal), device=self.device)
        totals["enough"] = torch.tensor(float(self._enough), device=self.device)
        stacked = torch.stack(list(totals.values()))
        values = (self.accelerator.reduce(stacked, "mean") if many else stacked).tolist()
        scalars = dict(zip(totals, values, strict=True))
        signalled = scalars.pop("signal") > 0
        self._agreed = scalars.pop("enough") > 0 or signalled
        self._signal = self._signal or (signal.SIGTERM if signalled else 0)
        if not all(map(runtime.finite, (scalars["loss"], scalars["grad_norm"]))):
            self._diverge(scalars, batch)
        for optimizer in self.prepared:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        count = runtime.count(batch) * self.accelerator.num_processes
        self.step += 1
        self.samples += count
        if self.ema is not None:
            self.ema.update(self.step)
        return {"step": self.step, "samples": self.samples, **scalars, "lr": lr, "count": count}

    def stop(self) -> None:
        """Let `fit` end after the step at hand, saving as if it were the last: for early stopping."""
        self._enough = True

    def _told_to_stop(self) -> bool:
        """Ranks stop together, at the step in which they told each other; a single process at once."""
        return self._agreed if self.accelerator.num_processes > 1 else bool(self._signal or self._enough)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.cfg.steps)

    def _decay_start(self) -> int:
        return optim.decay_start(self.cfg.steps, self.cfg.decay_fraction)

    def _diverge(self, scalars: dict[str, float], batch: Batch) -> None:
        keys = [str(key) for key in gather_object(list(batch.get("key", [])))]
        where = self.run_dir / "diverged.json"
        if self.accelerator.is_main_process:
            write_json(where, {"step": self.step + 1, "key": keys, **{k: str(v) for k, v in scalars.items()}})
        raise TrainingDiverged(
            f"loss {scalars['loss']}, gradient norm {scalars['grad_norm']} at step {self.step + 1}; the last "
            f"checkpoint is kept: look at the samples named in {where} or lower trainer.lr, and run again"
        )

    def _start(self) -> None:
        """Load what there is, then prepare for the device and the ranks."""
        cfg, accelerator = self.cfg, self.accelerator
        tensors = self._load()
        self.objective.to(self.device)
        for network in self.networks.values():
            network.train()
        if cfg.compile:
            self._compile()
        self.optimizers = optim.build_optimizers(
            self.networks, cfg.optimizer, cfg.lr, cfg.weight_decay, (cfg.betas[0], cfg.betas[1])
        )
        self.model, *self.prepared = accelerator.prepare(self.objective, *self.optimizers.values())
        self.ema = PowerEMA(self.parameters, cfg.ema) if cfg.ema else None
        if "optimizer" in tensors:
            optim.load_optimizer_tensors(self.optimizers, self.parameters, tensors["optimizer"])
        if self.ema is not None and "ema" in tensors:
            self.ema.load(tensors["ema"])
        self.log = RunLog(self.run_dir, self.resolved_config, enabled=accelerator.is_main_process)
        if accelerator.is_main_process:
            if self.step < cfg.steps:
                checkpoint.discard_after(self.run_dir, self.step)
            ranks = accelerator.num_processes
            self.log.start(self.step, shapes=checkpoint.shapes(self.networks), processes=ranks)
        accelerator.wait_for_everyone()

    def _load(self) -> dict[str, dict[str, Tensor]]:
        """Load the networks from the newest checkpoint or `cfg.init`; return the checkpoint's tensors."""
        folder = checkpoint.latest(self.run_dir, self._usable) or checkpoint.latest(self.run_dir)
        if folder is None:
            if self.cfg.init:
                loaded = checkpoint.warm_start(self.networks, self.cfg.init)
                self._say(f"warm start from {self.cfg.init}: {loaded}")
            return {}
        tensors, state = checkpoint.load(folder)
        self.accelerator.wait_for_everyone()
        words = checkpoint.differences(state["shapes"], checkpoint.shapes(self.networks))
        if state["optimizer"] != self.cfg.optimizer:
            words = words or f"trainer.optimizer is {self.cfg.optimizer}, was {state['optimizer']}"
        if words:
            raise ValueError(f"{folder} is of another config: {words}; take another trainer.output_dir")
        for name, network in self.networks.items():
            network.load_state_dict(tensors[name], strict=True)
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
        self._say(f"resumed at step {self.step}")
        if not self._usable(state):
            self._say(f"its learning rate had begun to fall towards step {state['steps']}: it rises again")
        return tensors

    def _usable(self, state: dict[str, Any]) -> bool:
        """Whether going on from a checkpoint gives the run that `cfg.steps` from the start would have given.

        One whose learning rate had begun to fall towards another end does not; the one before that is kept.
        """
        done = state["step"] >= self.cfg.steps
        return done or state["steps"] == self.cfg.steps or state["step"] <= state["decay_start"]

    def _compile(self) -> None:
        if hasattr(self.objective, "compile_networks"):
            self.objective.compile_networks()  # type: ignore[operator]
        else:
            for network in self.networks.values():
                network.compile()

    def _save(self) -> None:
        """Checkpoint and export on the first rank; the others wait."""
        if self.accelerator.is_main_process:
            tensors = {name: network.state_dict() for name, network in self.networks.items()}
            tensors["optimizer"] = optim.optimizer_tensors(self.optimizers, self.parameters)
            if self.ema is not None:
                tensors["ema"] = self.ema.average
            state = {
                "step": self.step,
                "samples": self.samples,
                "seconds": self.seconds,
                "steps": self.cfg.steps,
                "decay_start": self._decay_start(),
                "optimizer": self.cfg.optimizer,
                "shapes": checkpoint.shapes(self.networks),
            }
            checkpoint.save(checkpoint.step_folder(self.run_dir, self.step), tensors, state)
            checkpoint.prune(self.run_dir, self.cfg.keep, self._decay_start())
            self._export()
            flops = getattr(self.objective, "flops_per_sample", None)
            self.log.ledger(self.step, self.samples, self.seconds, flops)
        self.accelerator.wait_for_everyone()

    def _export(self) -> None:
        """Write the averaged weights into the run folder, each file or folder whole or not at all."""
        with self._averaged():
            if hasattr(self.objective, "export"):
                self.objective.export(self.run_dir)  # type: ignore[operator]
                return
            for name, network in self.networks.items():
                checkpoint.write_weights(self.run_dir / f"{name}.safetensors", network.state_dict())
                if hasattr(network, "save_pretrained"):
                    aside = self.run_dir / f".{name}.partial"
                    network.save_pretrained(aside)  # type: ignore[operator]
                    checkpoint.replace_folder(aside, self.run_dir / name)

    def _leave(self) -> None:
        name = signal.Signals(self._signal).name
        self._say(f"stopped by {name} at step {self.step}, saved in {self.run_dir}; run again to go on")
        raise Interrupted(128 + self._signal)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in place, eval mode, no gradients, uncompiled; all undone afterwards."""
        modes = {name: network.training for name, network in self.networks.items()}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.ema is not None:
                stack.enter_context(self.ema.swapped_in())
            if self.cfg.compile:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for network in self.networks.values():
                network.eval()
            try:
                yield
            finally:
                for name, network in self.networks.items():
                    network.train(modes[name])

    def _sample(self) -> None:
        if self.accelerator.is_main_process and self.on_sample is not None:
            (self.run_dir / "samples").mkdir(exist_ok=True)
            with self._averaged():
                self.on_sample(self.step, self.networks)
        self.accelerator.wait_for_everyone()

    def _validate(self) -> dict[str, float]:
        result: dict[str, float] = {}
        if self.accelerator.is_main_process and self.validate is not None:
            with self._averaged():
                result = {
                    name: float(value) for name, value in self.validate(self.step, self.networks).items()
                }
        self.accelerator.wait_for_everyone()
        return result

    @contextmanager
    def _batches(self) -> Iterator[Iterator[Batch]]:
        stream = getattr(self.data, "stream", None)
        batches = stream(self.step) if stream else map(self.data.batch, itertools.count(self.step))
        try:
            yield iter(batches)
        finally:
            if hasattr(batches, "close"):
                batches.close()

    def _signals(self) -> AbstractContextManager[None]:
        return (
            runtime.handling(self._on_signal)
            if threading.current_thread() is threading.main_thread()
            else nullcontext()
        )

    def _on_signal(self, number: int, frame: Any) -> None:
        self._signal = number
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        self._say("stopping after this step; a second signal stops at once")

    def _say(self, text: str) -> None:
        if self.accelerator.is_main_process:
            print(text, flush=True)

"""The one training loop: any objective over any batches, resumed bit for bit, on one process or many."""

import itertools
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from diffusionfm import checkpoint, cost, ema, guard, optim, resume, runtime
from diffusionfm.checkpoint import write_json
from diffusionfm.devices import has_fast_bf16
from diffusionfm.runlog import RunLog, check_tracker
from diffusionfm.runtime import Batch
from diffusionfm.settings import TrainerConfig
from diffusionfm.sharding import Sharding, local, rows_of

Networks = dict[str, nn.Module]


class Batches(Protocol):
    """What feeds the trainer: this rank's batch of a step, a pure function of the step."""

    def batch(self, step: int) -> Batch:
        """Tensors and lists, each with one entry a sample; a list `key` names the samples.

        It may also have `stream(start_step)`, an iterator over the batches from there on, made ahead;
        `split(rank, ranks)`, told which part to give; and `fingerprint`, a string that is another one when the order
        of training is another.
        """
        ...


class TrainingDiverged(FloatingPointError, ValueError):
    """The loss or its gradient is no longer a number, or keeps leaping; the message names step and samples."""


class Interrupted(SystemExit):
    """A signal stopped the training, which has saved; the exit code is 128 + the signal's number."""


class Trainer:
    """Trains `objective.networks()` on `data` into the run folder `cfg.output_dir`; started again it goes on.

    objective(batch) -> (loss, metrics): a scalar that averages over the batch, and scalars to log.
    objective.networks() -> {name: module}: what is optimised, averaged, saved and exported. Optional on it:
    compile_networks(), flops_per_sample (a number), export(folder) in place of each network's usual export.
    Every step draws from a generator seeded by (seed, step, rank), so callbacks cannot disturb training.

    on_sample(step, networks) and validate(step, networks) -> {name: number} run on the first rank with the
    averaged weights in place, in eval mode without gradients. bar: whether a progress bar is shown.
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
        bar: bool = True,
    ) -> None:
        self.cfg, self.objective, self.data = cfg, objective, data
        self.resolved_config = cfg if resolved_config is None else resolved_config
        self.on_sample, self.validate, self.bar = on_sample, validate, bar
        self.run_dir = Path(cfg.output_dir)
        check_tracker(cfg.tracker)
        no_gpu = not (torch.cuda.is_available() or torch.backends.mps.is_available())
        self.accelerator = Accelerator(
            mixed_precision="no", cpu=cfg.device == "cpu" or no_gpu
        )  # joins gloo ranks
        self.device, self.ranks = self.accelerator.device, self.accelerator.num_processes
        cfg.pieces(self.ranks)
        if hasattr(data, "split"):
            data.split(self.accelerator.process_index, self.ranks)
        self.fingerprint = getattr(data, "fingerprint", None)
        if cfg.device not in ("auto", self.device.type):
            raise ValueError(
                f"trainer.device={cfg.device} is not available here: use auto or {self.device.type}"
            )
        self.bf16 = cfg.precision == "bf16" or (cfg.precision == "auto" and has_fast_bf16(self.device))
        self.networks: Networks = objective.networks()  # type: ignore[operator]
        self.parameters = optim.trainable(self.networks, objective)
        self.step, self.samples, self.seconds, self.joules = 0, 0, 0.0, 0.0
        self.flops: float | None = None  # of all samples so far, once an objective tells
        self.guard = guard.SpikeGuard(cfg.spike)
        self.sharding: Sharding | None = None
        self._signal, self._enough, self._agreed = 0, False, False

    def fit(self) -> Path:
        """Train up to `cfg.steps` and return the run folder, which then holds weights, metrics and samples.

        Raises ValueError for a checkpoint of other networks or other data, TrainingDiverged, CheckpointError
        when the disk is full, and Interrupted by SIGINT or SIGTERM; each leaves a checkpoint to go on from.
        """
        self._start()
        cfg, began = self.cfg, time.perf_counter()
        finished = self.step >= cfg.steps
        if finished:
            self._say(
                f"{self.run_dir} is at step {self.step} of {cfg.steps} already: for more, raise trainer.steps"
            )
            self._export()
            self._write_ledger()  # a kill may have come between the last checkpoint and it
        with ExitStack() as stack:
            stack.enter_context(self._signals())
            batches = stack.enter_context(self._batches())
            stack.callback(self.log.close)
            self.log.open(self.step, cfg.steps)
            while not finished:
                fetched = time.perf_counter()
                batch = next(batches)
                wait = time.perf_counter() - fetched
                line = self._train_step(batch)
                rate = line.pop("count") / (time.perf_counter() - fetched)
                line |= {"images_per_s": rate, "wait_s": wait, **self._utilisation(rate)}
                if self.validate is not None and self._due(cfg.validate_every):
                    line |= self._validate()
                finished = self.step >= cfg.steps or self._told_to_stop()
                self.seconds, began = self.seconds + time.perf_counter() - began, time.perf_counter()
                line |= {"seconds": self.seconds, "kwh": self.joules / 3.6e6}
                self.log.write(line, to_board=finished or self.step % cfg.log_every == 0)
                if finished or self._due(cfg.checkpoint_every) or self.step == self._decay_start():
                    self._save()
                if self.on_sample is not None and self._due(cfg.sample_every):
                    self._sample()
        runtime.leave_group_at_exit()
        if self._signal:
            self._leave()
        return self.run_dir

    def _train_step(self, batch: Batch) -> dict[str, Any]:
        """One optimiser step; returns its log line. Raises TrainingDiverged before any weight moves."""
        cfg = self.cfg
        torch.manual_seed(runtime.step_seed(cfg.seed, self.step, self.accelerator.process_index))
        lr = cfg.lr * optim.wsd(self.step, cfg.steps, cfg.warmup, cfg.decay_fraction)
        optim.set_lr(self.optimizers, lr)
        totals, metrics = self._gradients(batch)
        for name, (total, times) in metrics.items():
            totals[f"sum {name}"], totals[f"times {name}"] = total, times
        totals["grad_norm"] = self._clip()
        totals["signal"] = torch.tensor(float(self._signal), device=self.device)
        totals["enough"] = torch.tensor(float(self._enough), device=self.device)
        totals["joules"] = torch.tensor(self.energy.read(), device=self.device)
        stacked = torch.stack(list(totals.values()))
        values = (self.accelerator.reduce(stacked, "mean") if self.ranks > 1 else stacked).tolist()
        scalars = dict(zip(totals, values, strict=True))
        self.joules += scalars.pop("joules") * self.ranks
        for name in metrics:
            total, times = (scalars.pop(f"{what} {name}") for what in ("sum", "times"))
            scalars[name] = total / times if times else math.nan
        signalled = scalars.pop("signal") > 0
        self._agreed = scalars.pop("enough") > 0 or signalled
        self._signal = self._signal or (signal.SIGTERM if signalled else 0)
        skipped = self._unsound(scalars, batch)
        for optimizer in self.prepared:
            if not skipped:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        count = runtime.count(batch) * self.ranks
        self.step += 1
        self.samples += count
        self._count_flops(count)
        for average in self.averages.values():
            average.update(self.step)
        line = {"step": self.step, "samples": self.samples, **scalars, "lr": lr, "count": count}
        return line | {"skipped": self.guard.skipped} if skipped else line

    def _gradients(self, batch: Batch) -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
        """Work the batch off piece by piece: this rank's mean loss, and each metric's sum over the pieces that tell it.

        A piece that cannot tell a metric gives NaN for it; beside each sum stands how many pieces did tell."""
        pieces = runtime.split(batch, self.cfg.grad_accum)
        mean = torch.zeros((), device=self.device)
        found: dict[str, list[Tensor]] = {}
        for i, piece in enumerate(pieces):
            waits = self.ranks > 1 and self.sharding is None and i < len(pieces) - 1
            with self.accelerator.no_sync(self.model) if waits else nullcontext():
                with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                    loss, metrics = self.model(runtime.to_device(piece, self.device))
                self.accelerator.backward(loss.float() / len(pieces))
            mean = mean + loss.detach().float() / len(pieces)
            for name, value in metrics.items():
                told = torch.as_tensor(value, device=self.device).detach().float()
                total, times = found.setdefault(name, [torch.zeros_like(mean), torch.zeros_like(mean)])
                total += told.nan_to_num(posinf=math.inf, neginf=-math.inf)
                times += (~told.isnan()).float()
        return {"loss": mean}, found

    def _count_flops(self, count: int) -> None:
        """Add what `count` samples took, all like the last piece; of samples that no checkpoint tells of, the same."""
        if each := getattr(self.objective, "flops_per_sample", None):
            before = (self.samples - count) * float(each) if self.flops is None else self.flops
            self.flops = before + count * float(each)

    def _clip(self) -> Tensor:
        limit = self.cfg.clip or float("inf")
        if self.sharding is not None:
            return self.sharding.clip(self.parameters.values(), limit)
        return self.accelerator.clip_grad_norm_(self.parameters.values(), limit)

    def _utilisation(self, rate: float) -> dict[str, float]:
        """Model FLOP utilisation at `rate` samples a second: the share of the machine's own matrix rate."""
        flops = getattr(self.objective, "flops_per_sample", None)
        return {} if not flops else {"mfu": rate * float(flops) / (self.matrix_rate * self.ranks)}

    def stop(self) -> None:
        """Let `fit` end after the step at hand, saving as if it were the last: for early stopping."""
        self._enough = True

    def _told_to_stop(self) -> bool:
        """Ranks stop together, at the step in which they told each other; a single process at once."""
        return self._agreed if self.ranks > 1 else bool(self._signal or self._enough)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.cfg.steps)

    def _decay_start(self) -> int:
        return optim.decay_start(self.cfg.steps, self.cfg.decay_fraction)

    def _unsound(self, scalars: dict[str, float], batch: Batch) -> bool:
        """Whether to skip the step; its batch is then named and kept. Raises TrainingDiverged when that is no help."""
        judged = {name: scalars[name] for name in ("loss", "grad_norm")}
        sound = all(map(runtime.finite, judged.values()))
        spike = self.guard.judge(judged) if sound else ""
        if sound and not spike:
            return False
        step, folder = self.step + 1, self.run_dir / "bad_batches" / f"step_{self.step + 1:08d}"
        what = spike or f"loss {judged['loss']}, gradient norm {judged['grad_norm']}"
        facts = {"step": step, "what": what, **{name: str(value) for name, value in scalars.items()}}
        try:
            guard.dump_batch(folder, batch, self.accelerator.process_index, facts)
        except (OSError, SafetensorError) as error:
            self._say(f"could not keep the batch of step {step}: {error}")
        if spike and self.guard.row < guard.SPIKES_IN_A_ROW:
            self._say(f"step {step} skipped: {what}; its batch is in {folder}")
            return True
        ranks = runtime.gather_json([str(key) for key in batch.get("key", [])], self.device)
        if self.accelerator.is_main_process:
            keys = [key for keys in ranks for key in keys]
            write_json(self.run_dir / "diverged.json", {**facts, "key": keys})
        often = f", as in the {self.guard.row - 1} steps before" if spike else ""
        raise TrainingDiverged(
            f"{what} at step {step}{often}; the last checkpoint is kept: look at the samples in {folder}, named in "
            f"{self.run_dir / 'diverged.json'}, or lower trainer.lr, and run again"
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
        if cfg.sharding != "none" and self.ranks > 1:
            self.sharding = Sharding(cfg.sharding, self.objective, self.device)
            self.parameters = optim.trainable(self.networks)
        self.optimizers = optim.build_optimizers(
            self.networks,
            cfg.optimizer,
            cfg.lr,
            cfg.weight_decay,
            (cfg.betas[0], cfg.betas[1]),
            cfg.lr_scale,
        )
        if self.sharding is None:
            self.model, *self.prepared = accelerator.prepare(self.objective, *self.optimizers.values())
        else:
            self.model, self.prepared = self.objective, list(self.optimizers.values())
        live = {name: local(p) for name, p in self.parameters.items()}
        self.averages = {  # by the name of their checkpoint file
            f"ema_{i}" if i else "ema": ema.PowerEMA(live, width)
            for i, width in enumerate(ema.widths_of(cfg.ema))
        }
        if "optimizer" in tensors:
            optim.load_optimizer_tensors(self.optimizers, self.parameters, tensors["optimizer"])
        for name, average in self.averages.items():
            if name in tensors:
                average.load({key: rows_of(tensors[name][key], p) for key, p in self.parameters.items()})
        self.energy = cost.Energy(self.device, accelerator.local_process_index)
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        self.matrix_rate = cost.matrix_rate(self.device, dtype)
        self.log = RunLog(
            self.run_dir, self.resolved_config, cfg.tracker, accelerator.is_main_process, self.bar
        )
        if accelerator.is_main_process:
            if self.step < cfg.steps:
                if lost := resume.later(self.run_dir, self.step):
                    self._say(f"given up: the checkpoints of steps {', '.join(map(str, lost))}")
                checkpoint.discard_after(self.run_dir, self.step)
                ema.thin_snapshots(self.run_dir, self.step, cfg.checkpoint_every)
            machine = {"matrix_flops_per_s": self.matrix_rate, "matrix_dtype": str(dtype)}
            machine |= {"energy": self.energy.method, "processes": self.ranks, "sharding": cfg.sharding}
            self.log.start(self.step, **machine, shapes=checkpoint.shapes(self.networks))
        accelerator.wait_for_everyone()

    def _load(self) -> dict[str, dict[str, Tensor]]:
        """Load the networks from the newest checkpoint or `cfg.init`; return the checkpoint's tensors."""
        folder = resume.find(self.cfg)
        if folder is None:
            if self.cfg.init:
                loaded = checkpoint.warm_start(self.networks, self.cfg.init)
                self._say(f"warm start from {self.cfg.init}: {loaded}")
            return {}
        tensors, state = checkpoint.load(folder)
        self.accelerator.wait_for_everyone()
        resume.check_same(folder, state, self._identity())
        for name, network in self.networks.items():
            network.load_state_dict(tensors[name], strict=True)
        self.step, self.samples, self.seconds = state["step"], state["samples"], state["seconds"]
        self.joules, self.flops = state.get("joules", 0.0), state.get("flops")
        self.guard.load(state.get("guard", {}))
        self._say(f"resumed at step {self.step}")
        if not resume.usable(state, self.cfg.steps):
            self._say(f"its learning rate had begun to fall towards step {state['steps']}: it rises again")
        return tensors

    def _identity(self) -> dict[str, Any]:
        return resume.identity(self.cfg, self.networks, self.fingerprint)

    def _compile(self) -> None:
        blocks = runtime.repeated_blocks(self.objective) if self.cfg.compile == "blocks" else []
        if not blocks and hasattr(self.objective, "compile_networks"):
            self.objective.compile_networks()  # type: ignore[operator]
            return
        for module in blocks or self.networks.values():
            module.compile()

    def _save(self) -> None:
        """Checkpoint, snapshots and export: on the first rank while the others wait, or on all together."""
        cfg, main = self.cfg, self.accelerator.is_main_process
        self._snapshot()
        tensors = {name: network.state_dict() for name, network in self.networks.items()}
        tensors["optimizer"] = optim.optimizer_tensors(self.optimizers, self.parameters)
        for name, average in self.averages.items():
            tensors[name] = average.average
            if self.sharding is not None:
                tensors[name] = self.sharding.cut_as(average.average, self.parameters)
        state: dict[str, Any] = {"step": self.step, "samples": self.samples, "seconds": self.seconds}
        state |= {"joules": self.joules, "flops": self.flops}
        state |= self._identity() | {"guard": self.guard.state()}
        folder = checkpoint.step_folder(self.run_dir, self.step)
        if self.sharding is not None:
            self.sharding.save(folder, tensors, state)
        elif main:
            checkpoint.save(folder, tensors, state)
        self._export()
        if main:
            checkpoint.prune(self.run_dir, cfg.keep, self._decay_start())
        self._write_ledger()
        self.accelerator.wait_for_everyone()

    def _write_ledger(self) -> None:
        if self.accelerator.is_main_process:
            spent = {"kwh": self.joules / 3.6e6, "energy": self.energy.method, "skipped": self.guard.skipped}
            if self.flops is not None:
                spent["flops"] = self.flops
            self.log.ledger(self.step, self.samples, self.seconds, **spent)

    def _snapshot(self) -> None:
        """Keep the averages of several widths, from which `diffusionfm.ema` makes any other width later."""
        every, main = self.cfg.checkpoint_every, self.accelerator.is_main_process
        if len(self.averages) < 2 or not self._due(every):
            return
        for average in self.averages.values():
            tensors = average.average
            if self.sharding is not None:
                tensors = self.sharding.gathered(tensors, self.parameters, keep=main)
            if main:
                ema.write_snapshot(self.run_dir, self.step, average.sigma_rel, tensors)
        if main:
            ema.thin_snapshots(self.run_dir, self.step, every)

    def _export(self) -> None:
        """Write the averaged weights into the run folder, each file or folder whole or not at all."""
        with self._averaged() as main:
            if not main:
                return
            with checkpoint.writing(self.run_dir):
                if hasattr(self.objective, "export"):
                    self.objective.export(self.run_dir)  # type: ignore[operator]
                else:
                    checkpoint.export(self.run_dir, self.networks)

    def _leave(self) -> None:
        name = signal.Signals(self._signal).name
        self._say(f"stopped by {name} at step {self.step}, saved in {self.run_dir}; run again to go on")
        raise Interrupted(128 + self._signal)

    @contextmanager
    def _averaged(self) -> Iterator[bool]:
        """The averaged weights in place, eval mode, no gradients, uncompiled, whole; all undone afterwards.

        All ranks enter it. It yields whether this is the first of them, which alone may use the networks.
        """
        main = self.accelerator.is_main_process
        modes = {name: network.training for name, network in self.networks.items()}
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.averages:
                stack.enter_context(self.averages["ema"].swapped_in())
            if self.sharding is not None:
                stack.enter_context(self.sharding.whole(keep=main))
            if self.cfg.compile:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for network in self.networks.values():
                network.eval()
            try:
                yield main
            finally:
                for name, network in self.networks.items():
                    network.train(modes[name])

    def _sample(self) -> None:
        with self._averaged() as main:
            if main and self.on_sample is not None:
                (self.run_dir / "samples").mkdir(exist_ok=True)
                self.on_sample(self.step, self.networks)
        self.accelerator.wait_for_everyone()

    def _validate(self) -> dict[str, float]:
        result: dict[str, float] = {}
        with self._averaged() as main:
            if main and self.validate is not None:
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

"""Which checkpoint a run may go on from, and what has to be as it was."""

import functools
from pathlib import Path
from typing import Any

from torch import nn

from diffusionfm import checkpoint, optim
from diffusionfm.ema import widths_of
from diffusionfm.settings import TrainerConfig

NAMES = {
    "optimizer": "trainer.optimizer",
    "ema": "trainer.ema",
    "fingerprint": "the training data (its fingerprint)",
}


def identity(cfg: TrainerConfig, networks: dict[str, nn.Module], fingerprint: str | None) -> dict[str, Any]:
    """What a checkpoint tells of the run it belongs to, as JSON."""
    return {
        "steps": cfg.steps,
        "decay_start": optim.decay_start(cfg.steps, cfg.decay_fraction),
        "optimizer": cfg.optimizer,
        "ema": widths_of(cfg.ema),
        "fingerprint": fingerprint,
        "shapes": checkpoint.shapes(networks),
    }


def check_same(folder: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError unless a checkpoint's state and this run have the same networks, optimiser, averages and data.

    What either side does not tell is let pass: data need not have a fingerprint.
    """
    there, here = (sorted({name.partition("/")[0] for name in state["shapes"]}) for state in (then, now))
    words = checkpoint.differences(then["shapes"], now["shapes"])
    if there != here:
        words = f"it trained {', '.join(there)}, this config trains {', '.join(here)}"
    for key, name in NAMES.items():
        was, is_now = then.get(key), now[key]
        if None not in (was, is_now) and was != is_now:
            words = words or f"{name} is {is_now}, was {was}"
    if words:
        raise ValueError(
            f"{folder} is of another config: {words}; take another trainer.output_dir, or put it back as it was"
        )


def find(cfg: TrainerConfig) -> Path | None:
    """The checkpoint to go on from: the newest that is `usable`, else the newest of all; None without any.

    Going back gives up what came after. Only a run that has ended and is lengthened does so unasked, and with
    `trainer.discard` any other; else ValueError, and nothing is touched.
    """
    newest = checkpoint.latest(cfg.output_dir)
    if newest is None or usable(state := checkpoint.state_of(newest), cfg.steps):
        return newest
    stable = checkpoint.latest(cfg.output_dir, functools.partial(usable, steps=cfg.steps))
    if stable is None or cfg.discard or state["step"] >= state["steps"]:
        return stable or newest
    back = step_of(stable)
    lost = ", ".join(map(str, later(cfg.output_dir, back)))
    raise ValueError(
        f"{cfg.output_dir}: its learning rate has begun to fall towards step {state['steps']}. For trainer.steps="
        f"{cfg.steps} it would go back to step {back} and lose the checkpoints of steps {lost}. Put trainer.steps="
        f"{state['steps']} back, take another trainer.output_dir, or give them up with trainer.discard=true"
    )


def later(run_dir: str | Path, step: int) -> list[int]:
    """The steps of a run's checkpoints after `step`: what it gives up if it goes on from there."""
    return [known for known in map(step_of, checkpoint.listing(run_dir)) if known > step]


def step_of(folder: Path) -> int:
    """How many steps a checkpoint holds, by its name."""
    return int(folder.name.removeprefix("step_"))


def usable(state: dict[str, Any], steps: int) -> bool:
    """Whether going on from a checkpoint gives the run that `steps` from the start would have given.

    One whose learning rate had begun to fall towards another end does not; the one before that is kept. (For an
    earlier end that one comes close: the rate would have begun to fall sooner.)
    """
    return state["step"] >= steps or state["steps"] == steps or state["step"] <= state["decay_start"]

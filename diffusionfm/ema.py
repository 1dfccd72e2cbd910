"""Power-function averages of the weights, kept at several widths, and any width in between after the fact.

    python -m diffusionfm.ema runs/mine --width 0.07 --out runs/mine-0.07

An average of width sigma_rel weighs the parameters of time s <= t in proportion to s^gamma (EDM2, Karras et al. 2024,
arXiv:2312.02696). Snapshots of such averages, taken now and then in a run at two widths, span nearly every other
average of that run: `reconstruct` finds the mix whose profile is nearest in the least-squares sense.
"""

import argparse
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffusionfm import checkpoint
from diffusionfm.config import user_errors

MOST_SNAPSHOTS = 16  # of each width: half to all of them are there, evenly spaced over the run so far
HALF_MAX = 65504.0


class PowerEMA:
    """Power-function moving average of parameters, in fp32, of width `sigma_rel` (see `power_of_width`).

    parameters: name -> the tensor that training moves, read and written in place.
    """

    def __init__(self, parameters: Mapping[str, Tensor], sigma_rel: float) -> None:
        self.parameters, self.sigma_rel = parameters, sigma_rel
        self.gamma = power_of_width(sigma_rel)
        self.average = {name: p.detach().float().clone() for name, p in parameters.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the parameters after step number `step`, counted from 1."""
        beta = (1 - 1 / step) ** (self.gamma + 1)
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - beta)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back a saved average."""
        for name, value in self.average.items():
            value.copy_(tensors[name])

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """Let the parameters hold their average inside the `with` block, and their own values after it."""
        live = list(self.parameters.values())
        with torch.no_grad():
            own = [parameter.detach().clone() for parameter in live]
            torch._foreach_copy_(live, list(self.average.values()))
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(live, own)


def power_of_width(sigma_rel: float) -> float:
    """The exponent gamma whose profile t^gamma has relative standard deviation `sigma_rel` in (0, 0.2886)."""
    if not 0 < sigma_rel < 12**-0.5:
        raise ValueError(f"an EMA width must be above 0 and below 0.2886, as 0.1 is, got {sigma_rel}")
    inverse = sigma_rel**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def widths_of(setting: Any) -> list[float]:
    """The widths that `trainer.ema` asks for: none for 0, one for a number, several for a list of them.

    Raises ValueError for anything else, a width out of range and one named twice.
    """
    widths = list(setting) if isinstance(setting, (list, tuple)) else [setting] if setting else []
    for width in widths:
        if isinstance(width, bool) or not isinstance(width, (int, float)):
            raise ValueError(f"trainer.ema is a width as 0.1, a list of them or 0 for none, not {setting!r}")
        power_of_width(width)
    if len({f"{width:g}" for width in widths}) < len(widths):
        raise ValueError(f"trainer.ema={setting}: each width once")
    return [float(width) for width in widths]


# ---- snapshots ---------------------------------------------------------------------------------------------------


def snapshot_steps(step: int, every: int) -> set[int]:
    """The steps up to `step` whose snapshots are kept: multiples of `every`, then of twice it, and so on.

    There are never more than `MOST_SNAPSHOTS`, and once the run is that long, never fewer than half as many.
    """
    while step // every > MOST_SNAPSHOTS:
        every *= 2
    return set(range(every, step + 1, every))


def write_snapshot(run_dir: str | Path, step: int, width: float, average: Mapping[str, Tensor]) -> None:
    """Keep an average as half-precision safetensors under RUN/ema (fp32 where a value is too large for that)."""
    path = _folder(run_dir, width) / f"step_{step:08d}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    small = {name: v.half() if v.numel() and v.abs().max() < HALF_MAX else v for name, v in average.items()}
    checkpoint.write_weights(path, small)


def thin_snapshots(run_dir: str | Path, step: int, every: int) -> None:
    """Remove the snapshots that `snapshot_steps` leaves out, those after `step` included."""
    kept = snapshot_steps(step, every) | {step}
    for paths in snapshots(run_dir).values():
        for at, path in paths.items():
            if at not in kept:
                path.unlink()


def snapshots(run_dir: str | Path) -> dict[float, dict[int, Path]]:
    """The snapshots of a run: width -> step -> file."""
    found: dict[float, dict[int, Path]] = {}
    for path in sorted((Path(run_dir) / "ema").glob("width_*/step_*.safetensors")):
        match = re.fullmatch(
            r"width_([\d.e-]+)/step_(\d+)\.safetensors", path.relative_to(path.parents[1]).as_posix()
        )
        if match:
            found.setdefault(float(match[1]), {})[int(match[2])] = path
    return found


def _folder(run_dir: str | Path, width: float) -> Path:
    return Path(run_dir) / "ema" / f"width_{width:g}"


# ---- reconstruction ----------------------------------------------------------------------------------------------


def mix(have: list[tuple[float, int]], width: float, step: int) -> tuple[np.ndarray, float]:
    """How to mix averages of (width, step) into one of `width` at `step`: coefficients (n,) and what is missed.

    The second value is the distance left between the two profiles over the norm of the one asked for, 0 being exact.
    (EDM2, equation 4 and appendix C: inner products of power profiles in closed form, then least squares.)
    """
    gammas = np.array([power_of_width(w) for w, _ in have])
    times = np.array([at / step for _, at in have])
    gram = _inner(gammas[:, None], times[:, None], gammas[None], times[None])
    target = power_of_width(width)
    aim = _inner(gammas, times, np.float64(target), np.float64(1.0))
    norm = float(_inner(*(np.float64(x) for x in (target, 1.0, target, 1.0))))
    scale = 1 / np.sqrt(
        np.diag(gram)
    )  # profiles of unit norm: narrow and early ones count no more than others
    mixed, *_ = np.linalg.lstsq(gram * scale * scale[:, None], aim * scale, rcond=1e-12)
    coefficients = mixed * scale
    missed = norm - 2 * coefficients @ aim + coefficients @ gram @ coefficients
    return coefficients, float(np.sqrt(max(missed, 0.0) / norm))


def _inner(gamma_a: Any, time_a: Any, gamma_b: Any, time_b: Any) -> Any:
    """Integral of the product of two profiles (gamma + 1) s^gamma / t^(gamma + 1), each on 0 <= s <= t."""
    early = np.minimum(time_a, time_b)
    powers = (early / time_a) ** gamma_a * (early / time_b) ** gamma_b * early / (time_a * time_b)
    return (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1) * powers


def reconstruct(
    run_dir: str | Path, width: float, step: int | None = None
) -> tuple[dict[str, Tensor], float]:
    """The average of `width` at `step` (the last snapshot's by default) that a run did not keep.

    Returns (`network/parameter` -> fp32 tensor, the share of the profile that the snapshots miss; see `mix`).
    Raises ValueError for a width that cannot be, a run without snapshots, and a step that is not among them.
    """
    power_of_width(width)
    found = snapshots(run_dir)
    steps = sorted({at for paths in found.values() for at in paths})
    if not steps:
        raise ValueError(
            f"{run_dir} keeps no snapshots of averages: train with two widths, as trainer.ema=[0.05,0.1]"
        )
    step = steps[-1] if step is None else step
    if step not in steps:
        raise ValueError(f"{run_dir} has no snapshot at step {step}; there are {', '.join(map(str, steps))}")
    have = [(w, at) for w, paths in sorted(found.items()) for at in sorted(paths) if at <= step]
    coefficients, missed = mix(have, width, step)
    total: dict[str, Tensor] = {}
    for (w, at), coefficient in zip(have, coefficients.tolist(), strict=True):
        _add(total, found[w][at], coefficient)
    return {name: value.float() for name, value in total.items()}, missed


def _add(total: dict[str, Tensor], path: Path, coefficient: float) -> None:
    with checkpoint.reading(path), safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if total and names != total.keys():
            odd = sorted(names ^ total.keys())
            raise ValueError(
                f"{path} holds other parameters than the snapshots before it: {odd[0]}; remove it"
            )
        for name in names:
            value = file.get_tensor(name).double() * coefficient
            total[name] = total[name] + value if name in total else value


def write_like(run_dir: str | Path, out: str | Path, averages: dict[str, Tensor]) -> list[Path]:
    """Write `out` as the run folder's export with these averages in it; returns the weight files written.

    Each NAME.safetensors, and NAME/ where the run has one, can be loaded and warm-started from as the run's own.
    """
    run, out, written = Path(run_dir), Path(out), []
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} is there already: choose a new or an empty folder")
    for network in sorted({name.partition("/")[0] for name in averages}):
        if not (run / f"{network}.safetensors").is_file():
            raise ValueError(
                f"{run} has no {network}.safetensors to put the average into: let the run end first"
            )
        with checkpoint.reading(run / f"{network}.safetensors"):
            whole = load_file(run / f"{network}.safetensors")
        own = {key: averages[f"{network}/{key}"] for key in whole if f"{network}/{key}" in averages}
        for key in whole.keys() - own.keys():  # buffers and frozen weights stay; tied ones follow their twin
            twin = (
                k for k in own if whole[k].shape == whole[key].shape and torch.equal(whole[k], whole[key])
            )
            whole[key] = own.get(next(twin, ""), whole[key])
        whole |= own
        out.mkdir(parents=True, exist_ok=True)
        checkpoint.write_weights(out / f"{network}.safetensors", whole)
        written.append(out / f"{network}.safetensors")
        for file in sorted((run / network).glob("*.safetensors")):
            shutil.copytree(
                run / network,
                out / network,
                ignore=shutil.ignore_patterns("*.safetensors"),
                dirs_exist_ok=True,
            )
            with safe_open(file, framework="pt") as old:
                part = {key: whole[key] for key in old.keys()}  # noqa: SIM118, not a dict
            checkpoint.write_weights(out / network / file.name, part)
            written.append(out / network / file.name)
    return written


def main(argv: list[str] | None = None) -> None:
    """Reconstruct an average of a run at any width and write it as the run's own export is written."""
    parser = argparse.ArgumentParser(prog="python -m diffusionfm.ema", description=main.__doc__)
    parser.add_argument("run", help="a run folder trained with two widths, as trainer.ema=[0.05,0.1]")
    parser.add_argument("--width", type=float, required=True, help="sigma_rel of the average, 0.01 to 0.28")
    parser.add_argument(
        "--step", type=int, help="the step to reconstruct it at; the last snapshot's by default"
    )
    parser.add_argument("--out", required=True, help="a new folder for the weights")
    args = parser.parse_args(argv)
    with user_errors():
        averages, missed = reconstruct(args.run, args.width, args.step)
        for path in write_like(args.run, args.out, averages):
            print(path)
    print(f"width {args.width:g}: the snapshots miss {missed:.2%} of its profile")


if __name__ == "__main__":
    main()

"""Flow-matching maths, shared by training and sampling: times, grids, interpolation, guidance, the sampler.

One convention everywhere: t in [0, 1] and 1 is noise,

    x_t = (1 - t) x0 + t e,    v = dx_t / dt = e - x0    (arXiv:2210.02747, arXiv:2209.03003)

Everything here is a pure function. b is the batch; a time is (b,) in training, a scalar tensor in sampling, or (b,)
where pictures at different times share a call.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

VelocityFn = Callable[[Tensor, Tensor], Tensor]  # (x, t) -> v
OnStep = Callable[[int, int, Tensor, Tensor], object]  # (step, total, x, v), after the step along v to x


# ---- the path --------------------------------------------------------------------------------------------


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t = (1 - t) x0 + t e, with t (b,) or scalar beside x0 and noise (b, ...)."""
    t = _beside(t, x0)
    return (1 - t) * x0 + t * noise


def velocity(x0: Tensor, noise: Tensor) -> Tensor:
    """The training target v = e - x0, constant along each straight path."""
    return noise - x0


def denoised(x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """The estimate of x0 that a velocity implies: x_t - t v."""
    return x - _beside(t, x) * v


def implied_noise(x: Tensor, t: Tensor, v: Tensor) -> Tensor:
    """The estimate of the noise that a velocity implies: x_t + (1 - t) v."""
    return x + (1 - _beside(t, x)) * v


# ---- times -----------------------------------------------------------------------------------------------


def shift_time(t: Tensor, shift: float) -> Tensor:
    """Move times towards noise: s t / (1 + (s - 1) t), the identity at s = 1 (SD3, arXiv:2403.03206)."""
    return shift * t / (1 + (shift - 1) * t)


def shift_for_tokens(tokens: int, base_tokens: int, base_shift: float = 1.0) -> float:
    """The shift at which `tokens` tokens are as uncertain as `base_tokens` are at `base_shift` (SD3, section 5.3.2).

    More pixels of one picture average more noise away, so the same t hides less: base_shift sqrt(tokens / base_tokens)
    makes up for it. For training times and sampling grids alike. ValueError unless all are positive.
    """
    if min(tokens, base_tokens) < 1 or base_shift <= 0:
        raise ValueError(
            f"tokens, base_tokens and base_shift are positive, not {tokens}, {base_tokens} and {base_shift}"
        )
    return base_shift * math.sqrt(tokens / base_tokens)


def sample_times(
    n: int,
    generator: torch.Generator | None = None,
    *,
    mean: float = 0.0,
    std: float = 1.0,
    uniform_fraction: float = 0.1,
    shift: float = 1.0,
) -> Tensor:
    """Draw n training times, (n,) float32 on the CPU.

    The density is logit-normal(mean, std) (SD3, section 3.1) mixed with `uniform_fraction` of the uniform
    one, so that both ends keep being trained, then shifted. The draws are evenly spaced quantiles behind one
    random offset: each has exactly that density and together they cover it, so the loss varies less from
    batch to batch (VDM, arXiv:2107.00630, I.1).
    """
    offset = torch.rand((), generator=generator, dtype=torch.float64)
    quantile = (torch.arange(n, dtype=torch.float64) / n + offset) % 1
    uniform = quantile / max(uniform_fraction, 1e-12)
    rest = (quantile - uniform_fraction).clamp(min=0) / max(1 - uniform_fraction, 1e-12)
    t = torch.where(
        quantile < uniform_fraction, uniform, torch.sigmoid(mean + std * torch.special.ndtri(rest))
    )
    return shift_time(t, shift).float()


def grid(steps: int, shift: float = 1.0, strength: float = 1.0) -> Tensor:
    """The sampling times: (n + 1,) float32 falling to 0, from 1 where strength is 1, in n = steps steps.

    strength in (0, 1]: the share of the way from noise that is gone, for a picture that noise covers in part
    (SDEdit, arXiv:2108.01073), in as large a share of the steps, rounded up. The whole grid equals the sigmas of
    diffusers' `FlowMatchEulerDiscreteScheduler(shift=shift)` after
    `set_timesteps(sigmas=linspace(1, 1 / steps, steps))`.
    """
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}")
    n = math.ceil(round(steps * strength, 6))
    return shift_time(torch.linspace(strength, 0, n + 1, dtype=torch.float64), shift).float()


# ---- guidance --------------------------------------------------------------------------------------------


def guided(cond: Tensor, uncond: Tensor, scale: float | Tensor) -> Tensor:
    """Classifier-free guidance, uncond + scale (cond - uncond): 1 is cond, 0 is uncond (arXiv:2207.12598).

    scale: one for all, or (b,) beside cond and uncond (b, ...).
    """
    return torch.lerp(uncond, cond, _beside(scale, cond) if isinstance(scale, Tensor) else scale)


# ---- known parts -----------------------------------------------------------------------------------------


def held(velocity_fn: VelocityFn, known: Tensor, free: Tensor) -> VelocityFn:
    """The field where `free` is 1, and the velocity `known` where it is 0, both as x: inpainting.

    The path of what is known is the straight line v = e - x0, so a sampler that set out on it stays on it, and what
    is drawn beside it sees at every time what training showed: known parts under as much noise as the rest.
    """

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return torch.lerp(known, velocity_fn(x, t), free)

    return velocity


# ---- the sampler -----------------------------------------------------------------------------------------


def advance(x: Tensor, v: Tensor, t: Tensor, until: Tensor) -> Tensor:
    """x (b, ...) moved along v from time t to time `until`, each scalar or (b,)."""
    return x + _beside(until - t, x) * v


def euler(velocity_fn: VelocityFn, x: Tensor, times: Tensor, on_step: OnStep | None = None) -> Tensor:
    """Integrate dx/dt = v from times[0] to times[-1], one evaluation a step.

    After step i = 1..total, `on_step(i, total, x, v)` sees x at times[i]; `denoised(x, times[i], v)` is then
    the preview. To stop early, raise from it.
    """
    total = len(times) - 1
    for i in range(total):
        v = velocity_fn(x, times[i])
        x = advance(x, v, times[i], times[i + 1])
        if on_step is not None:
            on_step(i + 1, total, x, v)
    return x


def _beside(t: Tensor, x: Tensor) -> Tensor:
    """t (b,) with the trailing axes that let it broadcast against x (b, ...); a scalar already does."""
    return t.to(x).reshape(t.shape + (1,) * (x.ndim - t.ndim if t.ndim else 0))

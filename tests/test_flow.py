"""Flow matching: the path, the times, agreement with diffusers' scheduler, the order of the samplers."""

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffusionfm import flow


def test_interpolation_ends_at_data_and_noise_and_velocity_leads_back():
    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.0, 0.3, 1.0])
    x = flow.interpolate(x0, noise, t)
    assert torch.equal(x[0], x0[0]) and torch.equal(x[2], noise[2])
    torch.testing.assert_close(flow.denoised(x, t, flow.velocity(x0, noise)), x0)


@pytest.mark.parametrize("steps", [1, 2, 20, 50])
@pytest.mark.parametrize("shift", [0.5, 1.0, 3.0])
def test_grid_equals_the_schedulers_sigmas(steps, shift):
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1, 1 / steps, steps))
    grid = flow.grid(steps, shift)
    torch.testing.assert_close(grid, scheduler.sigmas, rtol=1e-6, atol=1e-7)
    assert grid[0] == 1 and grid[-1] == 0 and (grid.diff() < 0).all()


def test_the_shift_for_more_tokens_keeps_the_uncertainty():
    """The mean of a k x k patch of one value under noise has k times less noise: SD3's equation 22 and 23."""
    assert flow.shift_for_tokens(256, 256, 2.5) == 2.5
    assert flow.shift_for_tokens(4096, 256, 3.0) == pytest.approx(12.0)
    assert flow.shift_for_tokens(64, 256) == pytest.approx(0.5)
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    finer = flow.shift_time(t, flow.shift_for_tokens(1024, 64))
    torch.testing.assert_close(finer / (1 - finer) / 4, t / (1 - t))


@pytest.mark.parametrize("given", [(0, 64, 1.0), (64, 0, 1.0), (64, 64, 0.0)])
def test_a_shift_for_nothing_is_a_user_error(given):
    with pytest.raises(ValueError, match="positive"):
        flow.shift_for_tokens(*given)


def test_no_steps_is_a_user_error():
    with pytest.raises(ValueError, match="steps"):
        flow.grid(0)


def test_sample_times_follow_the_mixture():
    t = flow.sample_times(20_000, torch.Generator().manual_seed(0), mean=0.4, std=0.8, uniform_fraction=0.25)
    assert t.dtype == torch.float32 and t.min() >= 0 and t.max() <= 1
    for point in (0.1, 0.5, 0.9):
        normal = 0.5 * (1 + math.erf((math.log(point / (1 - point)) - 0.4) / (0.8 * math.sqrt(2))))
        assert abs((t <= point).double().mean() - (0.25 * point + 0.75 * normal)) < 2e-3


def test_one_time_at_a_time_has_the_same_density():
    generator = torch.Generator().manual_seed(0)
    t = torch.cat([flow.sample_times(1, generator, uniform_fraction=1.0) for _ in range(4000)])
    assert abs(t.mean() - 0.5) < 0.02 and abs(t.var() - 1 / 12) < 0.01


@pytest.mark.parametrize("uniform_fraction", [0.0, 0.1, 1.0])
def test_sample_times_are_finite_and_repeatable(uniform_fraction):
    draws = [
        flow.sample_times(64, torch.Generator().manual_seed(5), uniform_fraction=uniform_fraction, shift=2.0)
        for _ in range(2)
    ]
    assert torch.equal(*draws) and draws[0].isfinite().all()
    assert draws[0].min() >= 0 and draws[0].max() <= 1


def test_guidance():
    cond, uncond = torch.randn(2, 3), torch.randn(2, 3)
    torch.testing.assert_close(flow.guided(cond, uncond, 1.0), cond)
    torch.testing.assert_close(flow.guided(cond, uncond, 4.0), uncond + 4 * (cond - uncond))
    each = flow.guided(cond, uncond, torch.tensor([4.0, 1.0]))
    assert torch.equal(each[0], flow.guided(cond, uncond, 4.0)[0]) and torch.equal(each[1], cond[1])


def test_euler_reaches_the_data_of_straight_paths_in_one_step():
    x0, noise = torch.randn(2, 4), torch.randn(2, 4)
    torch.testing.assert_close(flow.euler(lambda x, t: noise - x0, noise, flow.grid(1)), x0)


def test_pictures_at_different_times_advance_together():
    x, v, times = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), flow.grid(5)
    together = flow.advance(x, v, times[[0, 3]], times[[1, 4]])
    assert torch.equal(together[0], flow.advance(x, v, times[0], times[1])[0])
    assert torch.equal(together[1], flow.advance(x, v, times[3], times[4])[1])


def test_euler_is_first_order():
    # Data N(0, s^2): x_t has variance a(t) = (1-t)^2 s^2 + t^2 and v = a'(t) / (2 a(t)) x, so x_0 = s x_1.
    s = 0.5

    def velocity(x, t):
        return (t - (1 - t) * s**2) / ((1 - t) ** 2 * s**2 + t**2) * x

    x = torch.ones(1, dtype=torch.float64)
    error = {n: abs(flow.euler(velocity, x, flow.grid(n).double()) - s).item() for n in (16, 32, 64)}
    assert 1.7 < error[16] / error[32] < 2.3 and 1.7 < error[32] / error[64] < 2.3


def test_on_step_counts_previews_and_can_stop():
    x0, noise, times, seen = torch.randn(1, 4), torch.randn(1, 4), flow.grid(4, shift=2.0), []

    def on_step(step, total, x, v):
        torch.testing.assert_close(flow.denoised(x, times[step], v), x0)
        seen.append((step, total))
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flow.euler(lambda x, t: noise - x0, noise, times, on_step)
    assert seen == [(1, 4), (2, 4), (3, 4)]

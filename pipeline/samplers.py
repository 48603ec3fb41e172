"""Samplers: from noise to clean latents in n steps, for every noise process and prediction.

A process x = alpha x_0 + sigma e, divided by alpha + sigma, is y = (1 - t) x_0 + t e with t = sigma / (alpha + sigma).
In these units every process is flow matching, and one formula of each sampler serves all. The noise levels `t` fall to
t[n] = 0. `predict(y, i)` returns the clean latents x_0 that the model expects at t[i]; it is never called for t[n]. The
samplers do not depend on the network, and read no value back from the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor

Predict = Callable[[Tensor, int], Tensor]


def log_snr(t: float) -> float:
    """Return lambda = log(alpha / sigma) = log((1 - t) / t): infinite at t = 0, minus infinite at t = 1."""
    if t in (0, 1):
        return math.inf if t == 0 else -math.inf
    return math.log((1 - t) / t)


def euler(
    predict: Callable[[Tensor, int], tuple[Tensor, Tensor]],
    y: Tensor,
    t: Sequence[float],
    *,
    eta: float = 0.0,
    draw: Callable[[], Tensor],
) -> Tensor:
    """Sample with Euler's method, which is DDIM (Song et al. 2021, equation 12); 1 evaluation per step, order 1.

    A share of the noise is replaced in each step: none for `eta` 0, and for 1 as much as in DDPM with the smaller
    variance (Ho et al. 2020), which is also Euler's ancestral sampler. `draw` returns standard normal noise like `y`.
    `predict` returns x_0 and the estimate of x_0 from which the noise in `y` is computed, which differs for CFG++.
    """
    for i, (now, then) in enumerate(pairwise(t)):
        clean, of_noise = predict(y, i)
        ratio = then * (1 - now) / ((1 - then) * now)  # of sigma / alpha after the step to that before it
        fresh = eta * then * math.sqrt(1 - ratio**2)
        kept = math.sqrt(then**2 - fresh**2) / now
        y = kept * y + ((1 - then) * clean - kept * (1 - now) * of_noise)
        if fresh:
            y = y + fresh * draw()
    return y


def heun(predict: Predict, y: Tensor, t: Sequence[float]) -> Tensor:
    """Sample with Heun's method (Karras et al. 2022, algorithm 1); 2 evaluations per step, 1 in the last, order 2."""
    for i, (now, then) in enumerate(pairwise(t)):
        slope = (y - predict(y, i)) / now  # dy / dt = e - x_0
        ahead = y + (then - now) * slope
        if then:
            slope = (slope + (ahead - predict(ahead, i + 1)) / then) / 2
            ahead = y + (then - now) * slope
        y = ahead
    return y


def dpm_solver(predict: Predict, y: Tensor, t: Sequence[float], *, correct: bool = False) -> Tensor:
    """Sample with DPM-Solver++ 2M (Lu et al. 2022, algorithm 2): 1 evaluation per step, order 2.

    With `correct` this is UniPC-2 (Zhao et al. 2023, algorithm 1, B(h) = exp(h) - 1), which corrects each point with
    the model's output there: order 3 without further evaluations.
    """
    before: list[Tensor] = []  # x_0 at the last two points
    steps: list[float] = []  # the lengths in lambda of the last two steps
    start = y  # where the last step began
    for i, (now, then) in enumerate(pairwise(t)):
        clean = predict(y, i)
        if correct and before:
            y = _corrected(start, clean, before, steps, t[i - 1], now)
        start, step = y, log_snr(then) - log_snr(now)
        slope = (clean - before[-1]) / (2 * steps[-1] / step) if before and then else 0.0
        y = (then / now) * y - ((1 - then) * math.expm1(-step)) * (clean + slope)
        before, steps = [*before[-1:], clean], [*steps[-1:], step]
    return y


def _corrected(
    start: Tensor, clean: Tensor, before: list[Tensor], steps: list[float], last: float, now: float
) -> Tensor:
    """Return UniC's correction (Zhao et al. 2023, equation 9) of the point at t = `now`, where x_0 is `clean`."""
    step, change = steps[-1], clean - before[-1]
    growth = -math.expm1(-step)  # B(h), as all coefficients here for predicting x_0
    if len(before) == 1:
        bend = 0.5 * change
    else:
        ratio = -steps[-2] / step  # the point before lies at this multiple of the step
        first = (1 - growth / step) / growth
        second = (1 - 2 * (1 - growth / step) / step) / growth
        weight = (second - first) / (ratio - 1)
        bend = weight * (before[-2] - before[-1]) / ratio + (first - weight) * change
    return (now / last) * start + ((1 - now) * growth) * (before[-1] + bend)

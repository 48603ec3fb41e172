"""Optimizers and their parameter groups, learning-rate schedules, gradient clipping, and the guard against NaN."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

from pipeline.muon import Muon

STATE = {AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}  # optimizer state per parameter
_UNDECAYED = ("positions", "classes", "uncertainty")  # embedding tables and the weights of the loss
_ENDS = ("conv_in", "conv_out")  # first and last layer: Muon would update their few latent channels all alike
_CONDITION = ("time", "modulation")  # layers of timestep and class: so wide that they took half of Muon's time


def make_optimizers(
    module: nn.Module, *, kind: str, lr: float, betas: tuple[float, float], weight_decay: float
) -> list[Optimizer]:
    """Create AdamW for all parameters or, with `kind` muon, Muon for matrices and kernels and AdamW for the rest.

    Weight decay applies to linear layers and kernels, not to biases, norms, positions and class embeddings. With muon,
    AdamW also trains the timestep and class layers, and the first and the last convolution, as Jordan 2024 advises.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = {n: p for n, p in named if p.ndim >= 2 and not any(part in _UNDECAYED for part in n.split("."))}
    left = _ENDS + _CONDITION
    inner = {n: p for n, p in decayed.items() if kind == "muon" and not any(part in left for part in n.split("."))}
    others = [p for n, p in decayed.items() if n not in inner]
    rest = [p for n, p in named if n not in decayed]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizers: list[Optimizer] = [AdamW(groups, lr=lr, betas=betas, fused=True)]
    if inner:
        optimizers.append(Muon(inner.values(), lr=lr, weight_decay=weight_decay))
    return optimizers


def set_lr(optimizers: list[Optimizer], lr: float) -> None:
    """Set the learning rate of all parameter groups."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def lr_at(images_seen: int, *, schedule: str, peak: float, images: int, warmup: int, decay: float) -> float:
    """Return the learning rate of the step that begins at `images_seen`: a linear warm-up, and then the schedule.

    constant: `peak`; cosine: half a cosine from `peak` after the warm-up to 0 at `images` (Loshchilov and Hutter 2017,
    equation 5); trapezoid: `peak`, then linear decay to 0 over the last fraction `decay` of the run; inverse_sqrt:
    `peak` times the square root of `warmup` / images seen (Vaswani et al. 2017, equation 3).
    """
    rise = (images_seen + 1) / warmup if warmup else 1.0
    match schedule:
        case "cosine":
            progress = (images_seen - warmup) / max(images - warmup, 1)
            fall = (1 + math.cos(math.pi * min(max(progress, 0.0), 1.0))) / 2
        case "trapezoid":
            fall = (images - images_seen) / (decay * images) if decay else 1.0
        case "inverse_sqrt":
            fall = math.sqrt(warmup / max(images_seen, 1))
        case _:
            fall = 1.0
    return peak * max(0.0, min(1.0, rise, fall))


def lr_breakpoints(
    images_seen: int, *, schedule: str, peak: float, images: int, warmup: int, decay: float
) -> list[tuple[int, float]]:
    """Return (images seen, learning rate) at `images_seen`, at the end of the run, and where the schedule changes slope
    in between."""
    bends = [warmup] + [int(images * (1 - decay))] * (schedule == "trapezoid")
    places = [images_seen, *sorted(bend for bend in set(bends) if images_seen < bend < images), images]
    rate = partial(lr_at, schedule=schedule, peak=peak, images=images, warmup=warmup, decay=decay)
    return [(place, rate(place)) for place in places]


def clip_gradients(optimizers: list[Optimizer], limit: float, *, in_step: bool) -> Tensor:
    """Clip the gradient to the norm `limit` for the next step; return its norm over all parameters before clipping.

    `in_step`: if fused AdamW is the only optimizer, it divides the gradient while it reads it, which saves a pass over
    memory. Not possible with GradScaler, which uses the same division.
    """
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if in_step and len(optimizers) == 1:
        optimizers[0].grad_scale = (norm / limit).clamp(min=1)  # type: ignore[attr-defined]
    else:
        clip_grads_with_norm_(parameters, limit, norm)
    return norm


class FiniteGuard:
    """Prevents weight updates from a gradient that is NaN or infinite, and remembers the step.

    `deferred`: a tensor on the device (`found_inf`) makes the optimizers skip that step and all later ones, so that no
    step has to wait for the device; the host checks later. Otherwise the host checks before each update.
    """

    def __init__(self, device: torch.device, *, deferred: bool) -> None:
        self.deferred = deferred
        self._first_bad = torch.full((), -1, device=device)

    def check(self, step: int, value: Tensor, optimizers: list[Optimizer]) -> int | None:
        """Check the gradient norm or the loss (`value`) before the update of `step`.

        Returns the first step that was not finite, or None if all were finite or if the check is deferred.
        """
        bad = (self._first_bad < 0) & ~value.isfinite()
        self._first_bad = torch.where(bad, step, self._first_bad)
        if not self.deferred:
            return self.bad_step()
        for optimizer in optimizers:
            optimizer.found_inf = (self._first_bad >= 0).float()  # type: ignore[attr-defined]
        return None

    def bad_step(self) -> int | None:
        """Return the first step whose gradient was not finite, or None; this waits for the device."""
        step = int(self._first_bad)
        return None if step < 0 else step

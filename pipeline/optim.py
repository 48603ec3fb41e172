"""How weights move: the optimizers, their groups of parameters, and the learning rate as a function of images seen."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import AdamW, Optimizer

from pipeline.muon import Muon

STATE = {AdamW: ("step", "exp_avg", "exp_avg_sq"), Muon: ("momentum_buffer",)}  # what each keeps of a parameter
_UNDECAYED = ("positions", "classes", "uncertainty")  # tables and the loss's own weights
_ENDS = ("conv_in", "conv_out")  # between latents and features: of few channels, which Muon would all move alike
_CONDITION = ("time", "modulation")  # the layers on timestep and class: square and wide, half of Muon's time


def make_optimizers(
    module: nn.Module, *, kind: str, lr: float, betas: tuple[float, float], weight_decay: float
) -> list[Optimizer]:
    """AdamW for all parameters; with `kind` muon, Muon for matrices and kernels and AdamW for the rest.

    Weights of linear layers and kernels decay; biases, norms, positions and class embeddings do not. The first and the
    last convolution are AdamW's in both cases, as Jordan 2024 advises.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    decayed = {n: p for n, p in named if p.ndim >= 2 and not any(part in _UNDECAYED for part in n.split("."))}
    left = _ENDS + (_CONDITION if kind == "muon" else ())
    inner = {n: p for n, p in decayed.items() if kind != "adamw" and not any(part in left for part in n.split("."))}
    others = [p for n, p in decayed.items() if n not in inner]
    rest = [p for n, p in named if n not in decayed]
    groups = [{"params": others, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
    optimizers: list[Optimizer] = [AdamW(groups, lr=lr, betas=betas, fused=True)]
    if inner:
        optimizers.append(Muon(inner.values(), lr=lr, weight_decay=weight_decay))
    return optimizers


def set_lr(optimizers: list[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def lr_at(images_seen: int, *, schedule: str, peak: float, images: int, warmup: int, decay: float) -> float:
    """The learning rate of a step that begins at `images_seen`: up over `warmup` images, and then

    constant: `peak`; cosine: half a cosine from `peak` after the warm-up to 0 at `images` (Loshchilov and Hutter 2017,
    equation 5); trapezoid: `peak`, and straight down to 0 over the last share `decay` of the run; inverse_sqrt:
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


def lr_course(
    images_seen: int, *, schedule: str, peak: float, images: int, warmup: int, decay: float
) -> list[tuple[int, float]]:
    """The learning rate from `images_seen` to the end of the run: (images seen, rate) there, at both ends and where the
    schedule bends between them."""
    bends = [warmup] + [int(images * (1 - decay))] * (schedule == "trapezoid")
    places = [images_seen, *sorted(bend for bend in set(bends) if images_seen < bend < images), images]
    rate = partial(lr_at, schedule=schedule, peak=peak, images=images, warmup=warmup, decay=decay)
    return [(place, rate(place)) for place in places]


def clip_gradients(optimizers: list[Optimizer], limit: float, *, in_step: bool) -> Tensor:
    """The norm of the gradient of all parameters; the step to come sees it scaled down to `limit` where it is longer.

    `in_step`: where fused AdamW is the only optimizer, it divides the gradient as it reads it, which saves a pass over
    memory. Not where GradScaler tells it what to divide by.
    """
    parameters = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if in_step and len(optimizers) == 1:
        optimizers[0].grad_scale = (norm / limit).clamp(min=1)  # type: ignore[attr-defined]
    else:
        clip_grads_with_norm_(parameters, limit, norm)
    return norm


class FiniteGuard:
    """Keeps a step whose gradient is NaN or infinite from changing any weight, and remembers which step it was.

    `deferred`: the optimizers are told on the device to skip that step and all that follow (`found_inf`), so that the
    host learns of it later without ever having made the device wait. Otherwise the host asks before each update.
    """

    def __init__(self, device: torch.device, *, deferred: bool) -> None:
        self.deferred = deferred
        self._first_bad = torch.full((), -1, device=device)

    def check(self, step: int, value: Tensor, optimizers: list[Optimizer]) -> int | None:
        """Before the update of `step`, with its gradient's norm or its loss: as `bad_step`, or None if deferred."""
        bad = (self._first_bad < 0) & ~value.isfinite()
        self._first_bad = torch.where(bad, step, self._first_bad)
        if not self.deferred:
            return self.bad_step()
        for optimizer in optimizers:
            optimizer.found_inf = (self._first_bad >= 0).float()  # type: ignore[attr-defined]
        return None

    def bad_step(self) -> int | None:
        """The first step whose gradient was not finite; this waits for the device."""
        step = int(self._first_bad)
        return None if step < 0 else step

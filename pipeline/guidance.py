"""Guidance: combine the predictions of a model with those of a weaker one, itself without classes or another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pipeline.compatibility import STEPS
from pipeline.noise import Level, NoiseProcess

if TYPE_CHECKING:
    from pipeline.unet import LatentUNet

# on a CPU, a network is always called with this many images: the rounding of a matrix product depends on its size, and
# with AVX2 and 32 images also on the place of an image among them
CPU_ROWS = 32 if torch.backends.cpu.get_cpu_capability() == "AVX512" else 16
# the usual ones of adaptive projected guidance: momentum -0.5, and a norm of at most 5 for latents of 4x32x32 values
APG_MOMENTUM, APG_NORM = -0.5, 5 / math.sqrt(4096)


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Describes how two predictions are combined: D + (scale - 1) (D - D_weak), where D_weak has no class.

    This is Ho and Salimans 2021, equation 6, with scale = 1 + w. Scale 1 is the model with classes, but for cfg++.

    `form`: cfg, as above; apg removes from D - D_weak what is parallel to D, limits its norm and gives it a negative
    momentum, on clean latents (Sadat et al. 2025); cfg_zero scales the weak velocity to fit and does not move in the
    first step (Fan et al. 2025); cfg++ computes the remaining noise from the weak prediction (Chung et al. 2025).
    `schedule` changes scale - 1 over time t (1 at pure noise), with the same mean: constant, linear: 2 (1 - t), or
    cosine: 1 + cos(pi t) (Wang et al. 2024). Outside `interval`, of noise levels sigma / alpha, there is no guidance
    (Kynkäänniemi et al. 2024). `rescale` in 0..1 moves the standard deviation of a sample's guided prediction to that
    of D (Lin et al. 2024, section 3.4).
    """

    form: str = "cfg"
    schedule: str = "constant"
    interval: tuple[float, float] | None = None
    rescale: float = 0.0

    def weight(self, level: Level) -> float | None:
        """Return the factor of scale - 1 at a noise level; None outside the interval."""
        if self.interval:
            low, high = self.interval
            if not low * level.alpha < level.sigma <= high * level.alpha:  # sigma / alpha may be infinite
                return None
        t = level.timestep / STEPS
        return {"constant": 1.0, "linear": 2 * (1 - t), "cosine": 1 + math.cos(math.pi * t)}[self.schedule]


class GuidedModel:
    """Predicts the clean latents of one batch in one sampling run, with guidance.

    `labels` int64 `B` and `scales`, `B` numbers, belong to its samples. The weak prediction is that of `guide` for the
    same classes or, without a guide, that of the model for the null class, computed in the same batch, and only for
    samples whose scale is not 1; cfg++ takes the noise from it at every scale. Scale 0 without a guide is the model for
    the null class alone, in any schedule.
    The networks run under autocast to `half` if it is given; all else is float32. On one thread of a CPU, a sample has
    the same bits whatever else is in its batch.
    """

    def __init__(
        self,
        model: LatentUNet,
        noise: NoiseProcess,
        labels: Tensor,
        scales: Sequence[float],
        guidance: Guidance | None = None,
        *,
        guide: LatentUNet | None = None,
        half: torch.dtype | None = None,
    ) -> None:
        self._model, self._noise, self._guide, self._half = model, noise, guide, half
        self._guidance = guidance or Guidance()
        self._labels, self._null = labels, torch.full_like(labels, model.null_class)
        if not guide:
            unconditional = torch.tensor([scale == 0 for scale in scales], device=labels.device)
            self._labels, scales = torch.where(unconditional, self._null, labels), [scale or 1.0 for scale in scales]
        extra = torch.tensor(scales, device=labels.device)[:, None, None, None] - 1
        guided = [i for i, scale in enumerate(scales) if scale != 1 or self._guidance.form == "cfg++"]
        self._guided = slice(None) if len(guided) == len(scales) else torch.tensor(guided, device=labels.device)
        self._extra = extra[self._guided] if guided else None
        self._update: Tensor | None = None  # APG's, with momentum
        self._first = True

    def __call__(self, x: Tensor, timestep: Tensor, level: Level) -> tuple[Tensor, Tensor]:
        """Return two estimates of x_0 from noisy latents `B C h w`: the guided one, and that which the remaining noise
        is computed from; they differ for cfg++ only. `timestep` is that of `level`, as a tensor on the device."""
        weight, first, self._first = self._guidance.weight(level), self._first, False
        if self._extra is None or weight is None:
            clean = self._noise.clean(x, self._predict(self._model, x, timestep, self._labels), level)
            return clean, clean
        rows = self._guided
        strong, weak = self._both(x, timestep, rows)
        guided, weak = self._combine(x[rows], strong[rows], weak, weight * self._extra, level, first=first)
        if isinstance(rows, slice):
            return guided, weak if self._guidance.form == "cfg++" else guided
        clean = self._noise.clean(x, strong, level)
        both = clean.index_copy(0, rows, guided)
        return both, clean.index_copy(0, rows, weak) if self._guidance.form == "cfg++" else both

    def _both(self, x: Tensor, timestep: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor]:
        """Return the predictions of all samples and the weak ones of those in `rows`."""
        if self._guide is not None:
            strong = self._predict(self._model, x, timestep, self._labels)
            return strong, self._predict(self._guide, x[rows], timestep, self._labels[rows])
        labels = torch.cat([self._labels, self._null[rows]])
        both = self._predict(self._model, torch.cat([x, x[rows]]), timestep, labels)
        return both[: len(x)], both[len(x) :]

    def _predict(self, model: LatentUNet, x: Tensor, timestep: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast(x.device.type, self._half, enabled=self._half is not None):
            if x.device.type != "cpu":
                return model(x, timestep, labels).sample.float()
            count, missing = len(x), -len(x) % CPU_ROWS
            x, labels = (
                torch.cat([x, x[:1].expand(missing, -1, -1, -1)]),
                torch.cat([labels, labels[:1].expand(missing)]),
            )
            parts = zip(x.split(CPU_ROWS), labels.split(CPU_ROWS), strict=True)
            return torch.cat([model(part, timestep, of_part).sample for part, of_part in parts])[:count].float()

    def _combine(
        self, x: Tensor, strong: Tensor, weak: Tensor, extra: Tensor, level: Level, *, first: bool
    ) -> tuple[Tensor, Tensor]:
        """Return the guided and the weak estimate of x_0; `extra` is scale - 1, `B 1 1 1`."""
        form, noise = self._guidance.form, self._noise
        if form == "apg":
            clean = noise.clean(x, strong, level)
            update = clean - noise.clean(x, weak, level)
            self._update = update = update if self._update is None else update + APG_MOMENTUM * self._update
            return clean + extra * _projected(update, clean), clean
        if form == "cfg_zero":
            weak = weak * (_dot(strong, weak) / _dot(weak, weak).clamp(min=1e-8))
        guided = strong + extra * (strong - weak)
        if share := self._guidance.rescale:
            guided = guided * (1 - share + share * _std(strong) / _std(guided))
        if form == "cfg_zero" and first:
            guided = torch.zeros_like(guided)
        return noise.clean(x, guided, level), noise.clean(x, weak, level)


def _projected(update: Tensor, clean: Tensor) -> Tensor:
    """Return `update` with at most APG's norm, less its component along `clean` (Sadat et al. 2025, algorithm 1)."""
    norm = _dot(update, update).sqrt()
    update = update * (APG_NORM * math.sqrt(update[0].numel()) / norm).clamp(max=1)
    return update - clean * (_dot(update, clean) / _dot(clean, clean))


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the dot product of each sample, `B 1 1 1`."""
    return (a * b).sum(dim=(1, 2, 3), keepdim=True)


def _std(x: Tensor) -> Tensor:
    return x.std(dim=(1, 2, 3), keepdim=True)

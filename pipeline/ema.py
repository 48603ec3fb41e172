"""An exponential moving average of a model's parameters, on the clock of images seen."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Ema:
    """Average with a half-life in images; early in a run it is a tenth of the images seen, so that the random start is
    forgotten (Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", section 3)."""

    def __init__(self, model: nn.Module, halflife: int) -> None:
        self.halflife = halflife
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, *, images_seen: int, batch_size: int) -> None:
        """Move towards `model` after a step that ended at `images_seen`."""
        halflife = min(self.halflife, max(images_seen / 10, 1e-8))
        weight = 1 - 0.5 ** (batch_size / halflife)
        parameters = [value.detach() for value in model.state_dict().values()]
        torch._foreach_lerp_(list(self.average.values()), parameters, weight)

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take over an average that was saved; its names must be the model's."""
        assert state.keys() == self.average.keys()
        for name, value in state.items():
            self.average[name].copy_(value)

"""Tiny models, what they are fed with, and a trained one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.latents import Draws
from pipeline.noise import NoiseProcess
from pipeline.unet import LatentUNet

CLASSES = 3


def build(seed: int = 0, **overrides: Any) -> LatentUNet:
    """A tiny model as it starts."""
    torch.manual_seed(seed)
    settings = {"channels": (8, 16), "blocks": 1, "depth": 2, "head_width": 8, "in_channels": 4, "sample_size": 4}
    return LatentUNet(num_classes=CLASSES, **(settings | overrides)).eval()


def scramble(module: nn.Module, seed: int = 0) -> None:
    """Random values for every parameter: a module at its start ignores most of its input."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)


def scrambled(**overrides: Any) -> LatentUNet:
    model = build(**overrides)
    scramble(model)
    return model


FLOW = NoiseProcess("flow", "flow")


CPU = torch.device("cpu")


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def draws(count: int = 8, *, seed: int = 0, step: int = 0, views: int = 2, label_dropout: float = 0.1) -> Draws:
    return Draws.at(
        FLOW, seed=seed, step=step, shape=(count, 4, 4, 4), views=views, label_dropout=label_dropout, device=CPU
    )

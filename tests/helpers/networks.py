"""A feature network that a test can compute by itself."""

from __future__ import annotations

import torch


class Means:
    """A network whose three features are the mean colour of an image, of which it makes two classes."""

    option, name, frechet = "effnet_lite0", "Means", "FD-Means"
    sha256 = "0" * 64
    resize = "no resize"
    dimension, has_classes = 3, True
    device = torch.device("cpu")

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.float().mean(dim=(1, 2))

    def probabilities(self, features: torch.Tensor) -> torch.Tensor:
        return features[:, :2].double().softmax(dim=1)

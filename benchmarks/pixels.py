"""Pixels in the place of latents, for comparison: what `FrozenVae` is for a VAE, for no VAE at all."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from data.cache.manifest import VaeIdentity

SOURCE = "pixels"
_USERS = ("stages.encode", "pipeline.training.previews", "stages.evaluate")


class Pixels:
    """Images as they are: three channels, no reduction in space, no posterior."""

    downsampling, latent_channels = 1, 3
    image_size, precision = None, "fp32"

    def __init__(self, source: str = SOURCE, device: torch.device | str = "cpu") -> None:
        self.source, self.device = source, torch.device(device)

    def encode(self, pixels: Tensor) -> Tensor:
        """`B 3 H W` -> mean and a standard deviation of 0, `B 6 H W`."""
        return torch.cat([pixels, torch.zeros_like(pixels)], dim=1)

    def decode(self, latents: Tensor) -> Tensor:
        """The same pixels."""
        return latents

    def encoding_bytes(self, batch_size: int, image_size: int) -> int:
        """Two copies in float32."""
        return 2 * 4 * 3 * batch_size * image_size**2

    def identity(self) -> VaeIdentity:
        """What a cache records."""
        named = {"source": SOURCE, "class_name": "none", "weights_sha256": "0" * 64}
        return VaeIdentity(**named, scaling_factor=1, shift_factor=0, downsampling=1)

    def check(self, cached: VaeIdentity, cache: Path) -> None:
        """ValueError when `cache` is none of pixels."""
        if cached != self.identity():
            raise ValueError(f"{cache} is a cache of latents: give another cache.path")


@contextlib.contextmanager
def without_vae() -> Iterator[None]:
    """A block in which stages take pixels for latents."""
    with contextlib.ExitStack() as stack:
        for user in _USERS:
            stack.enter_context(mock.patch(f"{user}.FrozenVae", Pixels))
        yield

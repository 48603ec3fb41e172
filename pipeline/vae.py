"""The frozen first stage: pixels to the moments of a posterior, and latents back to pixels."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

BUNDLED = Path(__file__).parent / "bundled_vae"


def to_pixels(images: Tensor) -> Tensor:
    """uint8 `B H W 3` in 0..255 to float32 `B 3 H W` in -1..1, the input range of diffusers' autoencoders."""
    return images.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1


def to_images(pixels: Tensor) -> Tensor:
    """The inverse of `to_pixels`, with values outside -1..1 cut off and the rest rounded to the nearest level."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1)

"""The device that a stage runs on."""

from __future__ import annotations

import torch


def pick_device() -> torch.device:
    """The first GPU, Apple's included, or the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

"""The device that a stage runs on."""

from __future__ import annotations

import os

import torch


def pick_device() -> torch.device:
    """The first GPU, Apple's included, or the CPU; ACCELERATE_USE_CPU=true asks for the CPU, as it does in training."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

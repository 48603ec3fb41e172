"""The device that a stage runs on."""

from __future__ import annotations

import os

import torch


def pick_device() -> torch.device:
    """The GPU of this process, Apple's included, or the CPU; ACCELERATE_USE_CPU=true asks for that, as in training."""
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true", "yes"):
        return torch.device("cpu")
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

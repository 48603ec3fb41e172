"""Compute the FLOPs and memory of a training step in advance, with the model on the meta device."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from pipeline.unet import LatentUNet

# dense TFLOP/s in 16 bits and in (tensor) float32, from the manufacturers' data sheets; the first matching name counts
_PEAKS = {
    "B200": (2250.0, 1125.0),
    "H200": (989.0, 494.5),
    "H100 PCIe": (756.0, 378.0),
    "H100 NVL": (835.0, 417.5),
    "H100": (989.0, 494.5),
    "A100": (312.0, 156.0),
    "L40S": (362.0, 183.0),
    "L40": (181.0, 90.5),
    "L4": (121.0, 60.0),
    "A10": (125.0, 62.5),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "V100": (125.0, 15.7),
    "T4": (65.0, 8.1),
}


@dataclass(frozen=True)
class Cost:
    """Holds the cost of one image's forward and backward pass.

    `flops`: a multiplication and an addition count as two; `kept_bytes`: the activations that autograd keeps for the
    backward pass, in float32.
    """

    flops: int
    kept_bytes: int

    @classmethod
    def of(cls, model: LatentUNet) -> Cost:
        """Compute the cost of a training step of `model`; the backward pass counts as twice the forward pass."""
        with torch.device("meta"):
            twin = LatentUNet.from_config(model.config)
            size = model.config["sample_size"]
            x = torch.empty(1, model.config["in_channels"], size, size)
            times, labels = torch.empty(1), torch.empty(1, dtype=torch.long)
        if model.is_gradient_checkpointing:
            twin.enable_gradient_checkpointing()
        own = {parameter.untyped_storage()._cdata for parameter in twin.parameters()}
        kept: dict[int, Tensor] = {}  # by storage, because several operations can keep the same one

        def pack(tensor: Tensor) -> Tensor:
            kept[tensor.untyped_storage()._cdata] = tensor
            return tensor

        with FlopCounterMode(display=False) as counter, saved_tensors_hooks(pack, lambda tensor: tensor):
            twin(x, times, labels)
        kept_bytes = sum(tensor.untyped_storage().nbytes() for key, tensor in kept.items() if key not in own)
        return cls(flops=3 * counter.get_total_flops(), kept_bytes=kept_bytes)


def peak_flops(device_name: str, *, half: bool) -> float | None:
    """Return a GPU's peak FLOP/s on its matrix units, in 16 bits (`half`) or (tensor) float32; None if unknown."""
    for name, (low, full) in _PEAKS.items():
        if re.search(rf"\b{name}\b", device_name):
            return (low if half else full) * 1e12
    return None


def fitting_rows(model: LatentUNet, free_bytes: int, *, averages: int, half: bool) -> int:
    """Return how many images a process can train on at once in `free_bytes` of memory."""
    fixed, image = training_bytes(model, averages=averages, half=half)
    return max(int((free_bytes - fixed) / image), 0)


def training_bytes(model: LatentUNet, *, averages: int, half: bool) -> tuple[int, float]:
    """Return the bytes that training needs: a fixed part, and a part per image.

    The fixed part is weights, gradients, two optimizer moments and `averages`. The part per image is what autograd
    keeps, in 16 bits with `half`, plus half of that for temporary buffers.
    """
    fixed = 4 * (4 + averages) * sum(parameter.numel() for parameter in model.parameters())
    return fixed, 1.5 * Cost.of(model).kept_bytes * (0.5 if half else 1)

"""Checkpoints: safetensors and JSON only, one folder named by images seen, complete or absent.

<images_seen>/model.safetensors      the trained weights
              ema/                   their average, a model folder for `LatentUNet.from_pretrained`
              optimizer.safetensors  `<state>.<parameter>`, as exp_avg.conv_in.weight
              state.json             images seen, step, class names, noise process, and every file's SHA-256
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from data.storage import publish_json, remove, sha256_file, staged_folder
from pipeline.ema import Ema
from pipeline.unet import LatentUNet

_STATE = "state.json"


@dataclass
class Checkpoint:
    """A checkpoint folder whose files have been checked against their hashes."""

    path: Path
    state: dict[str, Any]

    @property
    def images_seen(self) -> int:
        return int(self.state["images_seen"])

    def ema_model(self) -> LatentUNet:
        """The averaged model, in evaluation mode."""
        model: LatentUNet = LatentUNet.from_pretrained(self.path / "ema", low_cpu_mem_usage=False).eval()
        return model.to(memory_format=torch.channels_last)


def checkpoint_folders(run: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; by images seen, never by file times."""
    folders = [path for path in (run / "checkpoints").glob("*") if path.name.isdigit()]
    return sorted(folders, key=lambda path: int(path.name))


def newest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that is whole, and a line for each newer one that was passed over."""
    passed_over: list[str] = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            return _open(folder), passed_over
        except ValueError as error:
            passed_over.append(str(error))
    return None, passed_over


def save_checkpoint(
    run: Path,
    *,
    model: LatentUNet,
    ema: Ema,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Publish a checkpoint of `run` at state["images_seen"], then delete all but the newest `keep`."""
    folder = run / "checkpoints" / f"{state['images_seen']:09d}"
    with staged_folder(folder) as staged:
        save_file(_contiguous(model.state_dict()), staged / "model.safetensors")
        save_file(_contiguous(_flatten(model, optimizer)), staged / "optimizer.safetensors")
        (staged / "ema").mkdir()
        save_file(_contiguous(ema.state_dict()), staged / "ema" / "diffusion_pytorch_model.safetensors")
        model.save_config(staged / "ema")
        files = {str(f.relative_to(staged)): sha256_file(f) for f in sorted(staged.rglob("*")) if f.is_file()}
        publish_json(staged / _STATE, {**state, "sha256": files})
    for other in checkpoint_folders(run):
        if int(other.name) > state["images_seen"]:  # it was damaged, or this run would have gone on from there
            remove(other)
    for old in checkpoint_folders(run)[:-keep]:
        remove(old)
    return folder


def load_training_state(checkpoint: Checkpoint, model: nn.Module, ema: Ema, optimizer: torch.optim.Optimizer) -> None:
    """Put weights, average and optimizer back as they were when `checkpoint` was saved."""
    model.load_state_dict(load_file(checkpoint.path / "model.safetensors"))
    ema.load_state_dict(load_file(checkpoint.path / "ema" / "diffusion_pytorch_model.safetensors"))
    flat = load_file(checkpoint.path / "optimizer.safetensors")
    for name, parameter in model.named_parameters():
        state = {key.split(".", 1)[0]: value for key, value in flat.items() if key.split(".", 1)[1] == name}
        for key, value in state.items():
            # a moment has its parameter's memory format, or the fused step would run on strided copies
            state[key] = value if key == "step" else torch.empty_like(parameter).copy_(value)
        if state:
            optimizer.state[parameter] = state


def _open(folder: Path) -> Checkpoint:
    try:
        state = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        files = state["sha256"].items()
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{folder}: no readable {_STATE}") from None
    for name, expected in files:
        file = folder / name
        if not file.is_file() or sha256_file(file) != expected:
            raise ValueError(f"{file}: missing or damaged: its SHA-256 is not that of {_STATE}")
    return Checkpoint(folder, state)


def _flatten(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{key}.{name}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _contiguous(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().contiguous() for name, value in tensors.items()}

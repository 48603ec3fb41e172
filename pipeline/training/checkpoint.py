"""Checkpoints: safetensors and JSON only, one folder named by images seen, complete or absent.

checkpoints/<images_seen>/model.safetensors      the trained weights, and those of the loss where it has any
                          ema/                   their average, a model folder for `LatentUNet.from_pretrained`
                          ema_2/                 the second average, where there are two
                          optimizer.safetensors  `<state>.<parameter>`, as exp_avg.model.conv_in.weight
                          state.json             images seen, step, class names, ..., every file's SHA-256 and its own
averages/<images_seen>/   ema/, ema_2/ and state.json: what `latentmill ema` makes averages of other widths from
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from data.storage import parse_json, publish_json, read, remove, set_aside, sha256_file, staged_folder, write_staged
from pipeline.ema import Average
from pipeline.latents import Normalization
from pipeline.loss import Objective
from pipeline.optim import STATE
from pipeline.training.state import RunState
from pipeline.unet import LatentUNet

CHECKPOINTS, AVERAGES = "checkpoints", "averages"
EMA = ("ema", "ema_2")  # folders of the averages; the first is the one that samples are drawn from
WEIGHTS = "diffusion_pytorch_model.safetensors"
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_KINDS = {  # as safetensors calls them, in the order in which it writes them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_PART_BYTES = 2**18  # that are worth a write
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # damage; any other OSError is of the disk


@dataclass
class Checkpoint:
    """A checkpoint folder whose files have been checked against their hashes."""

    path: Path
    state: RunState

    @property
    def images_seen(self) -> int:
        return self.state.images_seen

    @property
    def resumable(self) -> bool:
        """Whether training can go on from here: a folder that `latentmill ema` made has no more than an average."""
        return _MODEL in self.state.sha256

    @property
    def normalization(self) -> Normalization:
        """Of the latents that the model knows."""
        return self.state.normalization

    @property
    def ema_sha256(self) -> str:
        """Of the averaged weights that samples are drawn from."""
        return self.state.sha256[f"{EMA[0]}/{WEIGHTS}"]

    def file(self, name: str) -> Path:
        """A file of the checkpoint; ValueError where its state lists none of that name: its hash is not known."""
        if name not in self.state.sha256:
            raise ValueError(f"{self.path / name}: {_STATE} lists no such file")
        return self.path / name

    def ema_weights(self, name: str = EMA[0]) -> dict[str, Tensor]:
        """The averaged weights in the folder `name`; ValueError where they are not those of the model's config."""
        return _load(self.file(f"{name}/{WEIGHTS}"), _shapes(self._empty_model().state_dict()))

    def ema_model(self) -> LatentUNet:
        """The averaged model, in evaluation mode."""
        model = self._empty_model().eval()
        model.load_state_dict(self.ema_weights(), assign=True)
        return model.to(memory_format=torch.channels_last)

    def _empty_model(self) -> LatentUNet:
        with torch.device("meta"):
            model: LatentUNet = LatentUNet.from_config(self.model_config())
        return model

    def model_config(self) -> dict[str, Any]:
        """What its `LatentUNet` was made with."""
        return json.loads(read(self.file(f"{EMA[0]}/config.json")))


def checkpoint_path(run: Path, images_seen: int, kind: str = CHECKPOINTS) -> Path:
    return run / kind / f"{images_seen:09d}"


def checkpoint_folders(run: Path, kind: str = CHECKPOINTS) -> list[Path]:
    """The checkpoints of a run, oldest first; by images seen, never by file times."""
    try:
        names = os.listdir(run / kind)  # glob would take a folder that cannot be read for an empty one
    except FileNotFoundError:
        return []
    return [run / kind / name for name in sorted(filter(str.isdecimal, names), key=int)]


def newest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint of a run that is whole, and a line for each newer one that was passed over.

    Only damage is passed over: an OSError, of a disk that cannot be read now, names its file and goes up.
    """
    passed_over: list[str] = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            return open_checkpoint(folder), passed_over
        except ValueError as error:
            passed_over.append(str(error))
    return None, passed_over


def open_checkpoint(folder: Path, *, verify: bool = True) -> Checkpoint:
    """The checkpoint in `folder`; ValueError names the first file that is missing or, with `verify`, not what was
    written."""
    try:
        values = parse_json(read(folder / _STATE))
        checksum = values.pop("seal")
    except (*_ABSENT, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder}: no readable {_STATE}") from None
    if checksum != _checksum(values):
        raise ValueError(f"{folder / _STATE}: damaged: its SHA-256 is not the one it was written with")
    try:
        state = RunState.model_validate(values)
    except ValidationError as error:
        where, why = ".".join(map(str, error.errors()[0]["loc"])), error.errors()[0]["msg"]
        raise ValueError(f"{folder / _STATE}: of another version of latentmill: {where}: {why}") from None
    for name, expected in state.sha256.items():
        if not _is_whole(folder / name, expected if verify else None):
            raise ValueError(f"{folder / name}: missing or damaged: its SHA-256 is not that of {_STATE}")
    return Checkpoint(folder, state)


def save_checkpoint(
    run: Path,
    *,
    objective: Objective,
    averages: Mapping[str, Average],
    optimizers: Iterable[Optimizer],
    state: RunState,
    writing: bool = True,
) -> None:
    """Publish a checkpoint of `run` at `state.images_seen`.

    All processes call it, for the weights may be dealt out among them; the one that is `writing` writes.
    """
    files = {
        _MODEL: objective.state_dict(),
        _OPTIMIZER: _flatten(objective, optimizers),
        **_weights(averages),
    }
    _publish(checkpoint_path(run, state.images_seen), objective.model, files, state, writing)


def save_averages(
    run: Path, *, model: LatentUNet, averages: Mapping[str, Average], state: RunState, writing: bool = True
) -> None:
    """Publish the averages alone, which stay when their checkpoint is deleted; called as `save_checkpoint`."""
    _publish(checkpoint_path(run, state.images_seen, AVERAGES), model, _weights(averages), state, writing)


def set_aside_newer(run: Path, images_seen: int) -> list[Path]:
    """Rename what stands in the way of a checkpoint at `images_seen`; where it is now.

    That is a checkpoint of that time or a later one, which is damaged, for the run would have gone on from there; and
    later averages, which are of a course that the run has left. Averages of that very time are of a save that was
    killed, and the next one writes them again.
    """
    return [
        set_aside(folder)
        for kind, first in ((CHECKPOINTS, images_seen), (AVERAGES, images_seen + 1))
        for folder in checkpoint_folders(run, kind)
        if int(folder.name) >= first
    ]


def save_reconstruction(folder: Path, source: Checkpoint, tensors: dict[str, Tensor], state: RunState) -> None:
    """Publish `tensors`, an average of the model of `source`, as the one file of a checkpoint in `folder`."""
    model = LatentUNet.from_config(source.model_config())
    _publish(folder, model, {f"{EMA[0]}/{WEIGHTS}": tensors}, state, True)


def prune_checkpoints(run: Path, *, keep: int, keep_every: int, interval: int, batch_size: int) -> None:
    """Delete all checkpoints but the newest `keep` and, unless `keep_every` is 0, every `keep_every`-th of those that
    are saved each `interval` images; one that a signal asked for falls between them."""
    for old in checkpoint_folders(run)[:-keep]:
        number, past = divmod(int(old.name), interval)
        if not (keep_every and number % keep_every == 0 and past < batch_size):
            remove(old)


@torch.no_grad()
def load_training_state(
    checkpoint: Checkpoint, objective: Objective, averages: Mapping[str, Average], optimizers: Iterable[Optimizer]
) -> None:
    """Put weights, averages and optimizers back as they were when `checkpoint` was saved.

    ValueError names the file and the first tensor that is missing, that nothing here has, or that has another shape.
    """
    parameters = dict(objective.named_parameters())
    for name, value in _load(checkpoint.file(_MODEL), _shapes(parameters)).items():
        parameters[name].copy_(_as_dealt(value, parameters[name]))
    for name, average in averages.items():
        for key, value in _load(checkpoint.file(f"{name}/{WEIGHTS}"), _shapes(average.tensors)).items():
            average.tensors[key].copy_(_as_dealt(value, average.tensors[key]))
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    expected = {
        f"{kind}.{name}": torch.Size() if kind == "step" else parameter.shape
        for name, parameter in parameters.items()
        for kind in STATE[type(owner[parameter])]
    }
    if checkpoint.state.scaler and not load_file(checkpoint.file(_OPTIMIZER)):
        return  # fp16's scaler has skipped every step
    for key, value in _load(checkpoint.file(_OPTIMIZER), expected).items():
        kind, name = key.split(".", 1)
        parameter = parameters[name]
        if kind == "step":  # the fused step wants it beside the parameter
            value = value.to(parameter.device)
        else:  # in its parameter's memory format: on a CPU the fused step reads both in the order in memory
            value = torch.empty_like(parameter).copy_(_as_dealt(value, parameter))
        owner[parameter].state[parameter][kind] = value


def _load(file: Path, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """The tensors of `file`, which have the names and shapes `expected`."""
    tensors = load_file(file)
    _require_equal(file, tensors, expected)
    return tensors


def _require_equal(file: Path, found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise ValueError(f"{file}: {name} is missing")
        if name not in expected:
            raise ValueError(f"{file}: {name} is of another model: this one has no such tensor")
        if found[name].shape != expected[name]:
            raise ValueError(f"{file}: {name} has the shape {list(found[name].shape)}, not {list(expected[name])}")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def full(tensor: Tensor) -> Tensor:
    """A tensor that FSDP has dealt out among the processes, whole; all of them must ask. Others as they are."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as_dealt(value: Tensor, like: Tensor) -> Tensor:
    """The share of `value` that this process holds of `like`."""
    if isinstance(like, DTensor):
        return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)
    return value


def _publish(
    folder: Path,
    model: LatentUNet,
    files: Mapping[str, Mapping[str, Tensor]],
    state: RunState,
    writing: bool,
) -> None:
    """Write `files` of tensors, a config beside each model's weights, and `state` with the hashes of all of them."""
    if not writing:
        for tensors in files.values():
            for name in _order(tensors):
                full(tensors[name])
        return
    hashes = {}
    with staged_folder(folder) as staged:
        for name, tensors in files.items():
            hashes[name] = write_staged(staged / name, serialized(tensors))
            if name.endswith(WEIGHTS):
                config = str(Path(name).with_name("config.json"))
                hashes[config] = write_staged(staged / config, [model.to_json_string().encode()])
        left_out = {"sha256"} if state.window else {"sha256", "window"}
        values = {**state.model_dump(mode="json", exclude=left_out), "sha256": dict(sorted(hashes.items()))}
        publish_json(staged / _STATE, {**values, "seal": _checksum(values)})


def serialized(tensors: Mapping[str, Tensor]) -> Iterator[bytearray | memoryview]:
    """The bytes of a safetensors file, the same as `safetensors.torch.save` gives, a large tensor at a time: no second
    copy of a model is held (https://github.com/huggingface/safetensors, "Format")."""
    header: dict[str, Any] = {}
    end, names = 0, _order(tensors)
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _KINDS[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    small = bytearray(len(text).to_bytes(8, "little") + text)  # what is too little to be written by itself
    for name in names:
        values = full(tensors[name].detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data
        if len(values) < _PART_BYTES:
            small += values
            continue
        yield small
        yield values
        small = bytearray()
    yield small


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names as they lie in a safetensors file, and in the order in which all processes gather what is dealt out."""
    kinds = list(_KINDS)
    return sorted(tensors, key=lambda name: (kinds.index(tensors[name].dtype), name))


def _checksum(values: dict[str, Any]) -> str:
    """The SHA-256 of all that state.json holds besides it."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is_whole(file: Path, sha256: str | None) -> bool:
    try:
        return sha256_file(file) == sha256 if sha256 else os.stat(file).st_size > 0
    except _ABSENT:
        return False


def _weights(averages: Mapping[str, Average]) -> dict[str, dict[str, Tensor]]:
    return {f"{name}/{WEIGHTS}": average.tensors for name, average in averages.items()}


def _flatten(objective: Objective, optimizers: Iterable[Optimizer]) -> dict[str, Tensor]:
    names: dict[Tensor, str] = {parameter: name for name, parameter in objective.named_parameters()}
    return {
        f"{kind}.{names[parameter]}": value
        for optimizer in optimizers
        for parameter, state in optimizer.state.items()
        for kind, value in state.items()
    }

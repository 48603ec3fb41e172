"""Save and open checkpoints: one folder of safetensors and JSON files each, either complete or absent.

checkpoints/<images_seen>/model.safetensors      the trained weights of the model, and of the loss if it has any
                          ema/                   averaged weights, a model folder for `LatentUNet.from_pretrained`
                          ema_2/                 the second average, if there are two
                          optimizer.safetensors  `<state>.<parameter>`, such as exp_avg.model.conv_in.weight
                          state.json             images seen, step, class names, ..., and SHA-256 checksums
averages/<images_seen>/   ema/, ema_2/ and state.json: a snapshot for `latentmill ema`, kept for good
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
EMA = ("ema", "ema_2")  # folders of the averaged weights; samples are drawn from the first
WEIGHTS = "diffusion_pytorch_model.safetensors"
_MODEL, _OPTIMIZER, _STATE = "model.safetensors", "optimizer.safetensors", "state.json"
_DTYPES = {  # safetensors' names, in the order in which it writes them
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
_PART_BYTES = 2**18  # smaller tensors are collected into one write
_ABSENT = (FileNotFoundError, NotADirectoryError, IsADirectoryError)  # damage; other OSErrors come from the disk


@dataclass
class Checkpoint:
    """Represents a checkpoint folder whose files have been checked against their SHA-256."""

    path: Path
    state: RunState

    @property
    def images_seen(self) -> int:
        return self.state.images_seen

    @property
    def resumable(self) -> bool:
        """Return whether training can resume from it: a folder made by `latentmill ema` holds averaged weights only."""
        return _MODEL in self.state.sha256

    @property
    def normalization(self) -> Normalization:
        """Return the normalisation of the latents that the model was trained on."""
        return self.state.normalization

    @property
    def ema_sha256(self) -> str:
        """Return the SHA-256 of the averaged weights, which samples are drawn from."""
        return self.state.sha256[f"{EMA[0]}/{WEIGHTS}"]

    def file(self, name: str) -> Path:
        """Return the path of a file of the checkpoint; ValueError if state.json has no SHA-256 for it."""
        if name not in self.state.sha256:
            raise ValueError(f"{self.path / name}: {_STATE} lists no such file")
        return self.path / name

    def ema_weights(self, name: str = EMA[0]) -> dict[str, Tensor]:
        """Load the averaged weights in the folder `name`; ValueError if they do not fit the model's config."""
        return _load(self.file(f"{name}/{WEIGHTS}"), _shapes(self._empty_model().state_dict()))

    def ema_model(self) -> LatentUNet:
        """Load the averaged model, in evaluation mode."""
        model = self._empty_model().eval()
        model.load_state_dict(self.ema_weights(), assign=True)
        return model.to(memory_format=torch.channels_last)

    def _empty_model(self) -> LatentUNet:
        with torch.device("meta"):
            model: LatentUNet = LatentUNet.from_config(self.model_config())
        return model

    def model_config(self) -> dict[str, Any]:
        """Read the arguments with which its `LatentUNet` was made."""
        return json.loads(read(self.file(f"{EMA[0]}/config.json")))


def checkpoint_path(run: Path, images_seen: int, kind: str = CHECKPOINTS) -> Path:
    return run / kind / f"{images_seen:09d}"


def checkpoint_folders(run: Path, kind: str = CHECKPOINTS) -> list[Path]:
    """List the checkpoint folders of a run, oldest first: by images seen, never by file times."""
    try:
        names = os.listdir(run / kind)  # glob would treat an unreadable folder as an empty one
    except FileNotFoundError:
        return []
    return [run / kind / name for name in sorted(filter(str.isdecimal, names), key=int)]


def newest_checkpoint(run: Path) -> tuple[Checkpoint | None, list[str]]:
    """Open the newest intact checkpoint of a run; return it, and one line for each newer one that was skipped.

    Only damaged checkpoints are skipped: if the disk cannot be read now, an OSError that names the file is raised.
    """
    skipped: list[str] = []
    for folder in reversed(checkpoint_folders(run)):
        try:
            return open_checkpoint(folder), skipped
        except ValueError as error:
            skipped.append(str(error))
    return None, skipped


def checkpoint_at(place: Path, field: str) -> tuple[Checkpoint, list[str]]:
    """Open `place`, a checkpoint folder, or the newest intact checkpoint of the run in `place`.

    Return it, and one line for each newer one that was skipped; ValueError names `field` if there is none.
    """
    if (place / _STATE).is_file():
        return open_checkpoint(place), []
    checkpoint, skipped = newest_checkpoint(place)
    if not checkpoint:
        raise ValueError(f"{field}: no intact checkpoint in {place}")
    return checkpoint, skipped


def open_checkpoint(folder: Path, *, verify: bool = True) -> Checkpoint:
    """Open the checkpoint in `folder`; ValueError names the first file that is missing or, with `verify`, damaged."""
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
        raise ValueError(f"{folder / _STATE}: written by another version of latentmill: {where}: {why}") from None
    for name, expected in state.sha256.items():
        if not _is_intact(folder / name, expected if verify else None):
            raise ValueError(f"{folder / name}: missing or damaged: its SHA-256 is not the one in {_STATE}")
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

    All processes must call it, because the weights may be sharded; only the process with `writing` writes files.
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
    """Publish the averaged weights alone, which are kept for good; all processes must call it."""
    _publish(checkpoint_path(run, state.images_seen, AVERAGES), model, _weights(averages), state, writing)


def set_aside_newer(run: Path, images_seen: int) -> list[Path]:
    """Rename folders that conflict with saving a checkpoint at `images_seen`, and return their new paths.

    These are checkpoints at `images_seen` or later, which are damaged (otherwise the run would have resumed from them),
    and later averages, which belong to training that was lost. Averages at `images_seen` itself are left by a save that
    was killed, and are overwritten.
    """
    return [
        set_aside(folder)
        for kind, first in ((CHECKPOINTS, images_seen), (AVERAGES, images_seen + 1))
        for folder in checkpoint_folders(run, kind)
        if int(folder.name) >= first
    ]


def save_reconstruction(folder: Path, source: Checkpoint, tensors: dict[str, Tensor], state: RunState) -> None:
    """Publish `tensors`, averaged weights of the model of `source`, as the only weights of a checkpoint in `folder`."""
    model = LatentUNet.from_config(source.model_config())
    _publish(folder, model, {f"{EMA[0]}/{WEIGHTS}": tensors}, state, True)


def prune_checkpoints(run: Path, *, keep: int, keep_every: int, interval: int, batch_size: int) -> None:
    """Delete all checkpoints except the newest `keep` and, unless `keep_every` is 0, every `keep_every`-th of those
    saved at multiples of `interval` images; checkpoints saved on a signal are not counted among these."""
    for old in checkpoint_folders(run)[:-keep]:
        number, past = divmod(int(old.name), interval)
        if not (keep_every and number % keep_every == 0 and past < batch_size):
            remove(old)


@torch.no_grad()
def load_training_state(
    checkpoint: Checkpoint, objective: Objective, averages: Mapping[str, Average], optimizers: Iterable[Optimizer]
) -> None:
    """Restore weights, averages and optimizer states from `checkpoint`.

    ValueError names the file and the first tensor that is missing, unknown or of another shape.
    """
    parameters = dict(objective.named_parameters())
    for name, value in _load(checkpoint.file(_MODEL), _shapes(parameters)).items():
        parameters[name].copy_(_as_sharded(value, parameters[name]))
    for name, average in averages.items():
        for key, value in _load(checkpoint.file(f"{name}/{WEIGHTS}"), _shapes(average.tensors)).items():
            average.tensors[key].copy_(_as_sharded(value, average.tensors[key]))
    owner = {p: optimizer for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    expected = {
        f"{kind}.{name}": torch.Size() if kind == "step" else parameter.shape
        for name, parameter in parameters.items()
        for kind in STATE[type(owner[parameter])]
    }
    if checkpoint.state.scaler and not load_file(checkpoint.file(_OPTIMIZER)):
        return  # no optimizer state yet: fp16's loss scaler has skipped every step
    for key, value in _load(checkpoint.file(_OPTIMIZER), expected).items():
        kind, name = key.split(".", 1)
        parameter = parameters[name]
        if kind == "step":  # the fused step needs it on the parameter's device
            value = value.to(parameter.device)
        else:  # in the parameter's memory format: on a CPU the fused step reads both in memory order
            value = torch.empty_like(parameter).copy_(_as_sharded(value, parameter))
        owner[parameter].state[parameter][kind] = value


def _load(file: Path, expected: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Load the tensors of `file`; ValueError unless they have the names and shapes `expected`."""
    tensors = load_file(file)
    _require_equal(file, tensors, expected)
    return tensors


def _require_equal(file: Path, found: Mapping[str, Tensor], expected: Mapping[str, torch.Size]) -> None:
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise ValueError(f"{file}: {name} is missing")
        if name not in expected:
            raise ValueError(f"{file}: {name} belongs to another model: this one has no such tensor")
        if found[name].shape != expected[name]:
            raise ValueError(f"{file}: {name} has the shape {list(found[name].shape)}, not {list(expected[name])}")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def gather_full(tensor: Tensor) -> Tensor:
    """Gather a tensor that FSDP has sharded, which all processes must call; return any other tensor unchanged."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _as_sharded(value: Tensor, like: Tensor) -> Tensor:
    """Return the shard of `value` that this process holds, if `like` is sharded; else `value`."""
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
    """Write `files` of tensors, a config beside each model's weights, and `state` with the SHA-256 of every file."""
    if not writing:
        for tensors in files.values():
            for name in _order(tensors):
                gather_full(tensors[name])  # the writing process needs all shards
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
    """Yield the bytes of a safetensors file, the same as from `safetensors.torch.save`, one large tensor at a time: so
    no second copy of a model is in memory (https://github.com/huggingface/safetensors, "Format")."""
    header: dict[str, Any] = {}
    end, names = 0, _order(tensors)
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    small = bytearray(len(text).to_bytes(8, "little") + text)  # the header and small tensors, written together
    for name in names:
        values = gather_full(tensors[name].detach()).cpu().contiguous().flatten().view(torch.uint8).numpy().data
        if len(values) < _PART_BYTES:
            small += values
            continue
        yield small
        yield values
        small = bytearray()
    yield small


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    """Return the names in the order of a safetensors file, in which all processes gather sharded tensors."""
    dtypes = list(_DTYPES)
    return sorted(tensors, key=lambda name: (dtypes.index(tensors[name].dtype), name))


def _checksum(values: dict[str, Any]) -> str:
    """Return the SHA-256 of everything in state.json except the checksum itself."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _is_intact(file: Path, sha256: str | None) -> bool:
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

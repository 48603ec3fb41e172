"""A step on a GPU that is not there: fake tensors have a device and a shape and no values. An operation on tensors of
the CPU and of a GPU fails, and so does whatever asks for a value, for which the host would have to wait."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)

import data.loader
import pipeline.training.trainer
import pipeline.vae
from data.cache.reader import LatentCache
from data.loader import LatentLoader
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.guidance import GuidedModel
from pipeline.latents import _columns
from pipeline.noise import NoiseProcess, _alphas_cumprod
from pipeline.sampling import image_generators, sampling_loop
from pipeline.training.distributed import connect
from pipeline.training.trainer import Trainer
from pipeline.vae import FrozenVae, to_images, to_pixels
from tests.helpers.world import World

pytestmark = pytest.mark.filterwarnings("ignore:.*Disabling autocast")  # for which torch asks for a real one
GPU = torch.device("cuda", 0)


class Generator(torch.Generator):
    """Of the device that it was asked for, which a build of torch without CUDA has none of."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls)

    def __init__(self, device: Any = "cpu") -> None:
        self.on = torch.device(device)

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.on


@pytest.fixture
def guarded() -> Iterator[None]:
    """A build of torch without CUDA does not know how to change from one GPU to another: that of the meta device, which
    does nothing, stands in for it. A build with CUDA does this by itself under a FakeTensorMode."""
    library = Path(torch.__file__).parent / "lib" / ("libc10.dylib" if sys.platform == "darwin" else "libc10.so")
    kinds = ctypes.c_void_p * 22
    registry = kinds.in_dll(ctypes.CDLL(str(library)), "_ZN3c104impl26device_guard_impl_registryE")
    cuda, meta = (int(kind) for kind in (torch._C._autograd.DeviceType.CUDA, torch._C._autograd.DeviceType.Meta))
    before = registry[cuda]
    registry[cuda] = before or registry[meta]
    yield
    registry[cuda] = before


@pytest.fixture
def gpu(world: World, guarded: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Models are made on the GPU at once: fake parameters cannot be moved."""
    config, build = AutoencoderKL.load_config(world.config.parent / "vae"), pipeline.training.trainer.build_model
    monkeypatch.setattr(pipeline.vae, "_load", lambda source: (on_gpu(AutoencoderKL.from_config, config), source))
    monkeypatch.setattr(pipeline.training.trainer, "build_model", lambda *arguments: on_gpu(build, *arguments))
    monkeypatch.setattr(nn.Module, "to", lambda self, *_, **__: self)
    monkeypatch.setattr(torch, "Generator", Generator)
    monkeypatch.setattr(FrozenVae, "check", lambda *_: None)  # of the hash of its weights
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * 10**9,) * 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda self: self)
    _forget()
    with FakeTensorMode(allow_non_fake_inputs=True):  # such as the table of a schedule, which lies on the CPU
        yield
    _forget()


def on_gpu(build: Callable[..., Any], *arguments: Any) -> Any:
    """What `build` makes there."""
    with GPU:
        return build(*arguments)


def _forget() -> None:
    """What is kept from one test to the next."""
    AcceleratorState._reset_state(reset_partial_state=True)
    _columns.cache_clear()
    _alphas_cumprod.cache_clear()


class Ahead:
    """Items made when they are asked for: fake tensors are known to one thread alone."""

    def __init__(self, make: Callable[[int], Any]) -> None:
        self.get = make


@pytest.fixture(params=[("resident", "adamw"), ("mapped", "muon")], ids=lambda pair: pair[1])
def trainer(world: World, tmp_path: Path, gpu: None, monkeypatch: pytest.MonkeyPatch, request: Any) -> Trainer:
    access, optimizer = request.param
    monkeypatch.setattr(data.loader, "_Prefetcher", Ahead)
    config = load_config(world.config, ["train.precision=bf16", f"train.optimizer={optimizer}"])

    def opened(config: Config, cache: LatentCache, *_: Any) -> LatentLoader:
        alone = {"rank": 0, "world_size": 1, "device": GPU}
        return LatentLoader(cache, seed=0, batch_size=config.train.batch_size, access=access, **alone)

    monkeypatch.setattr(pipeline.training.trainer, "open_loader", opened)
    accelerator = connect("bf16")
    accelerator.state.device = GPU
    trainer = Trainer(config, tmp_path, accelerator, None)

    def backward(loss: Tensor) -> None:
        assert loss.device == GPU
        assert loss.requires_grad
        for parameter in trainer.model.parameters():
            parameter.grad = torch.empty_like(parameter)

    monkeypatch.setattr(accelerator, "backward", backward)  # torch's own needs a build with CUDA
    return trainer


def test_it_trains(trainer: Trainer) -> None:
    for _ in range(2):
        trainer.train_step()
    assert all(p.device == GPU and isinstance(p, FakeTensor) for p in trainer.model.parameters())


def test_it_encodes_and_decodes(world: World, gpu: None) -> None:
    """What is between an image file and its moments on the CPU, and between latents and pixels."""
    vae, images = FrozenVae("tiny", GPU), torch.zeros(3, 16, 16, 3, dtype=torch.uint8)
    vae.precision = "fp16"
    moments = vae.encode(to_pixels(images.to(vae.device)))
    assert (moments.device, moments.shape) == (GPU, (3, 8, 4, 4))
    pixels = to_images(vae.decode(moments[:, :4]))
    assert (pixels.device, pixels.shape) == (GPU, images.shape)


@pytest.mark.parametrize(
    ("sampler", "schedule", "prediction"),
    [
        ("euler", "flow", "flow"),
        ("heun", "flow", "flow"),
        ("unipc", "flow", "flow"),
        ("ddim", "cosine", "v"),
        ("ddpm", "linear", "epsilon"),
        ("dpm++", "linear", "x0"),
    ],
)
def test_it_samples(trainer: Trainer, sampler: str, schedule: str, prediction: str) -> None:
    noise = NoiseProcess(schedule=schedule, prediction=prediction)
    with unset_fake_temporarily():  # a schedule lies on the CPU, where it has values
        levels = noise.levels(2)
    guided = GuidedModel(trainer.model, noise, torch.zeros(2, dtype=torch.int64, device=GPU), [1.5, 2.0])
    places = {"shape": (4, 4, 4), "generators": image_generators(0, [0, 1]), "device": GPU}
    assert sampling_loop(guided, levels, sampler, **places).device == GPU


def test_tensors_of_two_devices_and_a_value_that_is_asked_for_are_found(gpu: None) -> None:
    there = torch.zeros(2, device=GPU)
    with pytest.raises(RuntimeError, match="same device"):
        there + torch.zeros(2)
    with pytest.raises(DataDependentOutputException):
        bool(there.isfinite().all())

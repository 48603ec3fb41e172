"""Images/s of the real training loop against a bare step, against diffusers' recipe, and with the VAE in the loop.

    python -m benchmarks.train_step --images path/to/cifar10     # after `make encode CONFIG=configs/cifar10.yaml ...`

In turn, on the same cached latents and batch size: (1) `latentmill train`, by the images/s of its own log; (2) forward,
backward and optimizer step of the same model on tensors that lie in memory, and nothing else; (3) diffusers'
UNet2DModel, its widths chosen for the same FLOPs and parameters, trained as diffusers' example train_unconditional.py
does: DataLoader, DDPMScheduler, clipping, AdamW and learning rate by its defaults, EMAModel, the loss read in every
step; (4) a 3x3 convolution alone, forward and backward, for the GFLOP/s that this machine reaches. With --images also,
each in a process of its own, (5) the loop of (1) on batches that the VAE encodes in the loop, and the memory of both.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode

from data.cache import LatentCache
from data.loader import LatentBatch, LatentLoader
from data.manifest import Manifest
from data.source import open_source
from pipeline.optimize import make_optimizers
from pipeline.vae import FrozenVae, to_pixels
from stages.config import Config, load_config
from stages.start import build_model, normalization_of
from stages.train import train
from stages.watch import LOG

WINDOWS = 5  # log lines of the real loop in a round
RECIPE = "diffusers' recipe"


@click.command()
@click.option("--config", "file", type=click.Path(path_type=Path), default=Path("configs/cifar10.yaml"))
@click.option("--images", "source", help="The images of the cache: also train with the VAE in the loop.")
@click.option("--rounds", default=6, show_default=True)
@click.option("--steps", default=40, show_default=True, help="Of each way in a round.")
@click.option("--compile", "compiled", is_flag=True, help="With train.compile=true.")
@click.option("--child", type=click.Choice(["cache", "vae"]), hidden=True)
def main(file: Path, source: str | None, rounds: int, steps: int, compiled: bool, child: str | None) -> None:
    config = load_config(file, ["train.compile=true"] * compiled)
    if child:
        print(json.dumps(_loop(config, steps, online=source if child == "vae" else None)))
        return
    _against_bare_and_diffusers(config, rounds, steps)
    if source:
        _against_the_vae_in_the_loop(file, source, rounds, steps)


def _against_bare_and_diffusers(config: Config, rounds: int, steps: int) -> None:
    manifest = Manifest.load(config.cache.path)
    latents, labels = _latents(config)
    model = build_model(config, manifest)
    peer = _matching_unet(model, _flops(model, config, manifest), config, manifest)
    bare, recipe = _bare_step(model, config, latents, labels), _recipe(peer, config, latents, labels)
    gflops = {"bare step": _flops(model, config, manifest), RECIPE: _flops(peer, config, manifest)}
    for name, network in (("ours", model), ("UNet2DModel", peer)):
        size = sum(p.numel() for p in network.parameters()) / 1e6
        print(f"{name}: {size:.2f} M parameters, {_flops(network, config, manifest) / 1e9:.3f} GFLOP an image and step")
    batch = _batch_size(config)
    ways: dict[str, Callable[[], float]] = {
        "real loop": lambda: float(_loop(config, steps)["images_per_second"]),
        "bare step": lambda: _rate(bare, steps, batch),
        RECIPE: lambda: _rate(recipe, steps, batch),
    }
    rates: dict[str, list[float]] = {name: [] for name in ways}
    peaks = []
    orders = itertools.cycle(itertools.permutations(ways))  # the machine's speed drifts: each comes after each other
    for number in range(rounds):
        for name in next(orders):
            rates[name].append(ways[name]())
            print(f"round {number + 1}  {name:18} {rates[name][-1]:8.1f} images/s", flush=True)
        peaks.append(_convolution_flops())
        print(f"round {number + 1}  {'convolution':18} {peaks[-1] / 1e9:8.1f} GFLOP/s", flush=True)
    middle = {name: statistics.median(each) for name, each in rates.items()}
    peak = statistics.median(peaks)
    print(f"real loop / bare step:         {middle['real loop'] / middle['bare step']:.3f}")
    print(f"real loop / diffusers' recipe: {middle['real loop'] / middle[RECIPE]:.3f}")
    for name in ways:
        reached = middle[name] * gflops.get(name, gflops["bare step"])
        print(f"{name:18} {reached / 1e9:6.1f} GFLOP/s, {reached / peak:.2f} of a 3x3 convolution's {peak / 1e9:.1f}")


def _against_the_vae_in_the_loop(file: Path, source: str, rounds: int, steps: int) -> None:
    results: dict[str, list[dict[str, float]]] = {"cache": [], "vae": []}
    for number in range(max(rounds // 2, 1)):
        for child, each in results.items():
            command = [sys.executable, "-m", "benchmarks.train_step", "--config", str(file), "--images", source]
            done = subprocess.run(
                [*command, "--steps", str(steps), "--child", child], check=True, capture_output=True, text=True
            )
            each.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"round {number + 1}  from the {child:6} {each[-1]}", flush=True)
    rate, memory = (
        {child: statistics.median(result[key] for result in each) for child, each in results.items()}
        for key in ("images_per_second", "memory_gb")
    )
    print(f"from the cache / with the VAE in the loop: {rate['cache'] / rate['vae']:.3f}")
    print(f"peak memory: {memory['cache']:.2f} GB from the cache, {memory['vae']:.2f} GB with the VAE in the loop")


def _loop(config: Config, steps: int, online: str | None = None) -> dict[str, float]:
    """The median images/s of the log lines of a run, and its peak memory; `online` encodes these images in the loop."""
    batch = _batch_size(config)
    changes = {"images": steps * batch, "log_every": steps * batch // WINDOWS, "preview_every": 10**9}
    config = config.model_copy(update={"train": config.train.model_copy(update=changes)})
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        with _encoding(config, online) if online else contextlib.nullcontext():
            train(config, Path(folder))
        lines = [json.loads(line) for line in (Path(folder) / LOG).read_text(encoding="utf-8").splitlines()]
    return {
        "images_per_second": statistics.median(line["images_per_second"] for line in lines),
        "memory_gb": lines[-1]["memory_gb"],
    }


@contextlib.contextmanager
def _encoding(config: Config, images: str) -> Iterator[None]:
    """A block in which the loader reads images and runs the VAE on them, a batch ahead of the training as it always is,
    one view of each as a trainer without a cache would."""
    data = config.data
    source = open_source(images, image_size=data.image_size, count=data.count, seed=data.seed, matte=data.matte)
    vae = FrozenVae(config.vae.source)

    def read(self: LatentLoader, step: int) -> LatentBatch:
        indices = self.indices(step)
        pixels = source.load(indices.tolist()).pixels
        if np.random.default_rng(step).random() < 0.5:
            pixels = pixels[:, :, ::-1].copy()
        moments = vae.encode(to_pixels(torch.from_numpy(pixels)))[:, None]
        views = self.cache.manifest.row_shape[0]
        return LatentBatch(indices, moments.repeat(1, views, 1, 1, 1), self.labels[torch.from_numpy(indices)])

    before = LatentLoader._read, LatentLoader.batch
    LatentLoader._read, LatentLoader.batch = read, lambda self, step: self._batches.get(step)  # type: ignore[method-assign]
    try:
        yield
    finally:
        LatentLoader._read, LatentLoader.batch = before  # type: ignore[method-assign]


def _latents(config: Config) -> tuple[Tensor, Tensor]:
    """The normalised means of all images of the cache, and their labels."""
    cache = LatentCache(config.cache.path)
    means = torch.from_numpy(cache.read(np.arange(len(cache))))[:, 0, : cache.manifest.latent_channels].float()
    return normalization_of(config, cache.manifest).normalize(means), torch.from_numpy(cache.labels)


def _bare_step(model: nn.Module, config: Config, latents: Tensor, labels: Tensor) -> Callable[[], None]:
    settings, size = config.train, _batch_size(config)
    model.to(memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if settings.compile:
        model.compile()
    optimizer = make_optimizers(model, kind="adamw", lr=1e-4, betas=settings.betas, weight_decay=settings.weight_decay)[
        0
    ]
    x = latents[:size].contiguous(memory_format=torch.channels_last)
    target, times = torch.randn_like(x), torch.rand(size) * 1000

    def step() -> None:
        F.mse_loss(model(x, times, labels[:size]).sample, target).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _recipe(model: nn.Module, config: Config, latents: Tensor, labels: Tensor) -> Callable[[], None]:
    """One step of diffusers' example: each call reads the next batch, trains on it and reads the loss."""
    accelerator = Accelerator()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    loader = DataLoader(TensorDataset(latents, labels), batch_size=_batch_size(config), shuffle=True)
    rate = get_scheduler("cosine", optimizer=optimizer, num_warmup_steps=500, num_training_steps=100_000)
    average = EMAModel(model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    model, optimizer, loader, rate = accelerator.prepare(model, optimizer, loader, rate)
    schedule = DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear")
    batches = itertools.chain.from_iterable(itertools.repeat(loader))

    def step() -> None:
        clean, classes = next(batches)
        noise = torch.randn(clean.shape, dtype=clean.dtype, device=clean.device)
        times = torch.randint(0, 1000, (len(clean),), device=clean.device).long()
        with accelerator.accumulate(model):
            output = model(schedule.add_noise(clean, noise, times), times, class_labels=classes).sample
            loss = F.mse_loss(output.float(), noise.float())
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rate.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            average.step(model.parameters())
        loss.detach().item()

    return step


def _matching_unet(model: nn.Module, flops: float, config: Config, manifest: Manifest) -> nn.Module:
    """The UNet2DModel of as many levels, with attention in the lowest, whose FLOPs and parameters come closest."""
    levels, size = len(config.model.channels), sum(p.numel() for p in model.parameters())

    def options(first: int, last: int, blocks: int) -> dict[str, Any]:
        return {
            "sample_size": manifest.shape[1],
            "in_channels": manifest.latent_channels,
            "out_channels": manifest.latent_channels,
            "num_class_embeds": len(manifest.classes) + 1,
            "layers_per_block": blocks,
            "norm_num_groups": 16,
            "block_out_channels": tuple(
                round(first * (last / first) ** (i / (levels - 1)) / 16) * 16 for i in range(levels)
            ),
            "down_block_types": ("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
            "up_block_types": ("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        }

    def distance(choice: tuple[int, int, int]) -> float:
        with torch.device("meta"):
            peer = UNet2DModel(**options(*choice))
        ours, theirs = sum(p.numel() for p in peer.parameters()), _flops(peer, config, manifest)
        return 4 * abs(math.log(theirs / flops)) + abs(math.log(ours / size))

    widths = range(64, 321, 32)
    best = min(((a, b, n) for a in widths for b in widths if b >= a for n in (1, 2)), key=distance)
    return UNet2DModel(**options(*best))


def _flops(model: nn.Module, config: Config, manifest: Manifest) -> float:
    """Of one image's forward and backward pass."""
    size = manifest.shape[1]
    twin = type(model).from_config(model.config)  # type: ignore[attr-defined]
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x, times, labels = torch.empty(1, manifest.latent_channels, size, size), torch.empty(1), torch.zeros(1).long()
        twin.to("meta")(x, times, class_labels=labels)
    return 3.0 * counter.get_total_flops()


def _convolution_flops(channels: int = 192, size: int = 16, batch: int = 32) -> float:
    """FLOP/s of a 3x3 convolution, forward and backward, in channels_last."""
    layer = nn.Conv2d(channels, channels, 3, padding=1).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    x = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last).requires_grad_()
    gradient = torch.randn(batch, channels, size, size).to(memory_format=torch.channels_last)

    def step() -> None:
        layer(x).backward(gradient)

    return _rate(step, 20, batch) * 3 * 2 * 9 * channels**2 * size**2


def _rate(step: Callable[[], None], steps: int, batch: int) -> float:
    """Images/s: the median of as many parts as the real loop has log lines."""
    step()
    rates = []
    for _ in range(WINDOWS):
        started = time.perf_counter()
        for _ in range(steps // WINDOWS):
            step()
        rates.append(steps // WINDOWS * batch / (time.perf_counter() - started))
    return statistics.median(rates)


def _batch_size(config: Config) -> int:
    assert config.train.batch_size != "auto"
    return config.train.batch_size


if __name__ == "__main__":
    main()

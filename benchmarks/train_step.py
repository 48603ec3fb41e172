"""Images/s of the real training loop against a bare step, against diffusers' recipe, and with the VAE in the loop.

    python -m benchmarks.train_step --images path/to/cifar10     # after `make encode CONFIG=configs/cifar10.yaml ...`

Each in a process of its own, a few steps at a time in turn, on the same cached latents and batch size:
(1) `latentmill train`; (2) forward, backward and optimizer step of the same model on tensors that lie in memory, and
nothing else; (3) diffusers' UNet2DModel, its widths chosen for the same FLOPs and
parameters, trained as diffusers' example train_unconditional.py does: DataLoader, DDPMScheduler, clipping, AdamW and
learning rate by its defaults, EMAModel, the loss read in every step, in float32 as its README's command has it, and
again in the precision of (1); (4) with --images, the loop of (1) on batches that the VAE encodes in the loop; (5) a 3x3
convolution alone, for the GFLOP/s that this machine reaches.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import random
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

from benchmarks.peers import RECIPES, matching, step_flops
from data.cache.manifest import Manifest
from data.cache.reader import LatentCache
from data.loader import LatentBatch, LatentLoader
from data.sources.files import open_source
from pipeline.config import Config
from pipeline.config_file import load_config
from pipeline.device import pick_device
from pipeline.optim import make_optimizers
from pipeline.training.distributed import connect
from pipeline.training.metrics import peak_memory
from pipeline.training.setup import build_model, normalization_of
from pipeline.training.trainer import Trainer
from pipeline.vae import FrozenVae, to_pixels
from stages.train import train

Step = Callable[[], None]
RECIPE, ONLINE = "diffusers' recipe", "VAE in the loop"


@click.command()
@click.option("--config", "file", type=click.Path(path_type=Path), default=Path("configs/cifar10.yaml"))
@click.option("--set", "overrides", multiple=True, help="Override a key of the config: key=value.")
@click.option("--images", help="The images of the cache: also train with the VAE in the loop.")
@click.option("--rounds", default=20, show_default=True)
@click.option("--steps", default=16, show_default=True, help="Of each way in a round.")
@click.option("--way", hidden=True, help="Be the process of this way.")
@click.option("--peer", hidden=True, help="The config of UNet2DModel, as JSON.")
def main(
    file: Path, overrides: tuple[str, ...], images: str | None, rounds: int, steps: int, way: str, peer: str
) -> None:
    config = load_config(file, list(overrides))
    if way:
        _take_turns(way, config, rounds, steps, images, json.loads(peer))
        return
    precision = connect(config.train.precision).mixed_precision
    manifest = Manifest.load(config.cache.path)
    model = build_model(config, manifest)
    twin = UNet2DModel(**matching(RECIPES[0], model, manifest))
    flops = {}
    for name, network in (("ours", model), ("UNet2DModel", twin)):
        flops[name] = step_flops(network, model)
        size = sum(p.numel() for p in network.parameters()) / 1e6
        print(f"{name}: {size:.2f} M parameters, {flops[name] / 1e9:.3f} GFLOP an image and step")
    half = precision != "no"
    ways = ["real loop", "bare step", RECIPE, *[f"{RECIPE}, {precision}"] * half, *[ONLINE] * bool(images)]
    ways += ["convolution, no", *[f"convolution, {precision}"] * half]
    command = [sys.executable, "-m", "benchmarks.train_step", *sys.argv[1:], "--peer", twin.to_json_string()]
    with contextlib.ExitStack() as stack:
        results = _run({name: stack.enter_context(_process([*command, "--way", name])) for name in ways}, rounds)
    _summarise(results, flops, precision)


def _process(command: list[str]) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _run(processes: dict[str, subprocess.Popen[str]], rounds: int) -> dict[str, list[dict[str, float]]]:
    """What each process reports of each of its turns; one runs while the others wait."""
    for process in processes.values():
        _reply(process)  # it is warm
    results: dict[str, list[dict[str, float]]] = {name: [] for name in processes}
    for number in range(rounds):
        for name in random.Random(number).sample(list(processes), len(processes)):  # the machine's speed drifts
            pipe = processes[name].stdin
            assert pipe
            pipe.write("\n")
            pipe.flush()
            results[name].append(_reply(processes[name]))
        said = "  ".join(f"{name} {each[-1]['rate']:.1f}" for name, each in results.items())
        print(f"round {number + 1}: {said}", flush=True)
    return results


def _reply(process: subprocess.Popen[str]) -> dict[str, float]:
    assert process.stdout
    return json.loads(process.stdout.readline())


def _summarise(results: dict[str, list[dict[str, float]]], flops: dict[str, float], precision: str) -> None:
    """Medians, of images/s as of ratios within a round."""
    rates = {name: [each["rate"] for each in rounds] for name, rounds in results.items()}
    ways = [name for name in rates if not name.startswith("convolution")]
    for name in ways:
        rate, memory = statistics.median(rates[name]), results[name][-1]["memory_gb"]
        reached = rate * flops["UNet2DModel" if name.startswith(RECIPE) else "ours"] / 1e9
        peak = statistics.median(rates[f"convolution, {'no' if name == RECIPE else precision}"])
        print(
            f"{name:24} {rate:6.1f} images/s {memory:6.2f} GB at most {reached:6.1f} GFLOP/s,"
            f" {reached / peak:.2f} of a 3x3 convolution's {peak:.1f}"
        )
    for name in ways[1:]:
        ratios = sorted(ours / other for ours, other in zip(rates["real loop"], rates[name], strict=True))
        quarter = len(ratios) // 4
        middle = f"half of the rounds: {ratios[quarter]:.2f} to {ratios[-1 - quarter]:.2f}"
        print(f"real loop / {name:24} {statistics.median(ratios):.3f}   ({middle})")


def _take_turns(way: str, config: Config, rounds: int, steps: int, images: str | None, peer: dict[str, Any]) -> None:
    """The process of one way: it says that it is warm, and after each line that it reads what it reached."""
    if way in ("real loop", ONLINE):
        _loop(config, rounds, steps, online=images if way == ONLINE else None)
        return
    if way.startswith("convolution"):
        step, per_step = _convolution(torch.bfloat16 if way.endswith("bf16") else torch.float32)
    else:
        manifest = Manifest.load(config.cache.path)
        latents, labels = (column.to(pick_device()) for column in _latents(config))
        per_step = _batch_size(config)
        if way == "bare step":
            step = _bare_step(build_model(config, manifest), config, latents, labels)
        else:
            step = _recipe(
                UNet2DModel.from_config(peer),
                config,
                latents,
                labels,
                precision="no" if way == RECIPE else way.split(", ")[1],
            )
    for _ in range(3):
        step()
    _report(0.0)
    for _ in sys.stdin:
        started = time.perf_counter()
        for _ in range(steps):
            step()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        _report(steps * per_step / (time.perf_counter() - started))


def _report(rate: float) -> None:
    values = {"rate": rate, "memory_gb": peak_memory(pick_device()) / 1e9}
    print(json.dumps(values), file=sys.__stdout__, flush=True)


def _loop(config: Config, rounds: int, steps: int, online: str | None) -> None:
    """`latentmill train`, which waits for its turn every `steps` steps; `online` encodes these images in the loop."""
    batch = _batch_size(config)
    changes = {"images": (rounds + 1) * steps * batch, "preview_every": 10**9}
    config = config.changed(train=config.train.changed(**changes))
    started = [time.perf_counter()]

    def take_turns(trainer: Trainer) -> None:
        if trainer.step % steps == 0:
            _report(steps * batch / (time.perf_counter() - started[0]))
            if trainer.images_seen < trainer.config.train.images:
                sys.stdin.readline()
            started[0] = time.perf_counter()

    encoding = _encoding(config, online) if online else contextlib.nullcontext()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()), encoding:
        train(config, Path(folder), take_turns)


@contextlib.contextmanager
def _encoding(config: Config, images: str) -> Iterator[None]:
    """A block in which the loader reads images and runs the VAE on them, a batch ahead of the training as it always is,
    one view of each as a trainer without a cache would."""
    data = config.data
    source = open_source(images, image_size=data.image_size, count=data.count, seed=data.seed, matte=data.matte)
    vae = FrozenVae(config.vae.source, pick_device())
    drawn = None if source.size else source.load(range(len(source.keys))).pixels  # to draw them is no encoder's work

    def read(self: LatentLoader, step: int) -> LatentBatch:
        indices = self.indices(step)
        pixels = source.load(indices.tolist()).pixels if drawn is None else drawn[indices]
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
    return normalization_of(config, cache.manifest, None).normalize(means), torch.from_numpy(cache.labels)


def _bare_step(model: nn.Module, config: Config, latents: Tensor, labels: Tensor) -> Step:
    settings, size = config.train, _batch_size(config)
    accelerator = connect(settings.precision)
    model.to(accelerator.device, memory_format=torch.channels_last).train()  # type: ignore[call-overload]
    if settings.compile:
        model.compile()
    optimizers = make_optimizers(
        model, kind=settings.optimizer, lr=1e-4, betas=settings.betas, weight_decay=settings.weight_decay
    )
    x, classes = latents[:size].contiguous(memory_format=torch.channels_last), labels[:size]
    target, times = torch.randn_like(x), torch.rand(size, device=x.device) * 1000

    def step() -> None:
        with accelerator.autocast():
            prediction = model(x, times, classes).sample
        F.mse_loss(prediction.float(), target).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step


def _recipe(model: nn.Module, config: Config, latents: Tensor, labels: Tensor, *, precision: str) -> Step:
    """One step of diffusers' example: each call reads the next batch, trains on it and reads the loss."""
    accelerator = Accelerator(mixed_precision=precision)
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


def _convolution(kind: torch.dtype, channels: int = 192, size: int = 16, batch: int = 32) -> tuple[Step, float]:
    """A 3x3 convolution, forward and backward, in channels_last, and its GFLOP."""
    place: dict[str, Any] = {"device": pick_device(), "dtype": kind, "memory_format": torch.channels_last}
    layer = nn.Conv2d(channels, channels, 3, padding=1).to(**place)
    x = torch.randn(batch, channels, size, size).to(**place).requires_grad_()
    gradient = torch.randn(batch, channels, size, size).to(**place)
    return lambda: layer(x).backward(gradient), batch * 3 * 2 * 9 * channels**2 * size**2 / 1e9


def _batch_size(config: Config) -> int:
    assert config.train.batch_size != "auto"
    return config.train.batch_size


if __name__ == "__main__":
    main()

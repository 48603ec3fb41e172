"""Build what a run starts with: model, normalisation, averages, batches and held-out images."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from data.cache.manifest import MANIFEST, Manifest
from data.cache.reader import LatentCache
from data.loader import LatentLoader
from data.memory import host_memory
from data.text import brief
from pipeline.config import Config, heldout_path
from pipeline.device import local_processes
from pipeline.ema import Average, gamma_of, halflife_weight, power_weight
from pipeline.flops import fitting_rows, training_bytes
from pipeline.latents import Normalization
from pipeline.noise import NoiseProcess
from pipeline.seeds import coordinate_seed
from pipeline.training.checkpoint import EMA, Checkpoint
from pipeline.training.heldout_loss import DRAWS, HeldOut, drawn_images
from pipeline.unet import LatentUNet

_MIN_STEPS = 1000  # of a run with train.batch_size=auto


def build_model(config: Config, manifest: Manifest) -> LatentUNet:
    """Build the model of `config` for the latents of a cache; its weights are a function of train.seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(coordinate_seed("model", config.train.seed))
        model: LatentUNet = LatentUNet(
            in_channels=manifest.latent_channels,
            sample_size=manifest.shape[1],
            num_classes=len(manifest.classes),
            **config.model.model_dump(),
        )
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    return model


def normalization_of(config: Config, manifest: Manifest, checkpoint: Checkpoint | None) -> Normalization:
    """Return how this run's latents are normalised to about zero mean and unit variance.

    A fine-tuned run keeps the normalisation that it started with, which is in its `checkpoint`. With the VAE's numbers:
    (x - shift) * scaling or, if its config has mean and std per channel, (x - mean) * scaling / std, as in diffusers
    0.42's StableDiffusionXLImg2ImgPipeline.prepare_latents.
    """
    if config.train.init and checkpoint:
        return checkpoint.normalization
    if config.train.normalization == "cache":
        return Normalization(manifest.mean, manifest.std)
    vae, channels = manifest.vae, manifest.latent_channels
    if vae.latents_mean and vae.latents_std:
        return Normalization(vae.latents_mean, tuple(std / vae.scaling_factor for std in vae.latents_std))
    return Normalization((vae.shift_factor,) * channels, (1 / vae.scaling_factor,) * channels)


def ema_widths(config: Config) -> tuple[float, ...]:
    """Return the widths of the power-function averages; none if the average is exponential."""
    return config.train.ema_widths if config.train.ema == "power" else ()


def make_averages(model: LatentUNet, config: Config) -> dict[str, Average]:
    """Create the averages of the weights that a run keeps, by the name of their folder in a checkpoint."""
    gammas = [gamma_of(width) for width in ema_widths(config)]
    weights = [partial(power_weight, gamma=gamma) for gamma in gammas] or [
        partial(halflife_weight, halflife=config.train.ema_halflife)
    ]
    return {name: Average(model, weight) for name, weight in zip(EMA, weights, strict=False)}


def with_batch_size(
    config: Config, manifest: Manifest, checkpoint: Checkpoint | None, accelerator: Accelerator
) -> Config:
    """Return `config` with a number for train.batch_size=auto.

    That is the checkpoint's batch size, or one that is doubled as long as the run has 1000 steps and every process fits
    its share into half of the free memory that the latents leave."""
    train = config.train
    if train.batch_size != "auto":
        return config
    if checkpoint:
        return _with_train(config, batch_size=checkpoint.state.train["batch_size"])
    free, latents = _free_memory(accelerator), manifest.committed * manifest.row_bytes
    if train.access in ("auto", "resident") and latents <= free // 2:  # the loader will hold them in memory
        free -= latents
    free //= 2
    with torch.device("meta"):
        model = build_model(config, manifest)
    rows = fitting_rows(
        model, free, averages=2 if train.ema == "power" else 1, half=accelerator.mixed_precision != "no"
    )
    rows = int(accelerator.gather(torch.tensor([rows], device=accelerator.device)).min())
    if not rows:
        raise ValueError(f"train.batch_size: not one image fits into {free / 1e9:.1f} GB: use a smaller model")
    step = accelerator.num_processes * train.accumulate  # images of a batch at one image per process and micro-batch
    limit = max(train.images // _MIN_STEPS, step)
    size = step
    while size * 2 <= limit and size * 2 <= rows * step:
        size *= 2
    accelerator.print(
        f"train: train.batch_size = {size} (auto: memory for {rows * step:,}, at least {_MIN_STEPS} steps)"
    )
    return _with_train(config, batch_size=size)


def open_loader(
    config: Config, cache: LatentCache, accelerator: Accelerator, checkpoint: Checkpoint | None
) -> LatentLoader:
    """Open this process's share of the batches of a run, in the order of its `checkpoint`, if it has one.

    config.train.batch_size must be a number. ValueError if the batch cannot be split evenly, or if some processes hold
    the cache in memory and others stream it.
    """
    train = config.train
    assert train.batch_size != "auto"
    share = accelerator.num_processes * train.accumulate
    if train.batch_size % share:
        raise ValueError(
            f"train.batch_size = {train.batch_size} is not a multiple of {share}, the {accelerator.num_processes}"
            f" processes times train.accumulate = {train.accumulate}: train.batch_size="
            f"{-(-train.batch_size // share) * share} is the next one"
        )
    loader = LatentLoader(
        cache,
        seed=train.seed,
        batch_size=train.batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        device=accelerator.device,
        access=train.access,
        streamed=checkpoint.state.train["access"] == "streamed" if checkpoint else None,
        sharing=local_processes(),
        reserved=_training_bytes(config, cache.manifest, accelerator) if accelerator.device.type == "cuda" else 0,
    )
    if checkpoint and (checkpoint.state.train["access"] == "streamed") != (loader.access == "streamed"):
        kind = "mapped" if loader.access == "streamed" else "streamed"
        raise ValueError(f"train.access: this run started with another order of images: use train.access={kind}")
    streamed = accelerator.gather(torch.tensor([loader.access == "streamed"], device=accelerator.device))
    if streamed.any() != streamed.all():  # the run would have two orders of images
        raise ValueError("train.access = auto: only some machines have memory for the cache: use train.access=streamed")
    accelerator.print(f"train: {len(cache):,} images in {len(cache.manifest.classes)} classes, {loader.describe()}")
    return loader


def open_heldout(config: Config, manifest: Manifest, noise: NoiseProcess) -> HeldOut | None:
    """Open the held-out images of `config`, or return None if it has none; `manifest` is that of the training cache.

    ValueError if they are not encoded, or not in the same way as the training images.
    """
    path = heldout_path(config)
    if path is None:
        return None
    if not (path / MANIFEST).is_file():
        raise ValueError(
            f"data.heldout = {config.data.heldout}: no finished cache of these images at {path}: run encode first"
        )
    cache = LatentCache(path)
    for name, ours, other in (
        ("vae", manifest.vae.weights_sha256, cache.manifest.vae.weights_sha256),
        ("shape", manifest.shape, cache.manifest.shape),
        ("classes", manifest.classes, cache.manifest.classes),
    ):
        if ours != other:
            raise ValueError(
                f"{path / MANIFEST}: its {name} is {brief(other)}, that of {config.cache.path} is"
                f" {brief(ours)}: delete {path} and run encode again"
            )
    images = drawn_images(len(cache))
    moments, labels = (torch.from_numpy(each) for each in (cache.read_verified(images), cache.labels[images]))
    print(f"train: held-out loss on {DRAWS:,} fixed draws from {len(cache):,} images, {cache.manifest.data_source}")
    return HeldOut(moments, labels, noise=noise, channels=manifest.latent_channels, cache=cache.manifest.sha256())


def _with_train(config: Config, **changes: Any) -> Config:
    return config.changed(train=config.train.changed(**changes))


def _free_memory(accelerator: Accelerator) -> int:
    """Return the free bytes for this process: of its GPU, or its share of the machine's memory."""
    if accelerator.device.type == "cuda":
        return torch.cuda.mem_get_info(accelerator.device)[0]
    return host_memory().available // local_processes()


def _training_bytes(config: Config, manifest: Manifest, accelerator: Accelerator) -> int:
    """Return the bytes that the model needs on a GPU, with this process's share of a batch."""
    train = config.train
    assert train.batch_size != "auto"
    with torch.device("meta"):
        model = build_model(config, manifest)
    averages = 2 if train.ema == "power" else 1
    fixed, image = training_bytes(model, averages=averages, half=accelerator.mixed_precision != "no")
    return fixed + int(image * train.batch_size / (accelerator.num_processes * train.accumulate))

"""Stage two: train the denoiser on cached latents."""

from __future__ import annotations

import json
import os
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from data.cache import LatentCache
from data.loader import LatentLoader
from data.manifest import Manifest
from data.storage import append_line, publish
from pipeline.checkpoint import Checkpoint, load_training_state, newest_checkpoint, save_checkpoint
from pipeline.ema import Ema
from pipeline.noise import NoiseProcess
from pipeline.objective import Draws, Normalization, coordinate_seed, diffusion_loss, draw_latents, lr_at
from pipeline.sampling import draw, guided, image_generators, make_scheduler
from pipeline.unet import LatentUNet
from pipeline.vae import FrozenVae, to_images
from stages.config import Config, dump_config
from stages.pictures import contact_sheet, save_png
from stages.tracker import Tracker

PREVIEWS_PER_CLASS = 4
PREVIEW_CLASSES = 10


def train(config: Config, run: Path) -> None:
    """Train until `train.images` images were seen, from the newest checkpoint of `run` where there is one."""
    accelerator = Accelerator(mixed_precision=config.train.precision)
    if int(os.environ.get("WORLD_SIZE", "1")) != accelerator.num_processes:
        raise ValueError(
            f"WORLD_SIZE = {os.environ['WORLD_SIZE']}, but the processes are not connected: without a GPU, set"
            " ACCELERATE_USE_CPU=true"
        )
    manifest = Manifest.load(config.cache.path)
    checkpoint = find_checkpoint(config, run, manifest, accelerator)
    if checkpoint and checkpoint.images_seen >= config.train.images:
        accelerator.print(f"train: all done: {checkpoint.images_seen:,} images seen in {run}")
        return
    Trainer(config, run, accelerator, checkpoint).run_to_the_end()


def find_checkpoint(config: Config, run: Path, manifest: Manifest, accelerator: Accelerator) -> Checkpoint | None:
    """The newest whole checkpoint of a run, if it has any; ValueError if it does not fit the config or the cache."""
    checkpoint, passed_over = newest_checkpoint(run)
    for line in passed_over:
        accelerator.print(f"train: passed over {line}")
    if checkpoint:
        check_resumable(checkpoint, config, manifest)
    elif passed_over:
        raise ValueError(f"{run}/checkpoints: none is whole ({passed_over[0]}): move the folder away to start anew")
    return checkpoint


class Trainer:
    """The state of a run and its loop. One clock, images seen, drives all that happens."""

    def __init__(self, config: Config, run: Path, accelerator: Accelerator, checkpoint: Checkpoint | None) -> None:
        self.config, self.run, self.accelerator = config, run, accelerator
        self.device = accelerator.device
        cache = LatentCache(config.cache.path)
        self.verification = ThreadPoolExecutor(1).submit(cache.verify) if accelerator.is_local_main_process else None
        self.manifest = cache.manifest
        self.vae = FrozenVae(config.vae.source, self.device)
        self.vae.check(self.manifest.vae, config.cache.path)
        self.noise = NoiseProcess(**config.noise.model_dump())
        self.normalization = _normalization(config, self.manifest)
        self.loader = LatentLoader(
            cache,
            seed=config.train.seed,
            batch_size=config.train.batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            device=self.device,
            access=config.train.access,
        )
        classes = len(self.manifest.classes)
        accelerator.print(f"train: {len(cache):,} images in {classes} classes, {self.loader.describe()}")
        self.model = build_model(config, self.manifest).to(self.device, memory_format=torch.channels_last)
        self.ema = Ema(self.model, config.train.ema_halflife)
        groups = _decay_groups(self.model, config)
        optimizer = torch.optim.AdamW(groups, lr=config.train.lr, betas=config.train.betas, fused=True)
        self.step = 0
        if checkpoint:
            if checkpoint.state["streamed"] != (self.loader.access == "streamed"):
                kind = "mapped" if self.loader.access == "streamed" else "streamed"
                raise ValueError(f"train.access: {run} began in another order of images: give train.access={kind}")
            load_training_state(checkpoint, self.model, self.ema, optimizer)
            self.step = checkpoint.state["step"]
            accelerator.print(f"train: continuing {run} at {self.images_seen:,} images")
        self.prepared, self.optimizer = accelerator.prepare(self.model, optimizer)
        if checkpoint and accelerator.scaler:
            accelerator.scaler.load_state_dict(checkpoint.state["scaler"])

    @property
    def images_seen(self) -> int:
        return self.step * self.config.train.batch_size

    def run_to_the_end(self) -> None:
        """The training loop."""
        settings, main = self.config.train, self.accelerator.is_main_process
        if main:
            self._start_run_folder()
        window = _Window(self.device)
        self.prepared.train()
        with (
            Tracker(settings.tracker, self.run, self.config, active=main) as tracker,
            self._progress_bar(main) as bar,
        ):
            while self.images_seen < settings.images:
                self._check_cache(wait=False)
                before = self.images_seen
                window.add(*self._update())
                bar.update(settings.batch_size)
                saving = self._due(before, settings.checkpoint_every)
                previewing = self._due(before, settings.preview_every)
                logging = saving or self._due(before, settings.log_every)
                if logging or self.device.type == "cpu":  # elsewhere a look at the loss would wait for the device
                    window.check_finite(self.step)
                if logging:
                    window.sums = self.accelerator.reduce(window.sums, "mean")
                    values = window.close(self.step, settings.batch_size, self.optimizer.param_groups[0]["lr"])
                if not main:
                    continue
                if logging:
                    append_line(self.run / "log.jsonl", json.dumps(values))
                    tracker.log(values)
                    bar.set_postfix(loss=f"{values['loss']:.4f}")
                if previewing:
                    self._preview()
                if saving:  # last: once it is there, a rerun does not come back to this step
                    self._save()
                if saving or previewing:
                    window.restart_clock()
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"train: {self.images_seen:,} images seen, checkpoints and previews in {self.run}")

    def _progress_bar(self, shown: bool) -> tqdm:
        return tqdm(
            desc="train",
            total=self.config.train.images,
            initial=self.images_seen,
            unit=" images",
            mininterval=2,
            disable=not shown,
        )

    def _update(self) -> tuple[Tensor, Tensor]:
        """One optimizer step; the loss and the norm of the gradient, both on the device."""
        settings = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(
                self.images_seen, peak=settings.lr, images=settings.images, warmup=settings.warmup, decay=settings.decay
            )
        if self.config.model.dropout:  # the only draw that cannot be handed a generator
            torch.manual_seed(coordinate_seed("dropout", settings.seed, self.step, self.accelerator.process_index))
        batch = self.loader.batch(self.step)
        shape = (settings.batch_size, self.manifest.latent_channels, *self.manifest.shape[1:])
        draws = Draws.at(
            self.noise,
            seed=settings.seed,
            step=self.step,
            shape=shape,
            views=len(self.manifest.views),
            label_dropout=settings.label_dropout,
            device=self.device,
        ).part(self.loader.part)
        latents = self.normalization.normalize(draw_latents(batch.moments, draws, self.manifest.latent_channels))
        loss = diffusion_loss(self.prepared, self.noise, latents, batch.labels, draws, self.model.null_class)
        self.accelerator.backward(loss)
        norm = self.accelerator.clip_grad_norm_(self.prepared.parameters(), settings.grad_clip)
        if settings.precision == "fp16":  # a step whose gradient overflows is skipped, and the scale lowered
            norm = norm.nan_to_num(nan=0.0, posinf=0.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        self.ema.update(self.model, images_seen=self.images_seen, batch_size=settings.batch_size)
        return loss.detach(), norm

    def _due(self, before: int, every: int) -> bool:
        """Whether the step that began at `before` images passed a multiple of `every`, or ended the run."""
        return before // every != self.images_seen // every or self.images_seen >= self.config.train.images

    def _start_run_folder(self) -> None:
        """Write the resolved config, and drop log lines that a crash left after the checkpoint."""
        publish(self.run / "config.yaml", dump_config(self.config).encode())
        log = self.run / "log.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
        publish(log, "".join(line + "\n" for line in kept).encode())

    def _check_cache(self, *, wait: bool) -> None:
        """ValueError when the hash of a file of the cache has been found to differ; with `wait`, of any file."""
        if self.verification and (wait or self.verification.done()):
            self.verification.result()
            self.verification = None

    def _save(self) -> None:
        self._check_cache(wait=True)  # nothing that was learnt from damaged latents is kept
        state = {
            "step": self.step,
            "images_seen": self.images_seen,
            "classes": self.manifest.classes,
            "noise": asdict(self.noise),
            "normalization": _as_json(self.normalization),
            "image_size": self.manifest.image_size,
            "vae": self.manifest.vae.model_dump(mode="json"),
            "data_fingerprint": self.manifest.data_fingerprint,
            "streamed": self.loader.access == "streamed",
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        }
        save_checkpoint(
            self.run, model=self.model, ema=self.ema, optimizer=self.optimizer, state=state, keep=self.config.train.keep
        )

    @torch.inference_mode()
    def _preview(self) -> None:
        """A contact sheet of samples from the averaged weights, at fixed seeds."""
        model = build_model(self.config, self.manifest).to(self.device, memory_format=torch.channels_last).eval()
        model.load_state_dict(self.ema.state_dict())
        names = self.manifest.classes[:PREVIEW_CLASSES]
        labels = torch.arange(len(names), device=self.device).repeat(PREVIEWS_PER_CLASS)
        settings = self.config.sample
        latents = draw(
            guided(model, labels, settings.guidance),
            make_scheduler(settings.scheduler, self.noise),
            steps=settings.steps,
            shape=(self.manifest.latent_channels, *self.manifest.shape[1:]),
            generators=image_generators(settings.seed, list(range(len(labels)))),
            device=self.device,
        )
        parts = self.normalization.denormalize(latents).split(len(names))  # a larger VAE has no room for all at once
        images = torch.cat([to_images(self.vae.decode(part)) for part in parts]).cpu().numpy()
        save_png(contact_sheet(images, labels.tolist(), names), self.run / "previews" / f"{self.images_seen:09d}.png")


class _Window:
    """Sums of what the steps since the last log line reported, kept on the device: no step waits for them."""

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device)
        self.steps = 0
        self.started = time.monotonic()

    def add(self, loss: Tensor, norm: Tensor) -> None:
        self.sums += torch.stack([loss, norm])
        self.steps += 1

    def check_finite(self, step: int) -> None:
        """FloatingPointError when a loss or gradient since the last line was NaN or infinite."""
        if not self.sums.isfinite().all():
            loss, norm = self.sums.tolist()
            raise FloatingPointError(
                f"train: the loss ({loss}) or its gradient's norm ({norm}) is not finite in the {self.steps} steps up"
                f" to step {step}: lower train.lr, or use train.precision=bf16 for fp16; the same command goes on from"
                " the last checkpoint"
            )

    def close(self, step: int, batch_size: int, lr: float) -> dict[str, Any]:
        """The log line of the window, which starts anew."""
        seconds = time.monotonic() - self.started
        loss, norm = (self.sums / self.steps).tolist()
        values = {
            "step": step,
            "images_seen": step * batch_size,
            "loss": loss,
            "gradient_norm": norm,
            "lr": lr,
            "images_per_second": round(self.steps * batch_size / seconds, 1),
        }
        self.sums.zero_()
        self.steps = 0
        self.restart_clock()
        return values

    def restart_clock(self) -> None:
        self.started = time.monotonic()


def _as_json(normalization: Normalization) -> dict[str, list[float]]:
    return {name: list(values) for name, values in asdict(normalization).items()}


def _normalization(config: Config, manifest: Manifest) -> Normalization:
    if config.train.normalization == "cache":
        return Normalization(manifest.mean, manifest.std)
    channels = manifest.latent_channels
    return Normalization((manifest.vae.shift_factor,) * channels, (1 / manifest.vae.scaling_factor,) * channels)


def build_model(config: Config, manifest: Manifest) -> LatentUNet:
    """The model of `config` for the latents of a cache, with weights that are a function of train.seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(coordinate_seed("model", config.train.seed))
        model: LatentUNet = LatentUNet(
            in_channels=manifest.latent_channels,
            sample_size=manifest.shape[1],
            num_classes=len(manifest.classes),
            **config.model.model_dump(),
        )
    return model


def check_resumable(checkpoint: Checkpoint, config: Config, manifest: Manifest) -> None:
    """ValueError when `checkpoint` cannot go on under this config and cache, naming what differs."""
    stored = json.loads((checkpoint.path / "ema" / "config.json").read_text(encoding="utf-8"))
    ours = {**config.model.model_dump(mode="json"), "num_classes": len(manifest.classes)}
    pairs = [(f"model.{name}", stored[name], value) for name, value in ours.items()]
    pairs += [
        (f"noise.{name}", checkpoint.state["noise"][name], value) for name, value in config.noise.model_dump().items()
    ]
    pairs += [
        ("classes", checkpoint.state["classes"], list(manifest.classes)),
        ("data fingerprint", checkpoint.state["data_fingerprint"], manifest.data_fingerprint),
        ("train.normalization", checkpoint.state["normalization"], _as_json(_normalization(config, manifest))),
        ("vae", checkpoint.state["vae"]["weights_sha256"], manifest.vae.weights_sha256),
        ("data.image_size", checkpoint.state["image_size"], manifest.image_size),
        ("train.batch_size", checkpoint.images_seen / checkpoint.state["step"], config.train.batch_size),
    ]
    for name, old, new in pairs:
        if old != new:
            raise ValueError(f"{checkpoint.path}: its {name} is {old}, this run has {new}: choose another --run")


def _decay_groups(model: LatentUNet, config: Config) -> list[dict[str, Any]]:
    """Weight decay for matrices and kernels alone: not for biases, norms, positions or class embeddings."""
    decayed = [
        p for name, p in model.named_parameters() if p.ndim >= 2 and "positions" not in name and "classes" not in name
    ]
    chosen = {id(p) for p in decayed}
    rest = [p for p in model.parameters() if id(p) not in chosen]
    return [{"params": decayed, "weight_decay": config.train.weight_decay}, {"params": rest, "weight_decay": 0.0}]

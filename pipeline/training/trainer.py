"""Run the training loop; images seen drive the learning rate, the averages, checkpoints and previews."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable
from concurrent.futures import wait
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch import Tensor

from data.cache.reader import LatentCache
from data.storage import sweep
from data.text import printable
from pipeline.config import Config
from pipeline.flops import Cost
from pipeline.latents import Draws, draw_latents
from pipeline.loss import MicroBatch, Objective
from pipeline.noise import NoiseProcess
from pipeline.optim import FiniteGuard, clip_gradients, lr_at, make_optimizers, set_lr
from pipeline.seeds import coordinate_seed
from pipeline.training.checkpoint import (
    AVERAGES,
    CHECKPOINTS,
    EMA,
    Checkpoint,
    gather_full,
    load_training_state,
    prune_checkpoints,
    save_averages,
    save_checkpoint,
    set_aside_newer,
)
from pipeline.training.distributed import Preemption, computer, describe, in_background
from pipeline.training.metrics import Window, begin_log, log_line, log_measured, optional
from pipeline.training.plots import draw_curves
from pipeline.training.previews import Previews, due, gather_weights, preview_missing
from pipeline.training.resume import changes_since, load_init, settings_of
from pipeline.training.run_folder import begin_run_folder
from pipeline.training.setup import build_model, ema_widths, make_averages, normalization_of, open_loader
from pipeline.training.state import CacheIdentity, RunState
from pipeline.training.tracker import Tracker
from pipeline.unet import LatentUNet

_GRACE = 10  # seconds that a save on a signal waits for the verification of the cache


class Trainer:
    """Holds the state of a run and runs its training loop; everything is scheduled by images seen."""

    def __init__(self, config: Config, run: Path, accelerator: Accelerator, checkpoint: Checkpoint | None) -> None:
        """Set up a run of `config` in the folder `run`, resumed from `checkpoint` or from scratch."""
        settings = config.train
        assert settings.batch_size != "auto"
        torch.backends.cudnn.benchmark = True  # all training steps have the same shapes
        self.config, self.run, self.accelerator = config, run, accelerator
        self.device, self.main = accelerator.device, accelerator.is_main_process
        self.sharded = accelerator.distributed_type == "FSDP"
        if self.sharded and settings.optimizer == "muon":
            raise ValueError("train.optimizer = muon: it needs whole matrices, which FSDP shards: use adamw")
        self.batch_size: int = settings.batch_size
        self.step, self.preview_missing = 0, False

        # the latents; the cache is verified in the background
        cache = LatentCache(config.cache.path)
        self.verification = in_background(cache.verify) if accelerator.is_local_main_process else None
        self.manifest, self.class_counts = cache.manifest, cache.class_counts()
        labelled = int(self.class_counts.sum()) / len(cache)
        self.without_class = 1 - (1 - settings.label_dropout) * labelled  # share of images trained without their class
        self.noise = NoiseProcess(**config.noise.model_dump())
        self.normalization = normalization_of(config, self.manifest, checkpoint)
        self.previews = None
        if self.main:
            self.previews = Previews(
                config,
                run,
                self.manifest,
                class_counts=self.class_counts,
                without_class=self.without_class,
                noise=self.noise,
                device=self.device,
            )
        self.loader = open_loader(config, cache, accelerator, checkpoint)

        # the model and its loss
        model = build_model(config, self.manifest)
        self.window = Window(accelerator, Cost.of(model).flops)
        accelerator.print(
            f"train: {model.num_parameters() / 1e6:,.1f} M parameters, {self.window.flops / 1e9:,.2f} GFLOP per image;"
            f" batches of {self.batch_size} on {describe(accelerator)}"
        )
        if settings.init and not checkpoint:
            self.normalization, line = load_init(model, config, self.manifest)
            accelerator.print(f"train: {line}")
        self.objective = Objective(model, self.noise, settings.weighting)
        layout = torch.contiguous_format if self.sharded else torch.channels_last  # FSDP cannot shard the latter
        self.objective.to(device=self.device, memory_format=layout)  # type: ignore[call-overload]

        # the optimizers, and the averages of the weights
        self.optimizers = make_optimizers(
            self.objective,
            kind=settings.optimizer,
            lr=settings.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        if settings.compile:
            model.compile()
        self.prepared, *self.prepared_optimizers = accelerator.prepare(self.objective, *self.optimizers)
        self.guard = FiniteGuard(self.device, deferred=self.can_defer())
        self.averages = make_averages(self.model, config)
        if checkpoint:
            self._resume(checkpoint)
            self.preview_missing = preview_missing(run, checkpoint, config, accelerator)

    @property
    def images_seen(self) -> int:
        return self.step * self.batch_size

    @property
    def model(self) -> LatentUNet:
        return self.objective.model

    def run_to_the_end(self, on_step: Callable[[Trainer], None] | None = None) -> None:
        """Run the training loop until `train.images` images are seen; call `on_step` at the end of every step.

        After a SIGINT, SIGTERM or SIGUSR1, save a checkpoint and raise SystemExit with 128 + the signal's number.
        """
        settings = self.config.train
        self._begin_folder()
        self.prepared.train()
        tracker = Tracker(settings.tracker, self.run, self.config, images_seen=self.images_seen, active=self.main)
        with Preemption(self.accelerator) as preemption, tracker:
            if self.preview_missing:  # that of the checkpoint from which the run resumes
                with self.window.paused():
                    self._preview(tracker, preview=True, score=self._due(settings.eval_every))
            self.window.restart_clock()
            while self.images_seen < settings.images:
                # one optimizer step; where `can_defer`, the host does not wait for the device
                self._check_cache(wait=False)
                self.train_step()
                # every train.log_every images: a line of the log
                if self._due(settings.log_every):
                    self._log(tracker)
                # every checkpoint_every, preview_every and eval_every images, and at the end: first the checkpoint,
                # which is worth most; then held-out loss and samples, or a score, of the averaged weights
                saving, previewing, scoring = map(
                    self._due, (settings.checkpoint_every, settings.preview_every, settings.eval_every)
                )
                with self.window.paused() if saving or previewing or scoring else contextlib.nullcontext():
                    if saving:
                        self._save(scheduled=True)
                    if previewing or scoring:
                        self._preview(tracker, preview=previewing, score=scoring)
                if on_step:
                    on_step(self)
                # if any process received a signal: save and exit
                if (number := preemption.agreed_signal()) and self.images_seen < settings.images:
                    self._save_and_exit(number, saved=saving)
        self.accelerator.wait_for_everyone()
        self.accelerator.print(f"train: {self.images_seen:,} images seen, checkpoints and previews in {self.run}")

    def _begin_folder(self) -> None:
        """Remove or rename what the run left in its folder after the point where it now starts or resumes."""
        if self.main:
            for kind in (CHECKPOINTS, AVERAGES):
                sweep(self.run / kind)
            begin_run_folder(self.run, self.config, from_scratch=not self.step)
            logged = (self.step - self.window.steps) * self.batch_size
            begin_log(self.run, self.images_seen, logged, measured_again=self.preview_missing)

    def can_defer(self) -> bool:
        """Return whether the device itself can skip steps that are not finite, so that the host need not wait for it.

        On the CPU that gains nothing, and tensors sharded by FSDP do not support it."""
        return self.device.type == "cuda" and not self.sharded

    def _resume(self, checkpoint: Checkpoint) -> None:
        state, accelerator = checkpoint.state, self.accelerator
        load_training_state(checkpoint, self.objective, self.averages, self.optimizers)
        self.step = state.step
        assert state.window
        self.window.load(state.window)
        if accelerator.scaler and state.scaler:
            accelerator.scaler.load_state_dict(state.scaler)
        accelerator.print(f"train: continuing {self.run} at {self.images_seen:,} images")
        for line in changes_since(checkpoint, self.config.train, self.loader.access, accelerator):
            accelerator.print(f"train: {line}")

    def train_step(self) -> None:
        """Run one optimizer step: forward, backward, clip, update, average."""
        settings = self.config.train
        lr = lr_at(
            self.images_seen,
            schedule=settings.schedule,
            peak=settings.lr,
            images=settings.images,
            warmup=settings.warmup,
            decay=settings.decay,
        )
        set_lr(self.optimizers, lr)
        batches = self._micro_batches(self.step)
        loss, errors = self._backward(batches)
        norm = self._clip(settings.grad_clip)
        if (bad := self._bad_step(loss, norm)) is not None:
            self._stop_at(bad)
        for optimizer in self.prepared_optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        for average in self.averages.values():
            average.update(images_seen=self.images_seen, batch_size=self.batch_size)
        norm = norm.nan_to_num(nan=0.0, posinf=0.0)  # not finite in a step that fp16's loss scaler skipped
        self.window.add(loss, norm, errors, torch.cat([batch.times for batch in batches]))

    def _backward(self, batches: list[MicroBatch]) -> tuple[Tensor, Tensor]:
        """Accumulate the gradients of micro-batches; return their mean loss and the error of each image."""
        accelerator = self.accelerator
        self._seed_dropout(self.step)
        losses, errors = [], []
        for number, batch in enumerate(batches, 1):
            with contextlib.nullcontext() if number == len(batches) else accelerator.no_sync(self.prepared):
                with accelerator.autocast():
                    loss, error = self.prepared(*batch)
                accelerator.backward(loss / len(batches))
            losses.append(loss.detach())
            errors.append(error)
        return torch.stack(losses).mean(), torch.cat(errors)

    def _bad_step(self, loss: Tensor, norm: Tensor) -> int | None:
        """Return the first step with a NaN or infinite gradient, or None if none is known yet. In fp16 the loss is
        checked instead, because the loss scaler skips a step whose gradient overflows, and lowers its scale."""
        if self.accelerator.scaler:
            return self.guard.check(self.step, self.accelerator.reduce(loss.clone(), "mean"), [])
        return self.guard.check(self.step, norm, self.optimizers)

    def _clip(self, limit: float) -> Tensor:
        """Clip the gradient to `limit`, here or in the optimizer step; return its norm before, over all shards."""
        if self.sharded:
            return gather_full(self.accelerator.clip_grad_norm_(list(self.prepared.parameters()), limit))
        self.accelerator.unscale_gradients()
        return clip_gradients(self.optimizers, limit, in_step=not self.accelerator.scaler)

    def _micro_batches(self, step: int) -> list[MicroBatch]:
        """Return this process's share of the batch of `step`, in `train.accumulate` micro-batches."""
        settings = self.config.train
        with self.window.waiting():
            batch = self.loader.batch(step)
        draws = Draws.at(
            self.noise,
            seed=settings.seed,
            step=step,
            shape=(self.batch_size, self.manifest.latent_channels, *self.manifest.shape[1:]),
            views=len(self.manifest.views),
            label_dropout=settings.label_dropout,
            device=self.device,
        ).part(self.loader.part)
        latents = self.normalization.normalize(draw_latents(batch.moments, draws, self.manifest.latent_channels))
        classes = torch.where(draws.dropped | (batch.labels < 0), self.model.null_class, batch.labels)
        columns = (latents, draws.noise, draws.times, classes)
        chunks = (column.chunk(settings.accumulate) for column in columns)
        return [MicroBatch(*parts) for parts in zip(*chunks, strict=True)]

    def _seed_dropout(self, step: int) -> None:
        if self.config.model.dropout:  # the only random draw that takes no generator
            coordinates = ("dropout", self.config.train.seed, step, self.accelerator.process_index)
            torch.manual_seed(coordinate_seed(*coordinates))

    def _stop_at(self, step: int) -> NoReturn:
        """Raise a FloatingPointError that names the images of `step` whose loss is not finite.

        No weight has changed since, and all randomness is a function of the step, so it can be computed again."""
        self._seed_dropout(step)
        with torch.no_grad(), self.accelerator.autocast():
            errors = torch.cat([self.prepared(*batch)[1] for batch in self._micro_batches(step)])
        bad = self.loader.indices(step)[~errors.isfinite().cpu().numpy()]
        cache = self.loader.cache
        keys = cache.keys() if len(bad) else []
        named = [f"{printable(keys[i])} of {cache.shard_of(i).file}" for i in bad[:3]] + ["..."] * (len(bad) > 3)
        share = f"{len(errors)} images of process {self.accelerator.process_index}"
        what = f"{len(bad)} of the {share} ({', '.join(named)})" if named else f"none of the {share}"
        raise FloatingPointError(
            f"train: step {step + 1}: the gradient is NaN or infinite; so is the loss of {what}. No weight was updated"
            " with it, and no checkpoint contains it. If all images are affected, lower train.lr; run the same command"
            " again to resume from the last checkpoint"
        )

    def _check_finite(self) -> None:
        """Raise FloatingPointError if a step was not finite; called before anything is logged or saved."""
        if (bad := self.guard.bad_step()) is not None:
            self._stop_at(bad)
        scaler = self.accelerator.scaler
        if scaler and scaler.get_scale() < 1:
            raise FloatingPointError(
                f"train: up to step {self.step}: gradients overflow at every loss scale: use train.precision=bf16"
            )

    def _due(self, every: int) -> bool:
        """Return whether the last step passed a multiple of `every` images, or ended the run."""
        return due(self.images_seen - self.batch_size, self.images_seen, every, self.config.train.images)

    def _log(self, tracker: Tracker) -> None:
        self._check_finite()
        lr = self.optimizers[0].param_groups[0]["lr"]
        values = self.window.close(step=self.step, batch_size=self.batch_size, lr=lr)
        if self.main:
            log_line(self.run, values, self.config.train.images)
            tracker.log(values)

    def _check_cache(self, *, wait: bool) -> None:
        """Raise ValueError if verification has found a damaged file of the cache; with `wait`, let it finish first."""
        if self.verification and (wait or self.verification.done()):
            self.verification.result()
            self.verification = None

    def _save(self, *, scheduled: bool) -> None:
        """Save a checkpoint; if it is `scheduled`, also save the power-function averages, which are kept for good."""
        self._check_finite()
        self._check_cache(wait=True)  # never save weights that were trained on damaged latents
        self.accelerator.wait_for_everyone()  # other machines have verified their files, too
        settings = self.config.train
        state = RunState(
            step=self.step,
            images_seen=self.images_seen,
            train=settings_of(settings, self.loader.access),
            classes=self.manifest.classes,
            class_counts=tuple(self.class_counts.tolist()),
            without_class=self.without_class,
            noise=self.noise,
            normalization=self.normalization,
            image_size=self.manifest.image_size,
            vae=self.manifest.vae,
            cache=CacheIdentity.of(self.manifest),
            widths=ema_widths(self.config),
            computer=computer(self.accelerator),
            scaler=self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
        )
        if self.main:
            for path in set_aside_newer(self.run, self.images_seen):
                print(f"train: renamed to {path}: damaged, or newer than where this run resumed", flush=True)
        if state.widths and scheduled:
            save_averages(self.run, model=self.model, averages=self.averages, state=state, writing=self.main)
        save_checkpoint(
            self.run,
            objective=self.objective,
            averages=self.averages,
            optimizers=self.optimizers,
            state=state.changed(window=self.window.state()),
            writing=self.main,
        )
        if self.main:
            prune_checkpoints(
                self.run,
                keep=settings.keep,
                keep_every=settings.keep_every,
                interval=settings.checkpoint_every,
                batch_size=self.batch_size,
            )

    def _save_and_exit(self, number: int, *, saved: bool) -> NoReturn:
        """Save, unless that was just done or verification takes too long, and exit with status 128 + `number`."""
        name = signal.Signals(number).name
        late = self.verification is not None and not wait([self.verification], _GRACE).done
        if self.accelerator.reduce(torch.tensor(float(late), device=self.device), "sum"):  # all decide the same
            self.accelerator.print(f"train: {name}: the cache is not verified yet, so nothing new is saved")
        else:
            if not saved:
                self._save(scheduled=False)
            self.accelerator.wait_for_everyone()  # one is still writing, and torchrun kills all when one exits
            self.accelerator.print(
                f"train: {name}: saved at {self.images_seen:,} images; run the same command again to resume"
            )
        raise SystemExit(128 + number)

    def _preview(self, tracker: Tracker, *, preview: bool, score: bool) -> None:
        """Measure held-out loss or quick score of the averaged weights, publish samples, and draw the curves."""
        self._check_finite()
        weights = gather_weights(self.averages[EMA[0]], self.accelerator)  # all processes take part
        if not self.previews:
            return
        model = self.previews.load(weights)
        measured = self.previews.measure(model, self.normalization, heldout=preview, score=score)
        if measured:
            values = {"step": self.step, "images_seen": self.images_seen, **measured}
            log_measured(self.run, values, self.config.train.images)
            tracker.log(values)
        if preview:
            self.previews.publish(model, self.normalization, self.images_seen)
        with optional("curves.png"):
            draw_curves(self.run)

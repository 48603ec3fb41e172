"""Stage two: train the denoiser on cached latents."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import torch

from data.cache.manifest import Manifest
from data.locks import claim
from data.storage import probe
from pipeline.config import Config
from pipeline.training.distributed import connect
from pipeline.training.previews import preview_missing
from pipeline.training.resume import check_resumable, find_checkpoint
from pipeline.training.run_folder import check_run_folder
from pipeline.training.setup import with_batch_size
from pipeline.training.trainer import Trainer


def train(config: Config, run: Path, on_step: Callable[[Trainer], None] | None = None) -> None:
    """Train until `train.images` images are seen, from the newest checkpoint of `run` if it has one.

    `on_step` is called at the end of every step. After a SIGINT, SIGTERM or SIGUSR1, a checkpoint is saved and
    SystemExit raised, with 128 + the signal's number.
    """
    check_run_folder(run, "--run", cache=config.cache.path)
    probe(run, "--run")
    accelerator = connect(config.train.precision)
    with claim(run / ".locks" / "train", "training") if accelerator.is_main_process else contextlib.nullcontext():
        manifest = Manifest.load(config.cache.path)
        checkpoint = find_checkpoint(run, accelerator)
        config = with_batch_size(config, manifest, checkpoint, accelerator)
        if checkpoint:
            check_resumable(checkpoint, config, manifest)
            finished = checkpoint.images_seen >= config.train.images
            if finished and not preview_missing(run, checkpoint, config, accelerator):
                accelerator.print(f"train: all done: {checkpoint.images_seen:,} images seen in {run}")
                return
        try:
            Trainer(config, run, accelerator, checkpoint).run_to_the_end(on_step)
            accelerator.end_training()
        except torch.OutOfMemoryError as error:
            raise RuntimeError(
                f"out of memory with train.batch_size = {config.train.batch_size}: try train.accumulate=2,"
                " train.gradient_checkpointing=true or train.batch_size=auto"
            ) from error

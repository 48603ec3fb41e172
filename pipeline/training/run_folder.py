"""The folder of a run: a marker tells it from others, and what an earlier run left there is set aside, never lost."""

from __future__ import annotations

import os
from pathlib import Path

from data.storage import publish, set_aside
from pipeline.config import Config
from pipeline.config_file import dump_config, load_config
from pipeline.training.checkpoint import AVERAGES, checkpoint_folders
from pipeline.training.metrics import LOG

# A file of its own, not a line in config.yaml, which people copy; hidden, so that it stays when they clear the folder.
MARKER = ".latentmill-run"
CONFIG = "config.yaml"
EVAL = "eval"
_OURS = ("samples", EVAL)  # which other stages write without a run being trained here
_ADDED_TO = (LOG, "previews", AVERAGES, "wandb.json", "tensorboard")  # by a run that goes on, not by one from nothing


def check_run_folder(run: Path, option: str, *, cache: Path | None = None) -> None:
    """ValueError, naming `option`, where the folder `run` holds files and is no run: none of them is touched.

    A run has a marker or checkpoints. A folder may also hold nothing but hidden files, samples, evaluations, the run's
    own `cache` and a config.yaml that is a config of this project.
    """
    if not run.is_dir() or (run / MARKER).exists() or checkpoint_folders(run):
        return
    ours = {(run / name).resolve() for name in _OURS} | ({cache.resolve()} if cache else set())
    for folder, folders, files in os.walk(run):
        folders[:] = sorted(name for name in folders if name[0] != "." and Path(folder, name).resolve() not in ours)
        for file in (Path(folder, name) for name in sorted(files) if name[0] != "."):
            if file != run / CONFIG or _config_of(run) is None:
                what = f"{run} holds {file.relative_to(run)} and no {MARKER}, so it is not the folder of a run"
                raise ValueError(f"{option}: {what}: choose an empty or a new one")


def begin_run_folder(run: Path, config: Config, *, anew: bool) -> None:
    """Mark `run` and publish the resolved config in it. What an earlier run left there that was not continued (`anew`),
    and a config.yaml that says something else, is set aside under another name, which is printed."""
    publish(run / MARKER, b"")
    if anew:
        left = [set_aside(run / name) for name in _ADDED_TO if _holds_something(run / name)]
        if left:
            names = ", ".join(path.name for path in left)
            print(f"train: no checkpoint in {run}, so it begins anew; what was there is now {names}", flush=True)
    if _config_of(run) == config:
        return
    if (run / CONFIG).exists():
        print(f"train: {run / CONFIG} said something else: it is now {set_aside(run / CONFIG).name}", flush=True)
    publish(run / CONFIG, dump_config(config).encode())


def _config_of(run: Path) -> Config | None:
    """What the config.yaml in `run` says, if it is a config of this project."""
    try:
        return load_config(run / CONFIG)
    except ValueError:
        return None


def _holds_something(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0

"""Check and prepare the folder of a run: a marker file identifies it; files of an earlier run are renamed."""

from __future__ import annotations

import os
from pathlib import Path

from data.storage import publish, set_aside
from pipeline.config import Config
from pipeline.config_file import dump_config, load_config
from pipeline.training.checkpoint import AVERAGES, checkpoint_folders
from pipeline.training.metrics import LOG

# A separate file, because people copy config.yaml; hidden, so that it stays when they clear the folder.
MARKER = ".latentmill-run"
CONFIG = "config.yaml"
EVAL = "eval"
_OTHER_STAGES = ("samples", EVAL)  # outputs of other stages, also where no run was trained
_EXTENDED = (LOG, "previews", AVERAGES, "wandb.json", "tensorboard")  # by a resumed run, not by one from scratch


def check_run_folder(run: Path, option: str, *, cache: Path | None = None) -> None:
    """Raise a ValueError that names `option` if the folder `run` holds files and is not a run; no file is touched.

    A run has a marker or checkpoints. A folder is also accepted if it holds only hidden files, samples, evaluations,
    the run's own `cache` and a config.yaml of this project.
    """
    if not run.is_dir() or (run / MARKER).exists() or checkpoint_folders(run):
        return
    ours = {(run / name).resolve() for name in _OTHER_STAGES} | ({cache.resolve()} if cache else set())
    for folder, folders, files in os.walk(run):
        folders[:] = sorted(name for name in folders if name[0] != "." and Path(folder, name).resolve() not in ours)
        for file in (Path(folder, name) for name in sorted(files) if name[0] != "."):
            if file != run / CONFIG or _config_of(run) is None:
                what = f"{run} holds {file.relative_to(run)} and no {MARKER}, so it is not the folder of a run"
                raise ValueError(f"{option}: {what}: choose an empty or a new folder")


def begin_run_folder(run: Path, config: Config, *, from_scratch: bool) -> None:
    """Mark the folder `run` as a run and publish the resolved config in it.

    A config.yaml with other contents and, if the run starts `from_scratch`, the files of an earlier run are renamed;
    the new names are printed.
    """
    publish(run / MARKER, b"")
    if from_scratch:
        renamed = [set_aside(run / name) for name in _EXTENDED if _has_content(run / name)]
        if renamed:
            names = ", ".join(path.name for path in renamed)
            print(f"train: no checkpoint in {run}: starting from scratch; what it held is now {names}", flush=True)
    if _config_of(run) == config:
        return
    if (run / CONFIG).exists():
        print(f"train: {run / CONFIG} had other contents: it is now {set_aside(run / CONFIG).name}", flush=True)
    publish(run / CONFIG, dump_config(config).encode())


def _config_of(run: Path) -> Config | None:
    """Load the config.yaml in `run`; return None if it is not a config of this project."""
    try:
        return load_config(run / CONFIG)
    except ValueError:
        return None


def _has_content(path: Path) -> bool:
    return any(path.iterdir()) if path.is_dir() else path.exists() and path.stat().st_size > 0

"""Send metrics to wandb or TensorBoard if the config requests it, without prompts or waiting for a server."""

from __future__ import annotations

import netrc
import os
import secrets
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from data.storage import parse_json, publish_json, read
from pipeline.config import Config
from pipeline.training.metrics import optional

_WANDB = "wandb.json"  # in the folder of a run
WAIT = 30  # seconds that a server may take to answer, at the start and at the end


class Tracker:
    """Sends log lines to wandb or TensorBoard, or does nothing."""

    def __init__(self, kind: str, run: Path, config: Config, *, images_seen: int, active: bool) -> None:
        if kind == "tensorboard" and not find_spec("tensorboard"):
            raise ValueError(
                "train.tracker = tensorboard: it is not installed: run make setup, or pip install tensorboard"
            )
        self._wandb = _start_wandb(run, config) if kind == "wandb" and active else None
        self._board = None
        if kind == "tensorboard" and active:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=images_seen + 1)

    def log(self, values: dict[str, Any]) -> None:
        """Send the numbers of one line of log.jsonl; a list becomes one value for each of its entries."""
        flat: dict[str, float] = {}
        for key, entry in values.items():
            places = {f"{key}/{i}": each for i, each in enumerate(entry)} if isinstance(entry, list) else {key: entry}
            flat |= {name: value for name, value in places.items() if isinstance(value, int | float)}
        with optional("tracker"):
            if self._wandb:
                self._wandb.log(flat, step=values["images_seen"])
            if self._board:
                for name, value in flat.items():
                    self._board.add_scalar(name, value, values["images_seen"])
            return
        self._wandb = self._board = None  # a tracker that failed once is not used again

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with optional("tracker"):
            if self._wandb:
                self._wandb.finish(exit_code=int(kind is not None))
            if self._board:
                self._board.close()


def _start_wandb(run: Path, config: Config) -> Any:
    """Start a wandb run whose id is kept in the run's folder, so that a resumed run continues it."""
    import wandb

    options: dict[str, Any] = {
        "project": "latentmill",
        "name": run.resolve().name,
        "id": wandb_id(run),
        "dir": run,
        "config": config.model_dump(mode="json"),
        "settings": wandb.Settings(init_timeout=WAIT, finish_timeout=WAIT),
    }
    mode: Any = os.environ.get("WANDB_MODE", "online")
    if mode == "online" and not _has_key():  # wandb would prompt for one
        mode = "offline"
    if mode == "online":
        try:
            return wandb.init(**options, mode="online", resume="allow")
        except wandb.errors.Error as error:  # no answer, or a key that is not accepted
            print(f"train: wandb: {' '.join(str(error).split())}: continuing offline", flush=True)
            wandb.teardown()  # otherwise the run's id would still be in use
            mode = "offline"
    return wandb.init(**options, mode=mode)


def wandb_id(run: Path) -> str:
    """Return the wandb id that is kept in the folder of a run; a copied run gets a new one, a moved run keeps it."""
    file, here = run / _WANDB, str(run.resolve())
    stored = parse_json(read(file)) if file.exists() else {}
    before = Path(stored.get("folder", here))
    copied = str(before) != here and (before / _WANDB).exists()
    if copied:
        print(f"train: wandb: {run} is a copy of {before}: it becomes a separate wandb run", flush=True)
    kept = {"id": secrets.token_hex(4) if copied or not stored else stored["id"], "folder": here}
    if kept != stored:
        publish_json(file, kept)
    return str(kept["id"])


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname
        return netrc.netrc().authenticators(host or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False

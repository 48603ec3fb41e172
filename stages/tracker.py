"""wandb, where the config asks for it: never a prompt, offline when there is no key."""

from __future__ import annotations

import netrc
import os
from pathlib import Path
from typing import Any

from stages.config import Config


class Tracker:
    """Sends log lines to wandb, or does nothing."""

    def __init__(self, kind: str, run: Path, config: Config, *, active: bool) -> None:
        self.run: Any = None
        if kind == "wandb" and active:
            import wandb

            self.run = wandb.init(
                project="latentmill",
                name=run.name,
                dir=run,
                mode=None if os.environ.get("WANDB_MODE") else "online" if _has_key() else "offline",
                config=config.model_dump(mode="json"),
            )

    def log(self, values: dict[str, Any]) -> None:
        if self.run:
            self.run.log(values, step=values["images_seen"])

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.run:
            self.run.finish(exit_code=int(kind is not None))


def _has_key() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False

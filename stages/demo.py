"""Serve a page on this machine that draws images from trained models: `latentmill demo`."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from data.text import counted
from pipeline.compatibility import SAMPLERS, usable_guidance
from pipeline.config import Config, Sample
from pipeline.config_file import load_config
from pipeline.datasets import BATCH
from pipeline.device import pick_device
from pipeline.sampling import draw_samples
from pipeline.training.checkpoint import Checkpoint, checkpoint_folders
from pipeline.training.run_folder import CONFIG
from pipeline.unet import LatentUNet
from pipeline.vae import FrozenVae, to_images
from stages.sample import require_checkpoint, resolve_sample_settings

MOST_IMAGES = 64  # drawn at a time
_PREVIEWED = 16  # images whose estimates are decoded during sampling
_ESTIMATES = 8  # of each of them, the image itself included
_HOST = "127.0.0.1"
# of a request -> keys of the config
_FIELDS = {"count": "per_class", "seed": "seed", "sampler": "scheduler", "steps": "steps", "guidance": "guidance"}
Send = Callable[[dict[str, Any]], None]


def demo(run: Path | None, port: int) -> None:
    """Serve the page until Ctrl-C, with `run` preselected; ValueError if there is nothing to draw from."""
    server = Server(Demo(run), port)
    print(f"demo: http://{_HOST}:{server.server_port}, for a browser on this machine; Ctrl-C ends it", flush=True)
    with server, suppress(KeyboardInterrupt):
        server.serve_forever()


@dataclass(frozen=True)
class _Loaded:
    run: str
    newest: Path  # of its checkpoints; a damaged one is skipped
    config: Config
    checkpoint: Checkpoint
    model: LatentUNet
    vae: FrozenVae


class Demo:
    """Draws images from the runs in a folder; the model of one run at a time is kept."""

    def __init__(self, run: Path | None = None, folder: Path = Path("runs")) -> None:
        """Take the run that is selected first, which may be outside `folder`; ValueError if there is no checkpoint."""
        self._first, self._folder = run, folder
        self._lock = threading.Lock()  # the browser sends requests at the same time
        self._loaded: _Loaded | None = None
        if run and not checkpoint_folders(run):
            raise ValueError(f"--run: no checkpoint in {run}/checkpoints: run train first")
        if not self.runs():
            raise ValueError(f"{folder}: no run with a checkpoint: run train first")

    def runs(self) -> list[str]:
        """Return the paths of all runs that have a checkpoint now; the one to select is the first."""
        folders = sorted(self._folder.iterdir()) if self._folder.is_dir() else []
        found = [path for path in folders if path.is_dir() and checkpoint_folders(path)]
        return list(dict.fromkeys(map(str, [self._first, *found] if self._first else found)))

    def describe(self, run: str) -> dict[str, Any]:
        """Load a run; return what can be chosen in it, and the settings of its config."""
        with self._lock:
            loaded = self._load(run)
        state, settings = loaded.checkpoint.state, loaded.config.sample
        trained = [name for name, images in zip(state.classes, state.class_counts, strict=True) if images]
        size, seen, device = state.image_size, f"{state.images_seen:,} images seen", loaded.vae.device.type.upper()
        return {
            "classes": trained,
            "samplers": [name for name in SAMPLERS if _works(settings, name, state.noise.schedule)],
            "most": MOST_IMAGES,
            "size": size,
            "facts": [seen, counted(len(trained), "class"), f"{size}x{size} pixels", device],
            **{name: getattr(settings, key) for name, key in _FIELDS.items()},
        }

    def draw(self, request: dict[str, Any], send: Send) -> None:
        """Draw the images that `request` names: `run`, `class`, `count`, `seed`, `sampler`, `steps` and `guidance`.

        `send` gets the progress: `step`, `steps` and at some steps `images`, the estimates of the first images, as PNG
        in base64; at the end all `images`, the `command` that draws them again, and a `note` if the guidance is another
        one. ValueError, in one line, for settings that are not possible.
        """
        with self._lock:
            loaded = self._load(str(request.get("run")))
            checkpoint, file = loaded.checkpoint, Path(loaded.run) / CONFIG
            overrides = _overrides(request, loaded)
            requested = load_config(file, overrides)
            config, chosen = resolve_sample_settings(requested, checkpoint)
            settings, state = config.sample, checkpoint.state
            if settings.per_class > MOST_IMAGES:
                raise ValueError(f"number of images = {settings.per_class}: give at most {MOST_IMAGES}")
            latents = draw_samples(
                loaded.model,
                state.noise,
                settings,
                torch.tensor(chosen * settings.per_class),
                indices=range(settings.per_class),
                device=loaded.vae.device,
                on_clean=_progress(loaded, settings, send),
            )
            guidance, form = requested.sample.guidance, requested.sample.guidance_form
            _, note = usable_guidance(guidance, form, without_class=state.without_class, classes=len(state.classes))
            words = [word for override in overrides for word in ("--set", override)]
            command = ["latentmill", "sample", "--config", str(file), "--run", loaded.run, *words]
            send({"images": _decode(loaded, latents), "command": shlex.join(command), "note": note})

    def _load(self, run: str) -> _Loaded:
        """Return the newest checkpoint of a run with its models; they are loaded unless it was the last one in use."""
        if run not in self.runs():
            raise ValueError(f"run = {run}: no such run with a checkpoint: reload the page")
        path = Path(run)
        newest = checkpoint_folders(path)[-1]
        if not self._loaded or self._loaded.run != run or self._loaded.newest != newest:
            self._loaded = None  # two models may not fit
            checkpoint, device = require_checkpoint(path), pick_device()
            config = load_config(path / CONFIG)
            vae = FrozenVae(config.vae.source, device)
            vae.check(checkpoint.state.vae, checkpoint.path)
            self._loaded = _Loaded(run, newest, config, checkpoint, checkpoint.ema_model().to(device), vae)
        return self._loaded


def _works(settings: Sample, sampler: str, schedule: str) -> bool:
    with suppress(ValueError):
        settings.changed(scheduler=sampler, steps=1).check(schedule)
        return True
    return False


def _overrides(request: dict[str, Any], loaded: _Loaded) -> list[str]:
    """Return the settings of a request as overrides of the config; the models and images that guide are left out."""
    classes, wanted = loaded.checkpoint.state.classes, request.get("class")
    if wanted not in classes:
        raise ValueError(f"class = {wanted}: the run has no such class: reload the page")
    # a name with other characters would need quotes for the shell and for YAML
    name = wanted if re.fullmatch(r"[\w-]+", wanted) else f"index:{classes.index(wanted)}"
    plain: dict[str, Any] = {"guide": None, "start": 1.0, "start_from": None, "guidance_by_class": {}}
    given = [(key, json.dumps(value)) for key, value in plain.items() if getattr(loaded.config.sample, key) != value]
    fields = [(key, str(request[field])) for field, key in _FIELDS.items() if field in request]
    return [f"sample.{key}={text}" for key, text in [("classes", name), *fields, *given]]


def _progress(loaded: _Loaded, settings: Sample, send: Send) -> Callable[[Tensor], None]:
    """Return what gets the estimates of x_0 during sampling, and sends each step and the images of some."""
    steps = 2 * settings.steps - 1 if settings.scheduler == "heun" else settings.steps
    shown = {1 + i * (steps - 1) // (_ESTIMATES - 1) for i in range(_ESTIMATES)} - {steps}  # the last is the image
    numbers = count(1)

    def on_clean(clean: Tensor) -> None:
        step = next(numbers)
        images = {"images": _decode(loaded, clean[:_PREVIEWED])} if step in shown else {}
        send({"step": step, "steps": steps, **images})

    return on_clean


@torch.inference_mode()
def _decode(loaded: _Loaded, latents: Tensor) -> list[str]:
    """Return the images of normalised latents `B C h w` as PNG files in base64."""
    dtype = getattr(torch, loaded.config.cache.dtype)  # in which `latentmill sample` stores them
    stored = loaded.checkpoint.normalization.denormalize(latents).to(dtype).float()
    files = []
    for pixels in torch.cat([to_images(loaded.vae.decode(part)) for part in stored.split(BATCH)]).cpu().numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        files.append(base64.b64encode(file.getvalue()).decode())
    return files


class Server(ThreadingHTTPServer):
    """Answers browsers on this machine alone; port 0 is any free one."""

    daemon_threads = True

    def __init__(self, demo: Demo, port: int) -> None:
        self.demo = demo
        try:
            super().__init__((_HOST, port), _Handler)
        except OSError as error:
            raise ValueError(f"--port = {port}: {error.strerror}: give another one, such as {port + 1}") from None


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        """Answer with the page."""
        if self._is_allowed("/"):
            self._begin("text/html; charset=utf-8")
            self.wfile.write(Path(__file__).with_name("demo.html").read_bytes())

    def do_POST(self) -> None:
        """Answer JSON with lines of JSON: the runs, what a run offers, or the steps of drawing; or with an `error`."""
        demo = self.server.demo
        work: dict[str, Callable[[dict[str, Any], Send], None]] = {
            "/runs": lambda request, send: send({"runs": demo.runs()}),
            "/run": lambda request, send: send(demo.describe(request["run"])),
            "/draw": demo.draw,
        }

        def send(event: dict[str, Any]) -> None:
            self.wfile.write(json.dumps(event).encode() + b"\n")

        if self._is_allowed(*work):
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._begin("application/x-ndjson")
            with suppress(ConnectionError):  # the page was closed, or its button Stop was pressed
                try:
                    work[self.path](request, send)
                except ValueError as error:
                    send({"error": str(error)})

    def _is_allowed(self, *paths: str) -> bool:
        """Return whether our page asks for one of `paths`; other sites get 403, also under a name that leads here."""
        host = self.headers.get("Host", "")
        ours = host.partition(":")[0] in (_HOST, "localhost") and self.headers.get("Origin") in (None, f"http://{host}")
        if not ours or self.path not in paths:
            self.send_error(404 if ours else 403)
        return ours and self.path in paths

    def _begin(self, kind: str) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.end_headers()

    def log_message(self, *args: Any) -> None:
        """Print nothing for a request."""

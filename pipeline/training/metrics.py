"""What a run says of itself: sums kept on the device, lines in log.jsonl, one status line for people."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from data.storage import append_line, parse_json, publish, read, set_aside
from data.text import duration, printable
from pipeline.flops import peak_flops
from pipeline.noise import LEVELS, noise_level
from pipeline.training.state import WindowState

LOG = "log.jsonl"
_SHARED = 0.8  # of the cores that a run has threads for: with less, it competes with other work
_KEYS = (  # of a line of steps, of one of held-out images, and of one with a score
    {
        "step", "images_seen", "loss", "gradient_norm", "lr", "loss_by_noise", "images_per_second",
        "teraflops_per_second", "data_wait", "memory_gb",
    },
    {"step", "images_seen", "heldout_loss", "heldout_loss_by_noise", "heldout_cache"},
    {"step", "images_seen", "score_interval", "score_reference"},
)  # fmt: skip


class Window:
    """Sums of what the steps since the last log line reported, kept on the device: no step waits for them.

    They are part of a checkpoint, so that a line of the log does not depend on where a run was interrupted.
    """

    def __init__(self, accelerator: Accelerator, flops_per_image: int) -> None:
        self._accelerator, self.flops = accelerator, flops_per_image
        self._sums = torch.zeros(2 + 2 * LEVELS, device=accelerator.device)
        self._steps = 0
        self.restart_clock()

    def add(self, loss: Tensor, norm: Tensor, errors: Tensor, times: Tensor) -> None:
        """The loss and gradient norm of a step, and the errors `B` of its images at their timesteps `B`."""
        level = noise_level(times)
        levels = (level[:, None] == torch.arange(LEVELS, device=times.device)).float()  # F.one_hot would wait
        self._sums += torch.cat([torch.stack([loss, norm]), errors @ levels, levels.sum(dim=0)])
        self._steps += 1
        self._timed += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A block in which the host waits for data."""
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A block that does not count in images/s: checkpoints and previews."""
        if self._accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # the steps that it is still at do count
        started, cpu = time.monotonic(), time.process_time()
        yield
        self._started += time.monotonic() - started
        self._cpu += time.process_time() - cpu

    def close(self, *, step: int, batch_size: int, lr: float) -> dict[str, Any]:
        """The log line of the window that ends after `step`; it starts anew. All processes call it."""
        sums = self._accelerator.reduce(self._sums, "sum").tolist()
        seconds, steps = time.monotonic() - self._started, self._steps * self._accelerator.num_processes
        pairs = zip(sums[2 : 2 + LEVELS], sums[2 + LEVELS :], strict=True)
        values = {
            "step": step,
            "images_seen": step * batch_size,
            "loss": sums[0] / steps,
            "gradient_norm": sums[1] / steps,
            "lr": lr,
            "loss_by_noise": [total / count if count else None for total, count in pairs],
            **self._speed(self._timed * batch_size / seconds, (time.process_time() - self._cpu) / seconds),
            "data_wait": round(self._waited / seconds, 4),
            "memory_gb": round(peak_memory(self._accelerator.device) / 1e9, 3),
        }
        self._sums.zero_()
        self._steps = 0
        self.restart_clock()
        return values

    @property
    def steps(self) -> int:
        """Since the last log line."""
        return self._steps

    def restart_clock(self) -> None:
        self._started, self._waited, self._timed = time.monotonic(), 0.0, 0
        self._cpu = time.process_time()

    def state(self) -> WindowState:
        """For a checkpoint: the sums of every process, as JSON keeps them exactly. All processes call it."""
        return WindowState(steps=self._steps, sums=self._accelerator.gather(self._sums[None]).tolist())

    def load(self, state: WindowState) -> None:
        """Go on from `state`; processes of another number share the sums of all."""
        sums = torch.tensor(state.sums, device=self._accelerator.device)
        processes, rank = self._accelerator.num_processes, self._accelerator.process_index
        if len(sums) == processes:
            self._sums = sums[rank].clone()
        else:  # equal shares of the totals; the first two are means already
            self._sums = torch.cat([sums[:, :2].mean(dim=0), sums[:, 2:].sum(dim=0) / processes])
        self._steps = state.steps

    def _speed(self, images_per_second: float, cores: float) -> dict[str, float]:
        """`cores` are those that the process had, on average."""
        rate = images_per_second * self.flops
        values = {"images_per_second": round(images_per_second, 1), "teraflops_per_second": round(rate / 1e12, 4)}
        if self._accelerator.device.type == "cuda":
            half = self._accelerator.mixed_precision != "no"
            peak = peak_flops(torch.cuda.get_device_name(self._accelerator.device), half=half)
            if peak:
                values["flop_share"] = round(rate / (peak * self._accelerator.num_processes), 4)
        elif (
            self._accelerator.device.type == "cpu" and self._accelerator.num_processes == 1
        ):  # which waits for no other
            values["core_share"] = round(min(cores / torch.get_num_threads(), 1.0), 3)
        return values


@contextmanager
def optional(what: str) -> Iterator[None]:
    """A block for people to look at, such as a preview: whatever fails in it is one warning, and training goes on."""
    try:
        yield
    except Exception as error:  # of matplotlib, PIL, a tracker, memory, the disk: none of it is worth a run
        reason = printable(" ".join(str(error).split()) or "no reason given")[:200]
        print(f"train: {what}: {type(error).__name__}: {reason}: training goes on without it", flush=True)


def begin_log(run: Path, images_seen: int, logged: int, *, again: bool) -> None:
    """Drop the lines that a crash left after the checkpoint at `images_seen`, and one that it cut off; with `again`
    what was measured there, too.

    Where another line cannot be read, the log as it was is set aside; that is printed, and where it does not reach to
    the last line that the checkpoint knows of, at `logged` images.
    """
    log = run / LOG
    text = read(log) if log.exists() else b""
    if zeros := text.count(0):  # where a file had grown, and its bytes had not reached the disk
        print(f"train: left out {zeros:,} NUL bytes of {log}, which a crash left there", flush=True)
    *lines, _ = text.replace(b"\0", b"").split(b"\n")
    lines = [line for line in lines if line]
    parsed = [_parsed(line) for line in lines]
    damaged = [number for number, values in enumerate(parsed, 1) if not values]
    if damaged:
        what = f"line {damaged[0]} of {log}" + (f" and {len(damaged) - 1} more" if len(damaged) > 1 else "")
        print(
            f"train: left out {what}, which cannot be read; the log as it was is now {set_aside(log).name}", flush=True
        )
    last = {True: images_seen, False: images_seen - again}  # of a line of steps, and of a line of what was measured
    kept = {i: v for i, v in enumerate(parsed) if v and v["images_seen"] <= last["loss" in v]}
    if logged not in (0, *(v["images_seen"] for v in kept.values() if "loss" in v)):
        print(f"train: {log} lacks lines: that at {logged:,} images, and perhaps others before it", flush=True)
    publish(log, b"".join(lines[i] + b"\n" for i in kept))


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of the log; None where it is not what `log_line` and `log_measured` write."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and any(values.keys() >= keys for keys in _KEYS) else None


def log_line(run: Path, values: dict[str, Any], images: int) -> None:
    """Add `values` to the log and say them in one line, with the time that is left of a run of `images`."""
    append_line(run / LOG, json.dumps(values))
    seen, core_share = values["images_seen"], values.get("core_share", 1.0)
    shared = core_share < _SHARED and values["data_wait"] < 1 - _SHARED
    left = max(images - seen, 0) / max(values["images_per_second"], 0.1)  # as slow as the log can say
    print(
        f"{_place(seen, images)}   loss {values['loss']:.4f}"
        f"   gradient {values['gradient_norm']:.3f}   lr {values['lr']:.1e}"
        f"   {values['images_per_second']:,.1f} images/s"
        + (f", {values['flop_share']:.0%} of the GPU's peak" if "flop_share" in values else "")
        + (f", {values['data_wait']:.0%} waiting for data" if values["data_wait"] >= 0.005 else "")
        + (f", other work takes {1 - core_share:.0%} of its cores" if shared else "")
        + (f"   {duration(left)} left" if left else ""),
        flush=True,
    )


def log_measured(run: Path, values: dict[str, Any], images: int) -> None:
    """Add what the averaged weights do to the log, the loss on held-out images or a score, and say it in one line."""
    append_line(run / LOG, json.dumps(values))
    said = f"   held-out loss {values['heldout_loss']:.4f}" if "heldout_loss" in values else ""
    if name := score_of(values):
        low, high = (1000 * end for end in values["score_interval"])
        said += f"   {name} x1000 {1000 * values[name]:.1f} ±{(high - low) / 2:.1f}"
    print(_place(values["images_seen"], images) + said, flush=True)


def score_of(values: dict[str, Any]) -> str | None:
    """The name of the score in a line of the log, such as KD-EffNetLite0; None where it has none."""
    return next((name for name in values if name.startswith("KD-")), None)


def _place(seen: int, images: int) -> str:
    return f"train: {seen:>{len(f'{images:,}')},} of {images:,} images"


def peak_memory(device: torch.device) -> int:
    """Bytes: of the device's memory, or of the process where the device is the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # whose ru_maxrss begins with the peak of the process that started this one
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

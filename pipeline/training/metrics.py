"""Record the metrics of a run: sums on the device, lines in log.jsonl, and a status line in the terminal."""

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
_SHARED = 0.8  # a run that gets a smaller share of its cores competes with other work
_KEYS = (  # of a training line, of a line with the held-out loss, and of one with a score
    {
        "step", "images_seen", "loss", "gradient_norm", "lr", "loss_by_noise", "images_per_second",
        "teraflops_per_second", "data_wait", "memory_gb",
    },
    {"step", "images_seen", "heldout_loss", "heldout_loss_by_noise", "heldout_cache"},
    {"step", "images_seen", "score_interval", "score_reference"},
)  # fmt: skip


class Window:
    """Sums the values of the steps since the last log line on the device, so that no step waits for them.

    The sums are part of a checkpoint, so that a line of the log does not depend on where a run was interrupted.
    """

    def __init__(self, accelerator: Accelerator, flops_per_image: int) -> None:
        self._accelerator, self.flops = accelerator, flops_per_image
        self._sums = torch.zeros(2 + 2 * LEVELS, device=accelerator.device)
        self._steps = 0
        self.restart_clock()

    def add(self, loss: Tensor, norm: Tensor, errors: Tensor, times: Tensor) -> None:
        """Add the loss and gradient norm of a step, and the errors `B` of its images at their timesteps `B`."""
        level = noise_level(times)
        levels = (level[:, None] == torch.arange(LEVELS, device=times.device)).float()  # F.one_hot would synchronise
        self._sums += torch.cat([torch.stack([loss, norm]), errors @ levels, levels.sum(dim=0)])
        self._steps += 1
        self._timed += 1

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time a block in which the host waits for data."""
        started = time.monotonic()
        yield
        self._waited += time.monotonic() - started

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave a block out of images/s, such as a checkpoint or a preview."""
        if self._accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # steps that are still running do count
        started, cpu = time.monotonic(), time.process_time()
        yield
        self._started += time.monotonic() - started
        self._cpu += time.process_time() - cpu

    def close(self, *, step: int, batch_size: int, lr: float) -> dict[str, Any]:
        """Return the log line of the window that ends after `step`, and start a new one. All processes must call it."""
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
        """Return the number of steps since the last log line."""
        return self._steps

    def restart_clock(self) -> None:
        self._started, self._waited, self._timed = time.monotonic(), 0.0, 0
        self._cpu = time.process_time()

    def state(self) -> WindowState:
        """Return the sums of every process for a checkpoint; JSON stores them exactly. All processes must call it."""
        return WindowState(steps=self._steps, sums=self._accelerator.gather(self._sums[None]).tolist())

    def load(self, state: WindowState) -> None:
        """Restore the sums from `state`; if the number of processes has changed, split them equally."""
        sums = torch.tensor(state.sums, device=self._accelerator.device)
        processes, rank = self._accelerator.num_processes, self._accelerator.process_index
        if len(sums) == processes:
            self._sums = sums[rank].clone()
        else:  # loss and gradient norm are means over a process's images, the others totals
            self._sums = torch.cat([sums[:, :2].mean(dim=0), sums[:, 2:].sum(dim=0) / processes])
        self._steps = state.steps

    def _speed(self, images_per_second: float, cores: float) -> dict[str, float]:
        """Return images/s, TFLOP/s and the share of the GPU's peak or, from the `cores` in use, of the CPU cores."""
        rate = images_per_second * self.flops
        values = {"images_per_second": round(images_per_second, 1), "teraflops_per_second": round(rate / 1e12, 4)}
        if self._accelerator.device.type == "cuda":
            half = self._accelerator.mixed_precision != "no"
            peak = peak_flops(torch.cuda.get_device_name(self._accelerator.device), half=half)
            if peak:
                values["flop_share"] = round(rate / (peak * self._accelerator.num_processes), 4)
        # several processes wait for each other, which would look like other work
        elif self._accelerator.device.type == "cpu" and self._accelerator.num_processes == 1:
            values["core_share"] = round(min(cores / torch.get_num_threads(), 1.0), 3)
        return values


@contextmanager
def optional(what: str) -> Iterator[None]:
    """Run a block that training can do without, such as a preview: if it fails, print one warning and continue."""
    try:
        yield
    except Exception as error:  # matplotlib, PIL, a tracker, memory, the disk: none of them may end a run
        reason = printable(" ".join(str(error).split()) or "no reason given")[:200]
        print(f"train: {what}: {type(error).__name__}: {reason}: training continues without it", flush=True)


def begin_log(run: Path, images_seen: int, logged: int, *, measured_again: bool) -> None:
    """Drop the lines that a crash left after the checkpoint at `images_seen`, and a last line that it truncated.

    With `measured_again`, also drop what was measured at `images_seen`. If any other line cannot be read, the old log
    is kept under another name, which is printed. A message also tells if the line at `logged` images, the last one
    before the checkpoint, is missing.
    """
    log = run / LOG
    text = read(log) if log.exists() else b""
    if zeros := text.count(0):  # the file had grown, but its data had not reached the disk
        print(f"train: removed {zeros:,} NUL bytes, left by a crash, from {log}", flush=True)
    *lines, _ = text.replace(b"\0", b"").split(b"\n")
    lines = [line for line in lines if line]
    parsed = [_parsed(line) for line in lines]
    damaged = [number for number, values in enumerate(parsed, 1) if not values]
    if damaged:
        what = f"line {damaged[0]} of {log}" + (f" and {len(damaged) - 1} more" if len(damaged) > 1 else "")
        print(f"train: removed {what}, which cannot be read; the original log is now {set_aside(log).name}", flush=True)
    last = {True: images_seen, False: images_seen - measured_again}  # of training lines, and of others
    kept = {i: v for i, v in enumerate(parsed) if v and v["images_seen"] <= last["loss" in v]}
    if logged not in (0, *(v["images_seen"] for v in kept.values() if "loss" in v)):
        print(f"train: {log}: lines are missing: that at {logged:,} images, and perhaps others before it", flush=True)
    publish(log, b"".join(lines[i] + b"\n" for i in kept))


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Parse a line of the log; return None if `log_line` and `log_measured` cannot have written it."""
    try:
        values = parse_json(line)
    except ValueError:
        return None
    return values if isinstance(values, dict) and any(values.keys() >= keys for keys in _KEYS) else None


def log_line(run: Path, values: dict[str, Any], images: int) -> None:
    """Append `values` to the log and print a status line, with the time that is left of a run of `images`."""
    append_line(run / LOG, json.dumps(values))
    seen, core_share = values["images_seen"], values.get("core_share", 1.0)
    shared = core_share < _SHARED and values["data_wait"] < 1 - _SHARED
    left = max(images - seen, 0) / max(values["images_per_second"], 0.1)  # the smallest rate that the log records
    print(
        f"{_progress(seen, images)}   loss {values['loss']:.4f}"
        f"   gradient {values['gradient_norm']:.3f}   lr {values['lr']:.1e}"
        f"   {values['images_per_second']:,.1f} images/s"
        + (f", {values['flop_share']:.0%} of the GPU's peak" if "flop_share" in values else "")
        + (f", {values['data_wait']:.0%} waiting for data" if values["data_wait"] >= 0.005 else "")
        + (f", other work takes {1 - core_share:.0%} of its cores" if shared else "")
        + (f"   {duration(left)} left" if left else ""),
        flush=True,
    )


def log_measured(run: Path, values: dict[str, Any], images: int) -> None:
    """Append the held-out loss or the score of the averaged weights to the log, and print it in one line."""
    append_line(run / LOG, json.dumps(values))
    text = f"   held-out loss {values['heldout_loss']:.4f}" if "heldout_loss" in values else ""
    if name := score_of(values):
        low, high = (1000 * end for end in values["score_interval"])
        text += f"   {name} x1000 {1000 * values[name]:.1f} ±{(high - low) / 2:.1f}"
    print(_progress(values["images_seen"], images) + text, flush=True)


def score_of(values: dict[str, Any]) -> str | None:
    """Return the name of the score in a line of the log, such as KD-EffNetLite0; None if it has none."""
    return next((name for name in values if name.startswith("KD-")), None)


def _progress(seen: int, images: int) -> str:
    return f"train: {seen:>{len(f'{images:,}')},} of {images:,} images"


def peak_memory(device: torch.device) -> int:
    """Return the peak memory in bytes: of the GPU or, if the device is the CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "linux":  # where ru_maxrss starts at the peak of the parent process
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

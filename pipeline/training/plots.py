"""Plot the log of a run: curves.png."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from data.storage import read
from pipeline.compatibility import STEPS
from pipeline.noise import LEVELS
from pipeline.pictures import draw_texts, save_png
from pipeline.training.metrics import LOG, score_of

CURVES = "curves.png"


def draw_curves(run: Path) -> None:
    """Publish curves.png: the loss, the loss at each noise level, the gradient's norm, the learning rate, the speed."""
    from matplotlib.figure import Figure

    logged = [json.loads(line) for line in read(run / LOG).splitlines()]
    lines, heldout = ([line for line in logged if kind in line] for kind in ("loss", "heldout_loss"))
    scores = [line for line in logged if score_of(line)]
    if not lines:
        return
    seen = [line["images_seen"] for line in lines]
    figure = Figure(figsize=(12, 7))
    margins = {"left": 0.05, "right": 0.91, "bottom": 0.07, "top": 0.91, "wspace": 0.14, "hspace": 0.3}
    axes = figure.subplots(2, 2, gridspec_kw=margins)  # matplotlib's automatic layout takes as long as the drawing
    _draw_losses(axes[0][0], axes[0][1], lines, heldout)
    if scores:
        _draw_scores(axes[0][0].twinx(), scores)
    axes[1][0].plot(seen, [line["gradient_norm"] for line in lines], lw=1)
    axes[1][1].plot(seen, [line["images_per_second"] for line in lines], lw=1)
    rate = axes[1][1].twinx()
    rate.plot(seen, [line["lr"] for line in lines], lw=1, color="tab:orange")
    rate.set_ylabel("learning rate", color="tab:orange")
    rate.set_ylim(bottom=0)
    titles = ("loss", "mean squared error at each noise level", "norm of the gradient", "images/s and learning rate")
    for axis, title in zip(axes.flat, titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("images seen", fontsize=8)
        axis.grid(alpha=0.3)
    positive = min(line["loss"] for line in lines) > 0  # the loss of the learned weighting can be negative
    for axis in (*axes[0], axes[1][0])[not positive :]:
        axis.set_yscale("log")
        for formatter in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            formatter("{x:.3g}")
    axes[1][1].set_ylim(bottom=0)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=100)
    image = Image.open(buffer).convert("RGB")
    (name,) = draw_texts([run.resolve().name], size=16, width=image.width - 40)  # matplotlib reads $ as mathematics
    image.paste(name, ((image.width - name.width) // 2, 6))
    save_png(image, run / CURVES)


def _draw_losses(loss: Any, by_noise: Any, lines: list[dict[str, Any]], heldout: list[dict[str, Any]]) -> None:
    """Plot the loss, and on a second axis that at each noise level: solid for training, dashed for held-out images."""
    from matplotlib import colormaps
    from matplotlib.lines import Line2D

    dashed: dict[str, Any] = {"lw": 1.2, "ls": "--", "marker": "."}
    seen, measured = ([line["images_seen"] for line in each] for each in (lines, heldout))
    loss.plot(seen, [line["loss"] for line in lines], lw=1, label="training")
    for level in range(LEVELS):
        values = [line["loss_by_noise"][level] for line in lines]  # None, if no image had it, leaves a gap
        label = f"{STEPS * level // LEVELS} to {STEPS * (level + 1) // LEVELS}"
        color = colormaps["viridis"](level / LEVELS)
        by_noise.plot(seen, [float("nan") if v is None else v for v in values], color=color, lw=1, label=label)
        by_noise.plot(measured, [line["heldout_loss_by_noise"][level] for line in heldout], color=color, **dashed)
    levels = by_noise.legend(title="timestep", fontsize=7, title_fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    if not heldout:
        return
    label = "held-out images, averaged weights"
    loss.plot(measured, [line["heldout_loss"] for line in heldout], **dashed, label=label)
    loss.legend(fontsize=8, loc="upper right")
    by_noise.add_artist(levels)  # a second legend would replace it
    for line in by_noise.lines[::2]:  # the training curves
        line.set_alpha(0.5)
    styles = [Line2D([], [], color="grey", lw=1, label="training"), Line2D([], [], color="grey", **dashed, label=label)]
    by_noise.legend(handles=styles, fontsize=8, loc="upper right")


def _draw_scores(axis: Any, lines: list[dict[str, Any]]) -> None:
    """Plot quick scores with their intervals, on a separate axis."""
    name = score_of(lines[-1])
    assert name
    lines = [line for line in lines if name in line]  # never mix the scores of two networks
    values = [1000 * line[name] for line in lines]
    margins = [500 * (line["score_interval"][1] - line["score_interval"][0]) for line in lines]
    axis.errorbar(
        [line["images_seen"] for line in lines], values, margins, color="tab:red", lw=1, marker=".", capsize=2
    )
    axis.set_ylabel(f"{name} x1000", color="tab:red")
    axis.set_ylim(bottom=min(0, *values))

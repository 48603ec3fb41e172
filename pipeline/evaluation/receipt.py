"""Show the results of `evaluate`: a printed table, and an HTML page with table, samples and closest pairs."""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from data.storage import publish
from pipeline.evaluation.measure import Row
from pipeline.pictures import contact_sheet, pairs_sheet, save_png

PAIRS = 16  # number of pairs of an image and its closest training image on the page
_CLASSES, _EACH = 10, 10  # classes on a contact sheet, and images per class
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fafafa }}
h1 {{ font-size: 1.4rem; margin-bottom: 0; overflow-wrap: anywhere }} h2 {{ font-size: 1.1rem; margin: 1.6rem 0 .3rem }}
p {{ color: #555; margin: .2rem 0; max-width: 75ch }} img {{ max-width: 100% }} .scroll {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; background: white }}
th, td {{ padding: .25rem .8rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap }}
th:first-child {{ text-align: left; font-weight: normal }} thead th {{ font-weight: 600 }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
_CLOSEST = (
    "Above: the {name} that are closest to a training image, by {network}. Below: that training image. The number is"
    " their distance."
)


def table_of(receipt: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of a receipt: one line per metric, one column per set of images, whose names come first."""
    sets = receipt["figures"]
    first = next(iter(sets.values()))
    found = [name for each in sets.values() for name, figure in each.items() if "value" in _fields(figure)]
    names = [name for name in {**first, **dict.fromkeys(found)} if name in found]
    lines = [["", *sets]]
    lines.append(["images", *(f"{each['images']:,}" for each in sets.values())])
    if any(each["copies"] for each in sets.values()):
        lines.append(["copies of each other", *(f"{each['copies']:,}" for each in sets.values())])
    for name in names:
        scale, label = (1000, f"{name} x1000") if name.startswith("KD-") else (1, name)
        lines.append([label, *(format_metric(each.get(name), scale) for each in sets.values())])
    if "memorisation" in first:
        for name, label in (
            ("median_distance", "median distance to training"),
            ("closer", "closer to training than held-out images"),
            ("very_close", "closer than the closest 1 % of held-out images"),
            ("copies", "copies of training images"),
        ):
            if name not in first["memorisation"]:
                continue
            lines.append([label, *(format_metric(each.get("memorisation", {}).get(name)) for each in sets.values())])
    return lines


def _fields(figure: Any) -> dict[str, Any]:
    return figure if isinstance(figure, dict) else {}


def format_metric(figure: Any, scale: float = 1) -> str:
    """Format a metric with half the width of its interval, with as many digits as that justifies; a dash for None."""
    if figure is None:
        return "-"
    if not isinstance(figure, dict):
        return f"{figure:.2f}" if isinstance(figure, float) else f"{figure:,}"
    value = figure["value"] * scale
    if figure["interval"] is None:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    margin = (figure["interval"][1] - figure["interval"][0]) / 2 * scale
    places = min(max(0, 1 - int(np.floor(np.log10(margin)))), 4) if margin > 0 else 2
    return f"{value:.{places}f} ±{margin:.{places}f}"


def print_table(receipt: Mapping[str, Any]) -> None:
    """Print the table of metrics and the notes on them."""
    lines = table_of(receipt)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    print(f"evaluate: against {_reference(receipt)}")
    for line in lines:
        cells = [
            cell.ljust(width) if not i else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  " + "   ".join(cells).rstrip())
    for note in notes_on(receipt):
        print(f"evaluate: {note}")


def _reference(receipt: Mapping[str, Any]) -> str:
    name = receipt["reference"]
    return f"{receipt['images'][name]['count']:,} {name} of {receipt['images'][name]['source']}"


def notes_on(receipt: Mapping[str, Any]) -> list[str]:
    """Return warnings and notes that a reader of the metrics must know."""
    notes, names = list(receipt["notes"]), receipt["classes"]
    for name, each in receipt["images"].items():
        if each["failed"]:
            notes.append(
                f"{name}: {each['failed']:,} could not be read and are not included; the first is"
                f" {each['first_failure']}"
            )
    for name, each in receipt["figures"].items():
        if each["warning"]:
            notes.append(f"{name}: {each['warning']}")
        known = [int(label) for label in each["classes"] if int(label) >= 0]
        if known and (missing := sorted({*range(len(names))} - {*known})):
            first = f"such as {names[missing[0]]!r}"
            notes.append(f"{name}: {len(missing):,} of {len(names):,} classes have no image, {first}")
    if lost := receipt["samples"].get("failed"):
        notes.append(f"samples: {lost:,} are NaN or infinite and are not included")
    return notes


def save_page(file: Path, receipt: Mapping[str, Any], rows: list[Row], training: Row) -> None:
    """Write the page of the receipt `file`, and its pictures, next to it."""
    names = receipt["classes"]
    text = f"Against {_reference(receipt)}, by {receipt['network']['name']} ({receipt['network']['resize']})."
    body = [f"<p>{html.escape(text)}</p>"]
    body += [_html_table(table_of(receipt))]
    body += [f"<p>{html.escape(note)}</p>" for note in notes_on(receipt)]
    body += ["<h2>By class</h2>", _html_table(_by_class(receipt))] if len(names) > 1 else []
    for number, row in enumerate(rows):
        picture = file.with_name(f"{file.stem}-{number}.png")
        save_png(_sheet(row, names), picture)
        body += [
            f"<h2>{html.escape(row.name)}</h2>",
            f'<img src="{quote(picture.name)}" alt="{html.escape(row.name)}">',
        ]
    for number, row in enumerate(rows):
        if len(row.distances):
            picture = file.with_name(f"{file.stem}-{number}-closest.png")
            save_png(_closest(row, training, names), picture)
            text = _CLOSEST.format(name=row.name, network=receipt["network"]["name"])
            body += [f"<h2>Closest to training: {html.escape(row.name)}</h2>", f"<p>{html.escape(text)}</p>"]
            body.append(f'<img src="{quote(picture.name)}" alt="closest pairs">')
    body += ["<h2>The receipt</h2>", f"<p>Everything that these results depend on is in {html.escape(file.name)}.</p>"]
    page = _PAGE.format(title=html.escape(receipt["tag"]), body="\n".join(body))
    publish(file.with_suffix(".html"), page.encode())


def _by_class(receipt: Mapping[str, Any]) -> list[list[str]]:
    """Return the table of the samples' metrics within each class."""
    samples = next(iter(receipt["figures"].values()))["classes"]
    figures = [name for name in next(iter(samples.values())) if name != "images"]
    figures = [name for name in figures if any(each[name] is not None for each in samples.values())]
    heads = [f"{name} x1000" if name.startswith("KD-") else name for name in figures]
    names = receipt["classes"]
    return [["samples", "images", *heads]] + [
        [
            names[int(label)] if int(label) >= 0 else "no class",
            f"{each['images']:,}",
            *(format_metric(each[name], 1000 if name.startswith("KD-") else 1) for name in figures),
        ]
        for label, each in samples.items()
    ]


def _html_table(lines: list[list[str]]) -> str:
    head, *others = [[html.escape(cell) for cell in line] for line in lines]
    rows = "\n".join(
        f"<tr><th>{line[0]}</th>" + "".join(f"<td>{cell}</td>" for cell in line[1:]) + "</tr>" for line in others
    )
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    return f'<div class="scroll"><table><thead><tr>{heads}</tr></thead>\n<tbody>{rows}</tbody></table></div>'


def _sheet(row: Row, names: list[str]) -> Any:
    """Draw a contact sheet of the first images of the first classes or, without classes, of the first images."""
    labels = row.images.labels
    kinds = np.unique(labels[labels >= 0])[:_CLASSES]
    known = np.sort(row.features.indices)  # without images that could not be read
    if len(kinds):
        chosen = np.concatenate([known[labels[known] == kind][:_EACH] for kind in kinds])
        return contact_sheet(row.images.load(chosen.tolist()).pixels, labels[chosen].tolist(), names)
    chosen = known[: _CLASSES * _EACH]
    lines = (np.arange(len(chosen)) // _EACH).tolist()
    return contact_sheet(row.images.load(chosen.tolist()).pixels, lines, [""] * _CLASSES)


def _closest(row: Row, training: Row, names: list[str]) -> Any:
    nearest = np.argsort(row.distances, kind="stable")[:PAIRS]
    indices = row.features.indices[nearest]
    beside = training.features.indices[row.neighbours[nearest]]
    above, below = row.images.load(indices.tolist()).pixels, training.images.load(beside.tolist()).pixels
    classes = [names[label] if label >= 0 else "" for label in row.images.labels[indices]]
    return pairs_sheet(above, below, classes, [f"{distance:.2f}" for distance in row.distances[nearest]])

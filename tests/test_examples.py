"""The examples run, on a small cache and a small run."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

from tests.helpers.imports import ROOT
from tests.helpers.world import CLASSES, World


@pytest.fixture
def folder(world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with `caches/solids` and `runs/solids`, as after `make all`."""
    for name, target in (("caches", world.cache), ("runs", world.run)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "solids").symlink_to(target)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")


@pytest.mark.usefixtures("folder")
def test_a_cache_is_read_with_plain_zarr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    run(monkeypatch, "read_a_cache.py")
    printed = capsys.readouterr().out
    assert "(12, 2, 8, 4, 4) moments" in printed
    assert f"{CLASSES[0]}: 5 images" in printed  # one of six cannot be read


def test_samples_are_drawn_in_python(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(monkeypatch, "sample_in_python.py", "runs/solids", CLASSES[1], "samples.png")
    assert Image.open(folder / "samples.png").size == (4 * 16, 16)


@pytest.mark.usefixtures("folder")
def test_every_cell_of_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((ROOT / "examples" / "latentmill.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "clear the outputs before a commit"
            exec("".join(cell["source"]), names)

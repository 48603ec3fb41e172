"""What the documentation says is so."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from data.cache.reader import LatentCache
from stages.cli import main
from tests.helpers.imports import ROOT


def _block(page: str, containing: str) -> str:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    (found,) = (block for block in blocks if containing in block)
    return found


def test_the_cache_is_read_by_the_lines_of_its_page(
    cache: LatentCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moments, channels = cache.read(np.arange(len(cache)))[:, 0], cache.manifest.latent_channels
    (tmp_path / "caches").mkdir()
    cache.path.rename(tmp_path / "caches" / "solids")
    monkeypatch.chdir(tmp_path)
    names: dict[str, np.ndarray] = {}
    library = {"zarr": "import json, zarr", "webdataset": "WebDataset"}[cache.manifest.format]
    exec(_block("docs/cache-format.md", library), names)
    np.testing.assert_array_equal(names["mean"], moments[:, :channels])
    np.testing.assert_array_equal(names["std"], moments[:, channels:])
    np.testing.assert_array_equal(names["labels"], cache.labels)


def test_the_architecture_lists_every_module_and_no_other() -> None:
    tree = (ROOT / "docs/architecture.md").read_text(encoding="utf-8").split("## Files")[1]
    folders, listed = {2: ""}, set()  # by indentation
    for line in tree.splitlines():
        entry = re.match(r"( {4,8})([a-z_]\S+)", line)
        if entry and entry.group(2).endswith("/"):
            folders[len(entry.group(1))] = folders[len(entry.group(1)) - 2] + entry.group(2)
        elif entry and entry.group(2).endswith(".py"):
            listed.add(folders[len(entry.group(1)) - 2] + entry.group(2))
    packages = ("data", "pipeline", "stages")
    modules = {str(path.relative_to(ROOT)) for name in packages for path in (ROOT / name).rglob("[a-z]*.py")}
    assert listed == modules


def test_every_promise_names_tests_that_there_are() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs/promises.md").read_text(encoding="utf-8"))
    tests = "\n".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    assert len(named) > 20
    assert [name for name in named if f"def {name}(" not in tests] == []


PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_there_are(page: Path) -> None:
    for target, heading in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        file = page.parent / target if target else page
        assert file.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert heading in [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles], heading


def test_the_page_of_all_keys_is_what_the_command_prints() -> None:
    """Change a key's docstring in pipeline/config.py, then `latentmill config > docs/config.md`."""
    printed = CliRunner().invoke(main, ["config"])
    assert printed.stdout == (ROOT / "docs/config.md").read_text(encoding="utf-8")
    assert not re.findall(r"^\| `(.*)` \|.*\|  \|$", printed.stdout, re.MULTILINE), "a key without a meaning"

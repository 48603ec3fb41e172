"""What the documentation says is so."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from data.cache import CacheWriter
from data.manifest import Plan, VaeIdentity

ROOT = Path(__file__).parent.parent


def _block(page: str, language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)
    assert found, page
    return found.group(1)


def test_the_cache_is_read_by_the_lines_of_its_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vae = VaeIdentity(source="x", class_name="x", weights_sha256="x", scaling_factor=1, shift_factor=0, downsampling=4)
    plan = Plan(
        store="moments",
        dtype="float16",
        views=("identity", "flip"),
        shape=(8, 2, 2),
        rows=20,
        shard_rows=1024,
        batch_size=4,
        classes=("a", "b"),
        data_source="x",
        data_fingerprint="x",
        image_size=8,
        preprocessing="x",
        vae=vae,
    )
    moments = np.random.default_rng(0).normal(size=(20, 2, 8, 2, 2)).astype(np.float16)
    writer = CacheWriter(tmp_path / "caches/solids", plan, [str(i) for i in range(20)], np.arange(20) % 2)
    writer.write(0, moments, {})
    writer.finish()
    monkeypatch.chdir(tmp_path)
    names: dict[str, np.ndarray] = {}
    exec(_block("docs/cache-format.md", "python"), names)
    np.testing.assert_array_equal(names["mean"], moments[:, 0, :4])
    np.testing.assert_array_equal(names["std"], moments[:, 0, 4:])
    np.testing.assert_array_equal(names["labels"], np.arange(20) % 2)


def test_the_readme_lists_every_module_and_no_other() -> None:
    tree = (ROOT / "README.md").read_text(encoding="utf-8").split("## The repository")[1]
    folder, listed = "", set()
    for line in tree.splitlines():
        entry = re.match(r"( {4,6})(\S+)", line)
        if entry and entry.group(2).endswith("/") and len(entry.group(1)) == 4:
            folder = entry.group(2)
        elif entry and entry.group(2).endswith(".py"):
            listed.add(folder + entry.group(2))
    folders = ("data", "pipeline", "stages", "benchmarks")
    modules = {str(path.relative_to(ROOT)) for name in folders for path in (ROOT / name).glob("[a-z]*.py")}
    assert listed == modules

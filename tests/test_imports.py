from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("data", "pipeline", "stages")


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def imports(file: Path) -> set[str]:
    """Full names of all that `file` imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import escapes this check"
            names.add(node.module or "")
    return names


def imported_from(packages: tuple[str, ...], file: Path) -> set[str]:
    return {name for name in imports(file) if name.split(".")[0] in packages}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_has_modules(package: str) -> None:
    assert len(modules(package)) > 5  # or the tests below would pass on nothing


@pytest.mark.parametrize("file", modules("data"), ids=lambda file: file.name)
def test_data_imports_no_other_package(file: Path) -> None:
    assert not imported_from(("pipeline", "stages"), file)


@pytest.mark.parametrize("file", modules("pipeline"), ids=lambda file: file.name)
def test_pipeline_imports_of_data_only_what_is_on_disk(file: Path) -> None:
    assert imported_from(("data", "stages"), file) <= {"data.manifest", "data.storage"}


def test_the_denoiser_can_travel_alone() -> None:
    outside = {name.split(".")[0] for name in imports(ROOT / "pipeline" / "unet.py")} - sys.stdlib_module_names
    assert outside == {"torch", "diffusers"}


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = "import json, sys, stages.cli; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "click" in loaded
    assert not loaded & {"accelerate", "diffusers", "numpy", "pydantic", "torch", "wandb", "yaml", "zarr"}

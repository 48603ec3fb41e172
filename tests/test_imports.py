"""Who may import whom: data, then pipeline, then stages; nothing in a circle."""

from __future__ import annotations

import graphlib
import json
import subprocess
import sys

import pytest

from tests.helpers.imports import FILES, ROOT, imports

FLOORS = {  # what the modules of a package may import of ours: its own, and these
    "data": (),
    "data.cache": ("data.storage", "data.locks", "data.text", "data.sources.base"),
    "data.sources": ("data.storage", "data.text"),
    "pipeline": ("data",),
    "stages": ("data", "pipeline"),
}


OURS = {module: imports(file) & FILES.keys() - {module} for module, file in FILES.items()}


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


@pytest.mark.parametrize("package", FLOORS)
def test_a_package_imports_what_is_below_it(package: str) -> None:
    modules = [module for module in FILES if within(module, package)]
    assert len(modules) > 5  # or this would pass on nothing
    for module in modules:
        others = {name for name in OURS[module] if not any(within(name, each) for each in (package, *FLOORS[package]))}
        assert not others, f"{module} imports {others}"


def test_no_import_goes_in_a_circle() -> None:
    order = list(graphlib.TopologicalSorter(OURS).static_order())  # CycleError names a circle
    assert order.index("data.storage") < order.index("pipeline.training.trainer") < order.index("stages.cli")


def test_stages_hold_the_command_line_and_verbs_alone() -> None:
    """A verb is not imported by another file than the command line, unless it goes on where that one ends."""
    for module, imported in OURS.items():
        verbs = {name for name in imported if within(name, "stages")}
        assert not verbs or within(module, "stages"), f"{module} imports {verbs}"


def test_the_denoiser_can_travel_alone() -> None:
    outside = {name.split(".")[0] for name in imports(FILES["pipeline.unet"])} - sys.stdlib_module_names
    assert outside == {"torch", "diffusers"}


def test_the_command_line_starts_without_the_heavy_libraries() -> None:
    code = "import json, sys, stages.cli; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "click" in loaded
    assert not loaded & {"accelerate", "diffusers", "numpy", "pydantic", "torch", "wandb", "yaml", "zarr"}

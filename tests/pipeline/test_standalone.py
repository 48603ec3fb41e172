"""A class and what it uses as one module: complete, readable by any Python, and always the same."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys

import pytest

from pipeline.standalone import standalone_source
from tests.helpers.imports import ROOT

CASES = {  # names that only annotations use, which nothing evaluates
    ("pipeline.diffusers_pipeline", "LatentMillPipeline"): {"LatentUNet"},
    ("pipeline.unet", "LatentUNet"): set(),
    ("pipeline.latents", "Draws"): set(),
}


@pytest.mark.parametrize(("module", "name"), CASES)
def test_one_module_has_all_that_it_uses_and_nothing_else(module: str, name: str) -> None:
    source = standalone_source(module, name, "A heading.")
    tree = ast.parse(source)
    assert ast.get_docstring(tree) == "A heading."
    imported = {each.module.split(".")[0] for each in tree.body if isinstance(each, ast.ImportFrom) and each.module}
    assert not imported & {"data", "pipeline", "stages"}
    ruff = [sys.executable, "-m", "ruff", "check", "--isolated", "--select=F", "--output-format=json", "-"]
    found = json.loads(subprocess.run(ruff, input=source, capture_output=True, text=True).stdout)
    assert {each["code"] for each in found} <= {"F821"}  # an import that is not used would be another one
    assert {each["message"] for each in found} == {f"Undefined name `{each}`" for each in CASES[module, name]}


def test_a_definition_keeps_its_decorators_and_comments() -> None:
    source = standalone_source("pipeline.diffusers_pipeline", "LatentMillPipeline", "A heading.")
    assert "@dataclass(frozen=True)\nclass NoiseProcess:" in source
    assert "# the usual ones of adaptive projected guidance" in source
    assert "# pipeline/samplers.py\n#\n# Samplers: from noise to clean latents" in source
    assert source.count("class NoiseProcess:") == 1


def test_the_same_sources_give_the_same_module_in_every_process() -> None:
    of = ("pipeline.diffusers_pipeline", "LatentMillPipeline", "A heading.")
    code = f"from pipeline.standalone import standalone_source; print(standalone_source(*{of}))"
    printed = {
        subprocess.run(
            [sys.executable, "-c", code],
            cwd=ROOT,
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }
    assert len(printed) == 1

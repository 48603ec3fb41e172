"""The source files of the project and what they import."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


FILES = {
    ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
    for package in ("data", "pipeline", "stages")
    for file in sorted((ROOT / package).rglob("*.py"))
}


def imports(file: Path) -> set[str]:
    """Full names of all that `file` imports, inside functions too: modules, where a name is one of ours."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: a relative import escapes this check"
            assert node.module
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in FILES else node.module for name in full}
    return names

"""Write a class and everything of this project that it uses as one module, which needs none of the project's files."""

from __future__ import annotations

import ast
import graphlib
import itertools
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from data.storage import read

_OURS = ("data", "pipeline")


class _Module:
    """Represents the source of a module: what it defines and imports at the top level, by name."""

    def __init__(self, name: str) -> None:
        spec = find_spec(name)
        assert spec
        assert spec.origin
        self.name, self.text = name, read(Path(spec.origin)).decode()
        tree = ast.parse(self.text)
        self.docstring = ast.get_docstring(tree) or ""
        self.imports: dict[str, ast.ImportFrom | ast.Import] = {}
        self.definitions: dict[str, ast.stmt] = {}
        for node in tree.body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                for alias in node.names:
                    self.imports[alias.asname or alias.name] = _only(node, alias)
            else:
                self.definitions |= dict.fromkeys(_defined(node), node)

    def source(self, node: ast.stmt) -> str:
        """Return the lines of a definition, with its decorators and the comment above it."""
        lines = self.text.splitlines()
        first = min([node.lineno, *(each.lineno for each in getattr(node, "decorator_list", []))]) - 1
        while first and lines[first - 1].startswith("#"):
            first -= 1
        return "\n".join(lines[first : node.end_lineno])


def standalone_source(module: str, name: str, heading: str) -> str:
    """Return the source of a module with the docstring `heading`, the definition `name` of `module`, and all that this
    uses at any depth: imports of other packages, and definitions in this project, in the order of their imports.

    Names that a module imports for type checking alone stay undefined; they occur in annotations, which are not run.
    """
    used, imports = _used_by(module, name)
    names = [each for _, definitions in used for each in definitions]
    assert len({*names}) == len(names), f"two modules define the same name: {sorted(names)}"
    parts = [f'"""{heading}"""', "from __future__ import annotations", *_import_blocks(imports)]
    for each, definitions in used:
        comment = [f"{each.name.replace('.', '/')}.py", "", *each.docstring.splitlines()]
        parts.append("\n" + "\n".join(f"# {line}".rstrip() for line in comment))
        nodes = dict.fromkeys(node for name, node in each.definitions.items() if name in definitions)
        for before, node in itertools.pairwise([None, *nodes]):
            assert node
            together = isinstance(before, ast.Assign) and isinstance(node, ast.Assign)
            parts.append(each.source(node) if together else "\n" + each.source(node))
    return "\n\n".join(parts) + "\n"


def _used_by(module: str, name: str) -> tuple[list[tuple[_Module, set[str]]], dict[str, set[str]]]:
    """Return the definitions of this project that `name` uses, by module, each after those that it imports; and what
    they import from other packages: names by package, and modules that are imported whole by the name ""."""
    modules: dict[str, _Module] = {}
    needed: dict[str, set[str]] = {}
    imports: dict[str, set[str]] = {}
    waiting = [(module, name)]
    while waiting:
        place, wanted = waiting.pop()
        if place not in modules:
            modules[place], needed[place] = _Module(place), set()
        if wanted in needed[place]:
            continue
        needed[place].add(wanted)
        here = modules[place]
        for used in _names_in(here.definitions[wanted]):
            found = here.imports.get(used)
            if used in here.definitions:
                waiting.append((place, used))
            elif isinstance(found, ast.ImportFrom) and found.module and found.module.split(".")[0] in _OURS:
                waiting.append((found.module, found.names[0].name))
            elif found:
                imports.setdefault(getattr(found, "module", ""), set()).add(ast.unparse(found.names[0]))
    graph = {each.name: [getattr(found, "module", "") for found in each.imports.values()] for each in modules.values()}
    order = [place for place in graphlib.TopologicalSorter(graph).static_order() if place in modules]
    return [(modules[place], needed[place]) for place in order], imports


def _only(node: ast.Import | ast.ImportFrom, alias: ast.alias) -> ast.Import | ast.ImportFrom:
    """Return an import statement with only one of its names."""
    if isinstance(node, ast.Import):
        return ast.Import([alias])
    return ast.ImportFrom(node.module, [alias], node.level)


def _defined(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a statement of the top level defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    elif isinstance(node, ast.Assign):
        for target in node.targets:
            yield from _names_in(target)
    elif isinstance(node, ast.AnnAssign):
        yield from _names_in(node.target)


def _names_in(node: ast.AST) -> Iterator[str]:
    return (each.id for each in ast.walk(node) if isinstance(each, ast.Name))


def _import_blocks(imports: dict[str, set[str]]) -> list[str]:
    """Return the import statements of the standard library and those of other packages, each as a block."""
    modules = [f"import {each}" for each in sorted(imports.get("", ()))]
    names = [f"from {each} import {', '.join(sorted(imports[each]))}" for each in sorted(imports) if each]
    blocks: tuple[list[str], list[str]] = ([], [])
    for line in (*modules, *names):
        blocks[line.split()[1].split(".")[0] not in sys.stdlib_module_names].append(line)
    return ["\n".join(block) for block in blocks]

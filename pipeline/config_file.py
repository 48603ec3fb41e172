"""Reading a config from YAML, with `--set key=value` on top, and writing the resolved one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data.storage import read
from data.text import brief
from pipeline.config import Config

_TEXTS = (
    "name",
    "heldout",
    "weights",
    "source",
    "path",
    "init",
    "matte",
    "image_column",
    "label_column",
)  # keys whose values stay as they are written


class _Loader(yaml.SafeLoader):
    """YAML whose numbers are decimal (`010` is ten, `1e-4` is a number, `12:30` is none), whose names stay as they are
    written, and in which a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"line {node.start_mark.line + 1}: {key} is given twice")
        self.flatten_mapping(node)
        node.value = [(key, _as_written(key.value, value)) for key, value in node.value]
        return super().construct_mapping(node, deep)


def _as_written(key: str, node: yaml.Node) -> yaml.Node:
    """The value of `key` with words that stay as they are written: a folder may be called 007, a class no or 1e3."""
    if key in _TEXTS and isinstance(node, yaml.ScalarNode) and node.tag != _NULL:
        return yaml.ScalarNode(_TEXT, node.value)
    if key != "classes":
        return node
    entries = [node]
    if isinstance(node, yaml.SequenceNode):
        entries = node.value
    elif isinstance(node, yaml.ScalarNode) and not node.style:  # without brackets or quotes: 2, or cat, dog
        entries = [yaml.ScalarNode(_TEXT, part.strip()) for part in node.value.split(",") if part.strip()]
    texts = [yaml.ScalarNode(_TEXT, entry.value) if isinstance(entry, yaml.ScalarNode) else entry for entry in entries]
    return yaml.SequenceNode("tag:yaml.org,2002:seq", texts)


_TEXT, _NULL, _INT, _FLOAT = (f"tag:yaml.org,2002:{kind}" for kind in ("str", "null", "int", "float"))
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in (_INT, _FLOAT)]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_INT, re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(r"^[-+]?([0-9][0-9_]*(\.[0-9_]*)?|\.[0-9][0-9_]*)([eE][-+]?[0-9]+)?$|^[-+]?\.(?i:inf)$|^\.(?i:nan)$"),
    list("-+.0123456789"),
)
_Loader.add_constructor(_INT, lambda loader, node: int(node.value.replace("_", "")))


def load_config(file: Path, overrides: Iterable[str] = ()) -> Config:
    """Read `file`, apply `key=value` overrides (values are YAML), check everything.

    ValueError names the file, the field and the value of the first thing that is wrong.
    """
    if not file.is_file():
        raise ValueError(f"--config: no such file: {file}")
    try:
        values = yaml.load(read(file).decode(), Loader=_Loader)
    except RecursionError:
        raise ValueError(f"{file}: nested too deeply") from None
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{file}: {' '.join(str(error).split())}") from None
    values = {} if values is None else values
    if not isinstance(values, dict):
        raise ValueError(f"{file}: a config is a mapping of sections, this is a {type(values).__name__}")
    values = {key: {} if value is None else value for key, value in values.items()}  # a section without keys
    for override in overrides:
        _override(values, override)
    values.setdefault("name", file.stem)
    return check_config(values, str(file))


def check_config(values: Mapping[str, Any], where: str) -> Config:
    """The config of these sections; ValueError names what is wrong first, `where` they are from, and the field."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {_explain(error.errors()[0])}") from None


def dump_config(config: Config) -> str:
    """The resolved config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ValueError(f"--set {override}: give key=value, such as train.lr=1e-3")
    *sections, last = key.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ValueError(f"--set {override}: {section} is not a section")
    try:
        values.update(_given(last, text))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--set {override}: {' '.join(str(error).split())}") from None


def _given(key: str, text: str) -> dict[str, Any]:
    """`key` and its value on the command line, which is YAML but for two things: a path may hold what YAML gives a
    meaning, unless it is quoted, and a value that begins with # is no remark."""
    literal = text.startswith("#") or (key in _TEXTS and text not in ("", "~", "null") and text[0] not in "'\"")
    loader = _Loader("" if literal else text)
    value = yaml.ScalarNode(_TEXT, text) if literal else loader.get_single_node() or yaml.ScalarNode(_NULL, "")
    return loader.construct_document(yaml.MappingNode("tag:yaml.org,2002:map", [(yaml.ScalarNode(_TEXT, key), value)]))


def _explain(error: Any) -> str:
    # a section, a field, and a place in it; the rest is pydantic's name for one of several types
    loc = [part for depth, part in enumerate(error["loc"]) if depth < 2 or isinstance(part, int)]
    *parents, last = [str(part) for part in loc] or [""]
    field = ".".join([*parents, last])
    if error["type"] == "extra_forbidden":
        close = difflib.get_close_matches(last, _fields(parents), n=1, cutoff=0.5)
        return f"unknown key {field}" + (f": did you mean {'.'.join([*parents, close[0]])}?" if close else "")
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] != "value_error":
        return f"{field} = {brief(error['input'])}: {message}"
    return f"{field}: {message}" if field else message


def _fields(parents: list[str]) -> list[str]:
    section: Any = Config
    for parent in parents:
        section = section.model_fields[parent].annotation
    return list(section.model_fields)

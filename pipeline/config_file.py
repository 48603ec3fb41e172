"""Read a config from YAML, apply `--set key=value` overrides, and write the resolved config."""

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

_TEXT_KEYS = (
    "name",
    "heldout",
    "weights",
    "source",
    "path",
    "init",
    "guide",
    "start_from",
    "matte",
    "image_column",
    "label_column",
)  # keys whose values are always text


class _Loader(yaml.SafeLoader):
    """Loads YAML with decimal numbers (`010` is ten, `1e-4` is a number, `12:30` is not), keeps the text of names, and
    rejects duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"line {node.start_mark.line + 1}: {key} is given twice")
        self.flatten_mapping(node)
        node.value = [(key, _keep_text(key.value, value)) for key, value in node.value]
        return super().construct_mapping(node, deep)


def _keep_text(key: str, node: yaml.Node) -> yaml.Node:
    """Return the value of `key`, where names are kept as text: a folder can be named 007, a class no or 1e3."""
    if key in _TEXT_KEYS and isinstance(node, yaml.ScalarNode) and node.tag != _NULL:
        return yaml.ScalarNode(_TEXT, node.value)
    if key == "guidance_by_class" and isinstance(node, yaml.MappingNode):
        pairs = [(yaml.ScalarNode(_TEXT, name.value), scale) for name, scale in node.value]
        return yaml.MappingNode(node.tag, pairs, node.start_mark)
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
    """Read the config in `file`, apply `key=value` overrides (values are YAML), and check all fields.

    ValueError names the file, the field and the value of the first error.
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
        raise ValueError(f"{file}: a config must be a mapping of sections, this is a {type(values).__name__}")
    values = {key: {} if value is None else value for key, value in values.items()}  # a section without keys
    for override in overrides:
        _override(values, override)
    values.setdefault("name", file.stem)
    return check_config(values, str(file))


def override_config(config: Config, overrides: Iterable[str], where: str) -> Config:
    """Return `config` with `key=value` overrides; ValueError as of `check_config`."""
    values = config.model_dump(mode="json")
    for override in overrides:
        _override(values, override)
    return check_config(values, where)


def check_config(values: Mapping[str, Any], where: str) -> Config:
    """Check the sections and return their Config; ValueError names the first error, its field, and `where` it is."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ValueError(f"{where}: {_explain(error.errors()[0])}") from None


def dump_config(config: Config) -> str:
    """Return the resolved config as YAML, which `load_config` reads back to an equal config."""
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
        values.update(_parse_override(last, text))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"--set {override}: {' '.join(str(error).split())}") from None


def _parse_override(key: str, text: str) -> dict[str, Any]:
    """Parse a value of the command line as YAML, with two exceptions: an unquoted path can contain YAML's special
    characters, and a value that begins with # is not a comment."""
    literal = text.startswith("#") or (key in _TEXT_KEYS and text not in ("", "~", "null") and text[0] not in "'\"")
    loader = _Loader("" if literal else text)
    value = yaml.ScalarNode(_TEXT, text) if literal else loader.get_single_node() or yaml.ScalarNode(_NULL, "")
    return loader.construct_document(yaml.MappingNode("tag:yaml.org,2002:map", [(yaml.ScalarNode(_TEXT, key), value)]))


def _explain(error: Any) -> str:
    # keep section, field and list index; the other parts are pydantic's names of the alternatives of a union type
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

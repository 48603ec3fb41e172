"""Print every key of a config, with its type, its default and its meaning."""

from __future__ import annotations

from typing import Any

from pipeline.config import Config, Section


def config_reference() -> str:
    """Return docs/config.md: a heading per section and a table row per key."""
    lines = [
        "# Config",
        "",
        "Every key of a config, with type, default and meaning; `latentmill config` prints this page.",
        "A key that is left out has its default. On the command line, `--set train.lr=1e-3` overrides one; with make,",
        '`SET="train.lr=1e-3"` does. The complete config of a run is in its `config.yaml`.',
    ]
    for name, field in Config.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Section):
            lines += ["", f"## {name}", "", " ".join((kind.__doc__ or "").split()), "", *_table(f"{name}.", kind)]
        else:
            lines += ["", *_table("", Config, only=name)]
    return "\n".join(lines) + "\n"


def _table(prefix: str, section: type[Section], only: str | None = None) -> list[str]:
    """Return the keys of `section`, or the one called `only`, as the rows of a table."""
    properties = section.model_json_schema()["properties"]
    rows = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        if only in (None, name):
            schema, meaning = properties[name], " ".join((field.description or "").split())
            rows.append(f"| `{prefix}{name}` | {_type(schema)} | {_value(schema.get('default'))} | {meaning} |")
    return rows


def _type(schema: dict[str, Any]) -> str:
    """A JSON schema in words."""
    if "anyOf" in schema:
        return " or ".join(_type(each) for each in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{each}`" for each in schema.get("enum", [schema.get("const")]))
    kind = schema.get("type", "any")
    if kind == "array":
        parts = schema.get("prefixItems") or [schema["items"]]
        return f"{len(parts)} of: {_type(parts[0])}" if "prefixItems" in schema else f"list of: {_type(parts[0])}"
    bounds = [
        f"{sign} {schema[key]:g}"
        for key, sign in (("exclusiveMinimum", ">"), ("minimum", "≥"), ("exclusiveMaximum", "<"), ("maximum", "≤"))
        if key in schema and abs(schema[key]) < 2**53
    ]
    if kind == "object":
        return f"mapping of name to {_type(schema['additionalProperties'])}"
    words = {"integer": "integer", "number": "number", "boolean": "true or false", "string": "text", "null": "none"}
    return " ".join([words[kind], " and ".join(bounds)]).strip()


def _value(default: Any) -> str:
    if default is None:
        return ""
    return f"`{str(default).lower() if isinstance(default, bool) else default}`"

"""Writes what the chart says twice: helm/README.md from the comments of values.yaml and the schema's types,
and into the schema the keys that `snugfit serve` and `snugfit export` know.

`python -m deployment.chart_readme`; with --check it only compares. Exit code 1 when something is out of date.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from exporter.spec import KEYS
from service.settings import Settings

CHART = Path(__file__).resolve().parent.parent / "helm"
INTRODUCTION = """\
# The snugfit chart

<!-- Made from values.yaml and its schema by `python -m deployment.chart_readme`. Do not edit by hand. -->

Serves a model in Kubernetes, and makes it first if it is to be exported. How to use it is told in
docs/kubernetes.md of the repository; here is every value.

```sh
snugfit plan MODEL --gpu 24GB --helm-values > plan.yaml
helm install my-model helm -f values-of-mine.yaml -f plan.yaml
```

Values that are not in these tables are refused, and so are values that do not go together.
"""
_KEY = re.compile(r"(?P<indent> *)(?P<key>[\w.-]+):(?: .*)?")
# Settings that templates calculate with; of every other one its own check is enough.
_CONFIG_TYPES: Mapping[str, Any] = {
    "host": {"type": "string", "minLength": 1},
    "port": {"type": "integer", "minimum": 1, "maximum": 65535},
    "drain_seconds": {"type": "number", "minimum": 0},
    "model": {"type": ["string", "null"]},
}
_ANY = {"type": ["string", "number", "array", "object", "null"]}
_SPEC_TYPES: Mapping[str, Any] = {
    "text": {"type": "string"},
    "a list of texts": {"type": "array", "items": {"type": "string"}},
    "a size": {"type": ["string", "number"]},
    "true or false": {"type": "boolean"},
}


@dataclass(frozen=True)
class Value:
    """One value of the chart: its path, what stands above it as a comment, its default."""

    path: tuple[str, ...]
    meaning: str
    default: Any


def readme(values: str, schema: Mapping[str, Any]) -> str:
    """The page, from the texts of values.yaml and the schema."""
    return "\n".join([INTRODUCTION, *_sections(list(walk(values, schema)), schema)])


def _sections(values: Sequence[Value], schema: Mapping[str, Any]) -> Iterator[str]:
    """A table for every map, and one for what stands alone."""
    alone = [value for value in values if len(value.path) == 1 and not _is_map(value, schema)]
    yield from _table("Values", "", alone, schema)
    for group in (value for value in values if len(value.path) == 1 and _is_map(value, schema)):
        members = [v for v in values if v.path[0] == group.path[0] and not _is_map(v, schema)]
        yield from _table(f"`{group.path[0]}`", group.meaning, members, schema)


def _table(title: str, meaning: str, values: Sequence[Value], schema: Mapping[str, Any]) -> Iterator[str]:
    yield f"## {title}\n"
    if meaning:
        yield f"{meaning}\n"
    yield "| value | type | default | meaning |\n|---|---|---|---|"
    for value in values:
        default = json.dumps(value.default, ensure_ascii=False)
        cells = (
            f"`{'.'.join(value.path)}`",
            type_of(schema_of(value.path, schema)),
            f"`{default}`",
            value.meaning,
        )
        yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"
    yield ""


def _is_map(value: Value, schema: Mapping[str, Any]) -> bool:
    """Whether it is a map whose members are values of their own, and not one that users fill freely."""
    return bool(value.default) and _is_closed(schema_of(value.path, schema))


def _is_closed(schema: Mapping[str, Any]) -> bool:
    return schema.get("additionalProperties") is False


def walk(values: str, schema: Mapping[str, Any]) -> Iterator[Value]:
    """Every value of values.yaml in its order, with the comment right above it."""
    defaults = yaml.safe_load(values)
    path: list[str] = []
    comment: list[str] = []
    for line in values.splitlines():
        match = _KEY.fullmatch(line)
        if line.lstrip().startswith("#"):
            comment.append(line.lstrip("# "))
        elif not match or not _is_known(path := [*path[: len(match["indent"]) // 2], match["key"]], schema):
            comment = []
        else:
            yield Value(tuple(path), " ".join(comment), _at(path, defaults))
            comment = []


def _at(path: Sequence[str], values: Any) -> Any:
    for key in path:
        values = values[key]
    return values


def _is_known(path: Sequence[str], schema: Mapping[str, Any]) -> bool:
    """Whether every map on the way down is a closed one: what is inside a free map is part of its value."""
    try:
        return all(_is_closed(schema_of(path[:depth], schema)) for depth in range(len(path)))
    except KeyError:
        return False


def schema_of(path: Sequence[str], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """The schema of the value at `path`, references followed. Raises KeyError where there is none."""
    found = schema
    for key in path:
        found = _resolved(found["properties"][key], schema)
    return found


def _resolved(found: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    if "$ref" in found:
        definition: Mapping[str, Any] = schema["definitions"][found["$ref"].rsplit("/", 1)[1]]
        return definition
    if "allOf" in found:
        return _resolved(found["allOf"][0], schema)
    return found


def type_of(schema: Mapping[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    types: list[str] = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return " or ".join({"object": "map", "array": "list"}.get(name, name) for name in types)


def completed(schema: Mapping[str, Any]) -> dict[str, Any]:
    """The schema with the keys of `config` and `exporter.spec` as the programs have them now."""
    done: dict[str, Any] = json.loads(json.dumps(schema))
    done["properties"]["config"]["properties"] = {
        name: {"description": field.description, **_CONFIG_TYPES.get(name, _words(field.annotation))}
        for name, field in Settings.model_fields.items()
    }
    done["properties"]["exporter"]["properties"]["spec"]["properties"] = {
        name: _SPEC_TYPES[kind] for name, kind in KEYS.items()
    }
    return done


def _words(annotation: Any) -> dict[str, Any]:
    """What YAML may hold for a setting: one of its words, or anything but true and false.

    YAML takes on and off for true and false; the chart turns them back.
    """
    words = get_args(annotation) if get_origin(annotation) is Literal else ()
    truths = [truth for word, truth in {"on": True, "off": False}.items() if word in words]
    return {"enum": [*words, *truths]} if words else _ANY


def made(chart: Path = CHART) -> dict[Path, str]:
    """What the made files should hold."""
    schema = completed(json.loads((chart / "values.schema.json").read_text(encoding="utf-8")))
    values = (chart / "values.yaml").read_text(encoding="utf-8")
    return {
        chart / "values.schema.json": json.dumps(schema, indent=2, ensure_ascii=False) + "\n",
        chart / "README.md": readme(values, schema),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deployment.chart_readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="compare with what is there, and write nothing")
    check = parser.parse_args(argv).check
    old = {
        path: text for path, text in made().items() if not path.is_file() or path.read_text("utf-8") != text
    }
    for path, text in old.items():
        if check:
            print(f"{path} is out of date: run python -m deployment.chart_readme", file=sys.stderr)
        else:
            path.write_text(text, encoding="utf-8", newline="\n")
    return 1 if check and old else 0


if __name__ == "__main__":
    sys.exit(main())

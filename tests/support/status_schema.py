"""docs/status.schema.json, and a check of real output against it in which nothing may be undescribed."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "status.schema.json").read_text())
KINDS = {kind["title"]: kind for kind in SCHEMA["anyOf"]}


def check(status: dict[str, Any], kind: str) -> None:
    """Raise jsonschema.ValidationError where a status breaks the schema of its kind, or has what that lacks."""
    public = jsonschema.Draft202012Validator(SCHEMA)
    public.validate(status)
    jsonschema.Draft202012Validator(_closed(KINDS[kind])).validate(status)


def parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Yield every mapping of a schema, the whole one first."""
    waiting: list[Any] = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            yield part
            waiting += part.values()


def _closed(schema: Any) -> Any:
    """Return the schema with every object that lists its fields closed to others."""
    closed = copy.deepcopy(schema)
    for part in parts(closed):
        if isinstance(part.get("properties"), dict):
            part["additionalProperties"] = False
    return closed

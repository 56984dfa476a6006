"""Validation of plain data (JSON) read from files: data that parses need not be the data that was written."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, get_args, get_origin, get_type_hints

_INTEGER_LIMIT = 2**63  # a larger integer fits into neither an array nor a float, so it can only be damage


def check(value: Any, shape: Any, where: str) -> None:
    """Raise ValueError if `value` does not have the given shape.

    Args:
        value: plain data, as `json.loads` returns it.
        shape: a type (`float` accepts integers too; booleans are never accepted as numbers), None, a tuple of
            alternatives, `[shape]` for a list, `{...: shape}` for a dict with arbitrary keys, or `{key: shape}` for a
            dict with at least these keys.
        where: path of `value` within the whole, for the error message.
    """
    if isinstance(shape, tuple):
        if not any(_matches(value, alternative, where) for alternative in shape):
            raise ValueError(f"{where} is of a wrong type: {type(value).__name__}")
    elif isinstance(shape, list):
        _require(value, list, where)
        for item in value:
            check(item, shape[0], where)
    elif isinstance(shape, dict):
        _require(value, dict, where)
        for name, inner in shape.items():
            if name is ...:
                for key, item in value.items():
                    check(item, inner, f"{where}.{str(key)[:40]}")
            elif name not in value:
                raise ValueError(f"{where}.{name} is missing")
            else:
                check(value[name], inner, f"{where}.{name}")
    elif shape is None:
        _require(value, type(None), where)
    else:
        _require(value, (int, float) if shape is float else shape, where)
        if isinstance(value, bool) and shape in (int, float):
            raise ValueError(f"{where} is of a wrong type: bool")
        if isinstance(value, int) and abs(value) >= _INTEGER_LIMIT:
            raise ValueError(f"{where} is too large a number")


def shape_of(cls: type) -> dict[Any, Any]:
    """Return the shape of a dataclass as plain data, without the fields that JSON cannot hold, such as arrays."""
    hints = get_type_hints(cls)
    shapes = {field.name: _shape_of_hint(hints[field.name]) for field in dataclasses.fields(cls)}
    return {name: shape for name, shape in shapes.items() if shape is not _ANYTHING}


_ANYTHING = object()


def _shape_of_hint(hint: Any) -> Any:
    arguments = get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return shape_of(hint)
    if hint in (int, float, bool, str):
        return hint
    if hint is type(None):
        return None
    if isinstance(hint, types.UnionType):
        alternatives = tuple(_shape_of_hint(argument) for argument in arguments)
        return _ANYTHING if _ANYTHING in alternatives else alternatives
    if get_origin(hint) is dict:
        return {...: _shape_of_hint(arguments[1])}
    if get_origin(hint) is tuple:
        return [_shape_of_hint(arguments[0])]
    return _ANYTHING


def _require(value: Any, kind: Any, where: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{where} is of a wrong type: {type(value).__name__}")


def _matches(value: Any, shape: Any, where: str) -> bool:
    try:
        check(value, shape, where)
    except ValueError:
        return False
    return True

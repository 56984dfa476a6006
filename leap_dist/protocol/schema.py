"""What plain data from a file has to look like: JSON that can be parsed need not be what was written."""

from __future__ import annotations

import dataclasses
import types
from typing import Any, get_args, get_origin, get_type_hints

_LARGEST = 2**63  # beyond it, numbers are damage, and do not fit into arrays or floats


def conform(value: Any, shape: Any, where: str) -> None:
    """Raises ValueError, which names the place, where `value` is not of `shape`.

    A shape is a type (float takes whole numbers too, and nothing takes a bool for a number), None, a tuple of
    alternatives, `[shape]` for a list, `{...: shape}` for a dict with any names, or `{name: shape}` for a dict with at
    least these.
    """
    if isinstance(shape, tuple):
        if not any(_fits(value, alternative, where) for alternative in shape):
            raise ValueError(f"{where} is of a wrong type: {type(value).__name__}")
    elif isinstance(shape, list):
        _require(value, list, where)
        for item in value:
            conform(item, shape[0], where)
    elif isinstance(shape, dict):
        _require(value, dict, where)
        for name, inner in shape.items():
            if name is ...:
                for key, item in value.items():
                    conform(item, inner, f"{where}.{str(key)[:40]}")
            elif name not in value:
                raise ValueError(f"{where}.{name} is missing")
            else:
                conform(value[name], inner, f"{where}.{name}")
    elif shape is None:
        _require(value, type(None), where)
    else:
        _require(value, (int, float) if shape is float else shape, where)
        if isinstance(value, bool) and shape in (int, float):
            raise ValueError(f"{where} is of a wrong type: bool")
        if isinstance(value, int) and abs(value) >= _LARGEST:
            raise ValueError(f"{where} is too large a number")


def shape_of(cls: type) -> dict[Any, Any]:
    """The shape of a dataclass as plain data, without what is not plain, such as arrays."""
    hints = get_type_hints(cls)
    shapes = {field.name: _of_hint(hints[field.name]) for field in dataclasses.fields(cls)}
    return {name: shape for name, shape in shapes.items() if shape is not _ANYTHING}


_ANYTHING = object()


def _of_hint(hint: Any) -> Any:
    arguments = get_args(hint)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return shape_of(hint)
    if hint in (int, float, bool, str):
        return hint
    if hint is type(None):
        return None
    if isinstance(hint, types.UnionType):
        alternatives = tuple(_of_hint(argument) for argument in arguments)
        return _ANYTHING if _ANYTHING in alternatives else alternatives
    if get_origin(hint) is dict:
        return {...: _of_hint(arguments[1])}
    if get_origin(hint) is tuple:
        return [_of_hint(arguments[0])]
    return _ANYTHING


def _require(value: Any, kind: Any, where: str) -> None:
    if not isinstance(value, kind):
        raise ValueError(f"{where} is of a wrong type: {type(value).__name__}")


def _fits(value: Any, shape: Any, where: str) -> bool:
    try:
        conform(value, shape, where)
    except ValueError:
        return False
    return True

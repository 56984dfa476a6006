"""Reading YAML that nobody has checked: regular files of bounded size, and no aliases that multiply."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

MAX_BYTES = 2**20
MAX_NODES = 2_000
"""Values in a file, keys included. A configuration has about 200."""
MAX_ALIASES = 100
"""References to anchors. Each may merge up to MAX_NODES values into a mapping, which bounds what a file expands to."""


def load(path: Path) -> Any:
    """Return the content of a YAML file as plain data.

    Raises:
        OSError: the file cannot be read.
        Exception: the content is malformed. Besides its own errors, PyYAML raises many other kinds on bad scalars.
    """
    return yaml.load(_read(path).decode("utf-8"), _Loader)


def _read(path: Path) -> bytes:
    """Return the content of a regular file, without waiting for one that is a pipe."""
    with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise yaml.YAMLError("not a regular file")
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise yaml.YAMLError(f"larger than {MAX_BYTES} bytes")
    return content


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with limits, and with duplicate names as errors."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self._nodes = self._aliases = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self._nodes += 1
        self._aliases += self.check_event(yaml.AliasEvent)
        if self._nodes > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES} values")
        if self._aliases > MAX_ALIASES:
            raise yaml.YAMLError(f"more than {MAX_ALIASES} aliases")
        return super().compose_node(parent, index)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_NODES} values in a mapping")

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value != "<<":
                if key.value in names:
                    raise yaml.YAMLError(f"{key.value[:80]} is given twice")
                names.add(key.value)
        return super().construct_mapping(node, deep)

"""Safe opening of files whose content or name may have been prepared by somebody else.

A pipe never ends, a device has side effects, a link may lead anywhere, and a sparse file of terabytes fits on any disk.
The functions here open regular files only, and read no more than a stated number of bytes. They are the lowest layer:
the configuration, data sets and run directories are all read and written through them.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import IO, Any

import yaml

WRITABLE = 0o666
"""Mode of new files, before the umask."""


class Unreadable(OSError):
    """The file is not a regular file, is a link, or is too large. `strerror` says which."""


def open_regular(path: Path, *, follow_links: bool = False) -> IO[bytes]:
    """Open a regular file for reading, without ever blocking. Raises OSError, or Unreadable if it is not regular."""
    return os.fdopen(_open(path, os.O_RDONLY, follow_links=follow_links), "rb")


def read_regular(path: Path, limit: int, *, follow_links: bool = False) -> bytes:
    """Return the content of a regular file of at most `limit` bytes. Raises OSError, or Unreadable if it is not one."""
    with open_regular(path, follow_links=follow_links) as file:
        if os.fstat(file.fileno()).st_size > limit:
            raise Unreadable(errno.EFBIG, f"the file is larger than {limit:,} bytes", str(path))
        data = file.read(limit + 1)  # the file may be growing
    if len(data) > limit:
        raise Unreadable(errno.EFBIG, f"the file is larger than {limit:,} bytes", str(path))
    return data


def create_new(path: Path, mode: int = WRITABLE) -> IO[bytes]:
    """Create a file for writing. Raises OSError; FileExistsError if anything, even a dangling link, has that name."""
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode), "wb")


def open_to_append(path: Path) -> IO[bytes]:
    """Open a file for reading and appending, and create it if it is missing.

    Raises OSError; Unreadable if it is a symbolic link, has a second name (a hard link), or is not a regular file.
    """
    handle = _open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    if os.fstat(handle).st_nlink > 1:
        os.close(handle)
        raise Unreadable(errno.EMLINK, "the file has a second name (a hard link)", str(path))
    return os.fdopen(handle, "a+b")


def open_to_lock(path: Path) -> IO[bytes]:
    """Open an existing file whose lock is wanted, but not its content, so it may have other names. Raises OSError."""
    return os.fdopen(_open(path, os.O_RDWR), "r+b")


def _open(path: Path, flags: int, *, follow_links: bool = False) -> int:
    flags |= os.O_NONBLOCK | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW)
    try:
        handle = os.open(path, flags, WRITABLE)
    except OSError as error:
        if error.errno == errno.ELOOP and not follow_links:
            raise Unreadable(errno.ELOOP, "it is a symbolic link", str(path)) from None
        if error.errno in (errno.ENXIO, errno.EISDIR):  # a socket, or a pipe without a reader; a directory
            raise Unreadable(errno.EINVAL, "it is not a regular file", str(path)) from None
        raise
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Unreadable(errno.EINVAL, "it is not a regular file", str(path))
    return handle


MAX_BYTES = 2**20
MAX_NODES = 2_000
"""Largest number of values in a file, keys included. A configuration has about 200."""
MAX_ALIASES = 100
"""Largest number of references to anchors. Each merges at most MAX_NODES values, so an expanded file is bounded."""


def load(path: Path) -> Any:
    """Return the content of a YAML file as plain data.

    Raises:
        OSError: the file cannot be read.
        Exception: the content is malformed. Besides its own errors, PyYAML raises many other kinds on bad scalars.
    """
    return yaml.load(_read(path).decode("utf-8"), _Loader)


def _read(path: Path) -> bytes:
    """Return the content of a regular file. Raises YAMLError for anything else, such as a pipe, without blocking."""
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

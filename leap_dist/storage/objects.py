"""Objects behind a URL, through fsspec: put, get, list and remove, each within a bounded time.

Callers rely on two guarantees: an object appears whole or not at all, and a read after a put has returned sees it.
Object stores give both, and this module writes directories (file://) in the same way.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import fsspec

from leap_dist.config import files
from leap_dist.config.loading import ConfigError
from leap_dist.storage.atomic import remove, write_atomic
from leap_dist.storage.redaction import redact

CALL_SECONDS = 10.0
"""Time limit of a request, plus the time for its size: the server waits for it, and workers wait for the server."""
BYTES_PER_SECOND = 500_000.0
"""Speed of the slowest connection that is not considered broken."""
REST_SECONDS = 2.0
"""Seconds after a time-out in which requests fail at once, so that the server can attend to other callers."""

_S3 = {
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 8, "retries": {"max_attempts": 2}},
    "use_listings_cache": False,
    "skip_instance_cache": True,
}
_GCS = {"timeout": 8, "use_listings_cache": False, "skip_instance_cache": True}
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "file": ("", {}),
    "memory": ("", {}),
    "s3": ("s3fs", _S3),
    "s3a": ("s3fs", _S3),
    "gs": ("gcsfs", _GCS),
    "gcs": ("gcsfs", _GCS),
}
"""Supported URL schemes, on which objects appear whole: the package that each needs, and its fsspec options."""

_PART = re.compile(r"(?!\.{1,2}$)[A-Za-z0-9_.][A-Za-z0-9_.,=@+-]*")  # a component of a name that cannot lead elsewhere
_Result = TypeVar("_Result")


class Storage:
    """A folder of objects. Every failure is an OSError whose text is one line without secrets.

    Args:
        url: URL of the folder, without secrets. Names of objects are paths below it.
        filesystem: fsspec file system.
        root: path of the folder in the file system.
    """

    def __init__(self, url: str, filesystem: Any, root: str) -> None:
        self.url = url
        self._filesystem = filesystem
        self._root = root.rstrip("/")
        self._rests_until = 0.0
        self._sizes: dict[str, int] = {}

    @property
    def folder(self) -> Path | None:
        """The directory behind a file:// URL; None for other URLs."""
        return Path(self._root) if self.url.startswith("file:") else None

    def put(self, name: str, data: bytes) -> None:
        """Write a whole object, replacing an existing one; durable on return.

        If it raises OSError, the object may exist nevertheless, or appear later.
        """
        self._call(name, lambda path: self._put(path, data), len(data))

    def create(self, name: str, data: bytes) -> None:
        """Write an object that does not exist yet. Raises OSError, or FileExistsError if it does.

        Atomic if the store has conditional writes, as S3, GCS and directories do.
        """
        self._call(name, lambda path: self._create(path, data), len(data))

    def get(self, name: str) -> bytes:
        """Return the content of an object. Raises FileNotFoundError, OSError.

        The time limit depends on the size that `names` has listed, so list large objects first.
        """
        data: bytes = self._call(name, self._filesystem.cat_file, self._sizes.get(name, 0))
        return data

    def find(self, name: str) -> bytes | None:
        """Return the content of a small object, or None if it does not exist. Raises OSError."""
        try:
            return self.get(name)
        except FileNotFoundError:
            return None

    def names(self, below: str = "") -> list[str]:
        """Return the sorted names of all objects, or those in a folder; unsafe names are left out. Raises OSError."""
        found = self._call(below, self._find, 0)
        sizes = {path.removeprefix(self._root).lstrip("/"): size for path, size in found.items()}
        self._sizes |= sizes
        return sorted(name for name in sizes if all(_PART.fullmatch(part) for part in name.split("/")))

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects; missing ones are ignored. Raises OSError."""
        if names := list(names):
            self._call(names[0], lambda _: self._remove(names), 0)

    def probe(self) -> None:
        """Put an object, read it back and remove it. Raises OSError if any of that fails."""
        name, content = f".probe-{uuid.uuid4().hex}", uuid.uuid4().bytes
        self.put(name, content)
        if self.get(name) != content:
            raise OSError(errno.EIO, "an object was read back with different content")
        self.remove([name])

    def _put(self, path: str, data: bytes) -> None:
        if self.folder is None:
            self._filesystem.pipe_file(path, data)
            return
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_atomic(Path(path), data, "object")

    def _create(self, path: str, data: bytes) -> None:
        if self.folder is not None:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            with files.create_new(Path(path)) as file:
                file.write(data)
            return
        try:
            self._filesystem.pipe_file(path, data, mode="create")
        except Exception as error:
            if any(word in str(error) for word in ("PreconditionFailed", "pre-condition", "412")):
                raise FileExistsError(path) from None
            raise

    def _find(self, path: str) -> dict[str, int]:
        """Return sizes by path."""
        self._filesystem.invalidate_cache()
        found: dict[str, dict[str, Any]] = self._filesystem.find(path, detail=True)
        return {name: int(about.get("size") or 0) for name, about in found.items()}

    def _remove(self, names: list[str]) -> None:
        paths = [f"{self._root}/{name}" for name in names]
        if self.folder is not None:
            for path in paths:
                remove(Path(path))
            return
        try:
            self._filesystem.rm(paths)  # one request for all of them, if the store has that
        except FileNotFoundError:
            for path in paths:
                with contextlib.suppress(FileNotFoundError):
                    self._filesystem.rm_file(path)

    def _call(self, name: str, call: Callable[[str], _Result], size: int) -> _Result:
        """Return the result of a call on a path. It runs in its own thread, the only way to stop waiting for it."""
        if time.monotonic() < self._rests_until:
            raise TimeoutError(errno.ETIMEDOUT, "no request sent, because the last one has just timed out")
        path = f"{self._root}/{name}" if name else self._root
        outcome: list[_Result] = []
        trouble: list[BaseException] = []

        def run() -> None:
            try:
                outcome.append(call(path))
            except BaseException as error:  # raised below, in the calling thread
                trouble.append(error)

        thread = threading.Thread(target=run, name=f"storage {name}", daemon=True)
        thread.start()
        seconds = CALL_SECONDS + size / BYTES_PER_SECOND
        thread.join(seconds)
        if outcome:
            return outcome[0]
        if not trouble:
            self._rests_until = time.monotonic() + REST_SECONDS
            raise TimeoutError(errno.ETIMEDOUT, f"no answer within {seconds:.0f} s")
        error = trouble[0]
        if isinstance(error, FileNotFoundError | FileExistsError) or not isinstance(error, Exception):
            raise error
        raise OSError(getattr(error, "errno", None) or errno.EIO, _one_line(error)) from None


def is_url(text: str) -> bool:
    """Return whether the text is a URL rather than a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def open_storage(url: str, field: str = "run-dir") -> Storage:
    """Open the storage behind a URL, without sending a request yet.

    Raises ConfigError, which names the `field`, if the URL cannot be used or a package is missing.
    """
    try:
        parts = urlsplit(url)
    except ValueError:
        raise ConfigError(f"{field}: this is not a valid URL") from None
    scheme = parts.scheme.lower()
    # A secret that is not quoted may contain /, so that it seems to be part of the path.
    if "@" in parts.netloc or re.match(r"[^/]*://[^/@:]*:[^@]*@", url):
        raise ConfigError(
            f"{field}: the {ascii(scheme)[1:-1]}:// URL has a user or password in it, which would end up in logs; give "
            "credentials through the environment or the provider's own files"
        )
    if scheme not in SCHEMES:
        near = difflib.get_close_matches(scheme, SCHEMES, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]}://?" if near else f"use one of {', '.join(f'{name}://' for name in SCHEMES)}"
        raise ConfigError(f"{field}: {ascii(scheme)[1:-1][:40]}:// URLs cannot hold a run; {hint}")
    shown = redact(url)
    if re.search(r"[?#*\[\]\s\\]", url) or ".." in parts.path.split("/"):
        raise ConfigError(f"{field}: {shown} contains one of ? # * [ ] \\ .. or a space; leave that out")
    if scheme == "file" and parts.netloc:
        raise ConfigError(f"{field}: {shown} has no absolute path; it begins with file:///")
    if not parts.path.strip("/") and (scheme not in ("memory",) or not parts.netloc):
        raise ConfigError(f"{field}: {shown} names no folder; add one, as in {shown.rstrip('/')}/run")
    package, options = SCHEMES[scheme]
    try:
        filesystem, root = fsspec.core.url_to_fs(f"{scheme}://{url.partition('://')[2].rstrip('/')}", **options)
    except ImportError:
        extra = "s3" if package == "s3fs" else "gcs"
        raise ConfigError(
            f"{field}: {scheme}:// needs the package {package}; pip install {package}, or pip install '.[{extra}]'"
        ) from None
    except Exception as error:  # each package has errors of its own for bad settings
        raise ConfigError(f"{field}: {shown} cannot be used: {_one_line(error)}") from None
    return Storage(f"{scheme}://{url.partition('://')[2].rstrip('/')}", filesystem, root)


def _one_line(error: BaseException) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return redact(" ".join(f"{text or type(error).__name__}".split()))[:300]

"""The token of a Ray cluster: where Ray looks for one, and a new one where there is none. Plain files, no Ray."""

from __future__ import annotations

import errno
import os
import secrets
import stat
import sys
from pathlib import Path
from typing import NamedTuple

from leap_dist.config.loading import ConfigError


class Token(NamedTuple):
    """A token and where it came from, which may be said; the value may not."""

    value: str
    source: str


def find() -> Token | None:
    """The token that Ray would use: RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token.

    The file in the home directory is made private where others can read it, with a warning. Raises ConfigError where
    the file that should hold the token cannot be read, is empty, is a link or belongs to another user. What
    RAY_AUTH_TOKEN_PATH names may be either: clusters hand out secrets as links that belong to root.
    """
    if value := os.environ.get("RAY_AUTH_TOKEN"):
        return Token(value, "RAY_AUTH_TOKEN")
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            value = Path(path).read_text().strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"address: RAY_AUTH_TOKEN_PATH names {path}, which cannot be read ({error})") from None
        return _of_file(value, Path(path))
    try:
        return _of_file(_read_private(default_path()), default_path())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"address: the token file {default_path()} cannot be read ({error})") from None


def find_or_create() -> Token:
    """The same, with a new token in ~/.ray/auth_token where there is none. Raises ConfigError."""
    found = find()
    if found is None:
        try:
            _create(default_path())
        except OSError as error:
            raise ConfigError(
                f"address: the token file {default_path()} cannot be written ({error.strerror}); "
                "set RAY_AUTH_TOKEN, or another HOME"
            ) from None
        found = find()
    if found is None:
        raise ConfigError(f"address: the token file {default_path()} was removed while it was being made; start again")
    return found


def default_path() -> Path:
    """The file that is used where the environment names no other."""
    return Path.home() / ".ray" / "auth_token"


def _of_file(value: str, path: Path) -> Token:
    if not value:
        raise ConfigError(f"address: the token file {path} is empty; remove it, or put a token into it")
    return Token(value, str(path))


def _read_private(path: Path) -> str:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise ConfigError(
                f"address: the token file {path} is a symbolic link; put a file there, or set RAY_AUTH_TOKEN_PATH"
            ) from None
        raise
    with os.fdopen(handle) as file:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            raise ConfigError(
                f"address: the token file {path} is not a file of your own; remove it, or set RAY_AUTH_TOKEN_PATH"
            )
        if status.st_mode & 0o077:
            os.fchmod(handle, 0o600)
            print(f"warning: {path} could be read by other users, and cannot any more; renew it", file=sys.stderr)
        return file.read().strip()


def _create(path: Path) -> None:
    """A new token, private from its first byte on; nothing is changed where another process was faster."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # of a process of that number that was killed
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(handle)
        os.link(temporary, path)  # appears whole, and replaces nothing
    except FileExistsError:
        pass
    finally:
        temporary.unlink()

"""Finds the authentication token that Ray would use for a cluster, without using Ray."""

from __future__ import annotations

import errno
import os
import stat
import sys
from pathlib import Path
from typing import NamedTuple

from leap_dist.config import files
from leap_dist.config.loading import ConfigError

LARGEST_TOKEN = 2**16
"""Size in bytes of the largest token file that is read."""


class Token(NamedTuple):
    """A token, which must not be shown, and its source, which may."""

    value: str
    source: str


def find() -> Token | None:
    """Return the token that Ray would use: RAY_AUTH_TOKEN, else the file RAY_AUTH_TOKEN_PATH, else ~/.ray/auth_token.

    If others can read the file in the home directory, it is made private, with a warning. Raises ConfigError if the
    file cannot be read, is empty, is a link or belongs to another user. The file RAY_AUTH_TOKEN_PATH may be a link and
    belong to another user, because clusters mount secrets that way.
    """
    if value := os.environ.get("RAY_AUTH_TOKEN"):
        return Token(value, "RAY_AUTH_TOKEN")
    if path := os.environ.get("RAY_AUTH_TOKEN_PATH"):
        try:
            value = files.read_regular(Path(path), LARGEST_TOKEN, follow_links=True).decode().strip()
        except (OSError, ValueError) as error:
            raise ConfigError(f"address: RAY_AUTH_TOKEN_PATH names {path}, which cannot be read ({error})") from None
        return _of_file(value, Path(path))
    try:
        return _of_file(_read_private(default_path()), default_path())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"address: the token file {default_path()} cannot be read ({error})") from None


def default_path() -> Path:
    """Return the path of the token file that is used if the environment names no other. Raises ConfigError."""
    try:
        return Path.home() / ".ray" / "auth_token"
    except RuntimeError:
        raise ConfigError(
            "address: this user has no home directory for Ray's token; set HOME, or RAY_AUTH_TOKEN"
        ) from None


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
                f"address: the token file {path} is not a file of this user; remove it, or set RAY_AUTH_TOKEN_PATH"
            )
        if status.st_mode & 0o077:
            os.fchmod(handle, 0o600)
            print(
                f"warning: {path} was readable by others and has been made private; renew the token",
                file=sys.stderr,
            )
        return file.read().strip()

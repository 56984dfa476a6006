"""Removes secrets from text that is written or shown: values from the environment, and text that looks like one."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import threading
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import TextIO
from urllib.parse import quote, quote_plus

from leap_dist.config import files
from leap_dist.storage import auth_token

HIDDEN = "***"
SHORTEST = 8
"""Length from which a secret value is hidden wherever it appears; hiding shorter ones would damage ordinary text."""

_SECRET_VARIABLE = re.compile(
    r"(TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|KEY|KEY_ID|CREDENTIALS?|CONNECTION_STRING|SIGNATURE)$", re.IGNORECASE
)
_NAME = (
    r"(?:token|secret|passw(?:or)?d|passphrase|api[_-]?key|access[_-]?key(?:[_-]?id)?|private[_-]?key|signature"
    r"|x-amz-credential)"
)
_VALUE = r"""(?:"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*'|\S+)"""
# No pattern may start with an unbounded repetition: matching would take quadratic time.
_SHAPES = [
    # In a URL. A password that is not quoted may contain anything but white space and, in practice, @.
    (re.compile(r"(://)[^\s/@:]{0,256}:[^\s@]{1,1024}@"), rf"\1{HIDDEN}@"),
    (re.compile(r"(://)[^\s/]+@"), rf"\1{HIDDEN}@"),
    # The pair of key id and secret, however it is separated, and any 40 characters that look like such a secret.
    (re.compile(r"\b((?:AKIA|ASIA)[A-Z0-9]{16}[^A-Za-z0-9/+]{1,8})[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+])"), HIDDEN),
    (
        re.compile(
            r"(?<![A-Za-z0-9/+.])(?=[a-z0-9/+]{0,39}[A-Z])(?=[A-Z0-9/+]{0,39}[a-z])(?=[A-Za-z/+]{0,39}[0-9])"
            r"(?=[A-Za-z0-9]{0,39}[/+])[A-Za-z0-9/+]{40}(?![A-Za-z0-9/+.])"
        ),
        HIDDEN,
    ),
    (
        re.compile(r"""((?:^|(?<=[\s"'=(,])))[\w.+-]{1,64}:[^\s/]{1,256}@(?=[\w\[])"""),
        rf"\1{HIDDEN}@",
    ),  # the same without scheme
    (re.compile(r"""(authorization["']?\s*[:=]\s*["']?)(?:\w+\s+)?[^\s"']+""", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(\bbearer\s+)[^\s\"']+", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"""({_NAME}["']?\s*[:=]\s*){_VALUE}""", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(rf"(--[\w.-]{{0,40}}?{_NAME}\s+){_VALUE}", re.IGNORECASE), rf"\1{HIDDEN}"),
    (re.compile(r"(_KEY=)" + _VALUE), rf"\1{HIDDEN}"),
    (re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), HIDDEN),
]


def redact(text: str) -> str:
    """Return `text` with every secret replaced by ***."""
    return redact_all([text])[0]


def redact_all(texts: Iterable[str]) -> list[str]:
    """Return several texts with every secret replaced by ***."""
    known = _known()
    return [_redact(text, known) for text in texts]


def _redact(text: str, known: list[str]) -> str:
    for secret in known:
        text = text.replace(secret, HIDDEN)
    for shape, replacement in _SHAPES:
        text = shape.sub(replacement, text)
    return text


def _known() -> list[str]:
    """Return the secrets that this process knows, plain and in quoted forms, longest first."""
    values = {value for name, value in os.environ.items() if _SECRET_VARIABLE.search(name)}
    for path in (os.environ.get("RAY_AUTH_TOKEN_PATH"), "~/.ray/auth_token"):
        with contextlib.suppress(OSError, ValueError, RuntimeError):  # no such file, no text, no home directory
            file = Path(path or "").expanduser()
            values.add(files.read_regular(file, auth_token.LARGEST_TOKEN, follow_links=True).decode().strip())
    long = [value for value in values if len(value) >= SHORTEST]
    forms = {form for value in long for form in _forms(value)}
    return sorted((form for form in forms if len(form) >= SHORTEST), key=len, reverse=True)


def _forms(value: str) -> Iterator[str]:
    """Yield a secret in plain form, and as programs print it: quoted for JSON, Python and URLs."""
    yield from (value, value.strip(), json.dumps(value)[1:-1], repr(value)[1:-1])
    for quoted in (quote(value, safe=""), quote(value), quote_plus(value)):
        yield quoted
        yield re.sub("%[0-9A-F]{2}", lambda match: match[0].lower(), quoted)


def print_exception(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print an unexpected error with its traceback, but without secrets; a replacement for `sys.excepthook`."""
    print(redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr)


class RedactedStream(io.TextIOBase):
    """A text stream that hides secrets in what is written through it, line by line.

    Args:
        stream: the stream to write to. It gets whole lines only, unless `flush` is called in the middle of one.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._line = ""
        self._lock = threading.Lock()

    def write(self, text: str) -> int:
        """Write text; what follows the last line break is kept until the next call."""
        with self._lock:
            *lines, self._line = (self._line + text).split("\n")
            if lines:
                self._stream.write("".join(f"{line}\n" for line in redact_all(lines)))
        return len(text)

    def flush(self) -> None:
        """Write what was kept and flush the stream."""
        with self._lock:
            if self._line:
                self._stream.write(redact(self._line))
                self._line = ""
            self._stream.flush()

    def fileno(self) -> int:
        """Return the stream's file descriptor, to which others may write past this object."""
        return self._stream.fileno()

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        return self._stream.isatty()


def redact_output() -> None:
    """Hide secrets in everything that Python code of this process prints or logs from now on.

    Processes of Ray's actors call it: their output goes to files that Ray keeps under its temporary directory.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, RedactedStream):
            setattr(sys, name, RedactedStream(stream))

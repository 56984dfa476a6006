"""Standard output and standard error of the command line: one-line messages, and streams that cannot fail."""

from __future__ import annotations

import contextlib
import io
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO, cast

from leap_dist.storage.redaction import redact
from leap_dist.telemetry.escaping import printable

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130
EXIT_CODES = {"done": 0, "failed": FAILED, "interrupted": INTERRUPTED}
"""Exit codes by the outcome of training or an evaluation."""
_KEPT = "stopped immediately; everything accepted is on disk"
STOPPED = {
    "train": f"{_KEPT}; continue with --run-dir DIR --resume",
    "evaluate": f"{_KEPT}; continue with the same command and --out DIR",
    "study": f"{_KEPT}; the same command continues",
}
"""A command that is stopped by a second signal prints this text."""


def program() -> str:
    """Return the name under which this program was called: `launch.py`, or else `leap-dist`."""
    return "launch.py" if Path(sys.argv[0]).name == "launch.py" else "leap-dist"


def command() -> str:
    """Return the words that the user has to type to call this program again."""
    return f"python {program()}" if program() == "launch.py" else program()


def resume_command(shown: str, modules: Sequence[str] = ()) -> str:
    """Return the command that continues the training run at `shown`, whose environments need `modules`."""
    return f"{command()} train --run-dir {shlex.quote(shown)} --resume{modules_flag(modules)}"


def modules_flag(modules: Sequence[str]) -> str:
    """Return the flag, after a space, that names the modules of own environments; "" without modules."""
    return f" --gymnasium.modules {shlex.join(modules)}" if modules else ""


def complain(message: str) -> NoReturn:
    """Print one line that says what is wrong, and exit with code 2."""
    notice("error", message)
    raise SystemExit(BAD_INPUT)


def notice(kind: str, message: str) -> None:
    """Print one line to standard error, without secrets and control characters. `kind` is error, warning or note."""
    print(f"{program()}: {kind}: {printable(' '.join(redact(message).split()))}", file=sys.stderr)


def announce_loading() -> None:
    """Say on a terminal that the libraries are being loaded, which takes two seconds or more."""
    if sys.stdout.isatty():
        print("loading PyTorch and Ray", flush=True)


@contextlib.contextmanager
def safe_streams() -> Iterator[None]:
    """Replace standard output and error by streams that never raise.

    A reader that is gone (`| head`), a full disk, a closed stream or an encoding that lacks a character must not end
    hours of training: output that cannot be written is dropped.
    """
    _open_closed_descriptors()
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_safe(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _open_closed_descriptors() -> None:
    """Open the null device in place of closed standard streams.

    Otherwise the next file that is opened takes their place, and receives what native code prints.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number


def _safe(stream: TextIO | None) -> TextIO:
    """Return a stream that writes to `stream` if it can. Python's own stream is None if it was closed at the start."""
    if stream is None:
        return io.StringIO()
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return cast(TextIO, _SafeStream(stream))


class _SafeStream:
    """A text stream whose `write` and `flush` never raise. After a failure, its output goes to the null device."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with self._discarding():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with self._discarding():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    @contextlib.contextmanager
    def _discarding(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError):  # ValueError: the stream was closed
            with contextlib.suppress(OSError, ValueError):
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self._stream.fileno())  # what is still buffered goes there too, now or at exit
                os.close(null)

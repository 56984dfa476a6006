"""A MetaServer in a process of its own, which a failpoint can end by SIGKILL."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
from pathlib import Path
from typing import Any

from crashes import Killed
from protocol import serve

from leap_dist.testing import failpoints

CONTEXT = multiprocessing.get_context("fork")  # the libraries are loaded already


class Process:
    """A MetaServer in a process of its own. Raises Killed where a failpoint ended it."""

    def __init__(self, run_dir: Path, settings: Any, faults: str) -> None:
        self._pipe, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=self._serve, args=(theirs, run_dir, settings, faults), daemon=True)
        self._process.start()
        theirs.close()
        try:
            self._answer()
        except Killed:
            self.close()
            raise

    def _serve(self, pipe: Any, run_dir: Path, settings: Any, faults: str) -> None:
        self._pipe.close()
        failpoints.arm(faults)
        server = serve(run_dir, settings)
        pipe.send(None)
        while True:
            try:
                name, arguments = pipe.recv()
            except EOFError:
                return
            value = getattr(server, name)
            pipe.send(value(*arguments) if callable(value) else value)

    def _answer(self) -> Any:
        try:
            return self._pipe.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            assert self._process.exitcode == -signal.SIGKILL
            raise Killed from None

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> Any:
            with contextlib.suppress(BrokenPipeError):
                self._pipe.send((name, arguments))
            return self._answer()

        return call

    def close(self) -> None:
        self._pipe.close()
        self._process.join()

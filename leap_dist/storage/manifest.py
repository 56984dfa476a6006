"""manifest.json: what is needed to repeat a run, and on which machine and with which versions each launch ran."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from leap_dist.config import pretrained
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.protocol import schema
from leap_dist.storage.atomic import DECODE_ERRORS, CorruptFile, read_regular, write_atomic
from leap_dist.storage.redaction import redact, redact_all

PACKAGES = ("torch", "ray", "numpy", "gymnasium", "ale-py", "safetensors", "tensorboard")
"""Packages whose versions are recorded."""

LARGEST = 2**22
"""Size in bytes of the largest manifest that is read."""
MOST_SESSIONS = 1000
"""Number of launches that are recorded; the first one is always kept."""


def write_manifest(run_dir: Path, config: Config) -> None:
    """Describe this launch in manifest.json. Raises OSError.

    The first launch's description stays as it is; `sessions` lists every launch, the first one included.
    """
    session = describe(config)
    try:
        first = _read(run_dir)
        sessions = first.pop("sessions", None) or [dict(first)]  # written before sessions were recorded
    except (CorruptFile, OSError, *DECODE_ERRORS):
        first, sessions = session, []
    content = {**first, "sessions": [*sessions, session][-MOST_SESSIONS:]}
    write_atomic(run_dir / "manifest.json", json.dumps(content, indent=2).encode(), "manifest")


def last_session(run_dir: Path) -> dict[str, Any]:
    """Return the description of the last launch. Raises CorruptFile, OSError, or one of DECODE_ERRORS."""
    content = _read(run_dir)
    session: dict[str, Any] = (content.get("sessions") or [content])[-1]
    schema.check(session, {"leap_dist": str, "started": str, "packages": {...: str}}, "manifest")
    return session


def changed_packages(run_dir: Path) -> list[str]:
    """Return a warning for each package whose version differs from the one that the run was last started with.

    Call this before `write_manifest`, which records the versions that are installed now.
    """
    try:
        packages = last_session(run_dir)["packages"]
    except (CorruptFile, OSError, *DECODE_ERRORS):
        return ["manifest.json cannot be read, so changed package versions cannot be detected"]
    installed = {name: metadata.version(name) for name in PACKAGES}
    return [
        f"{name} is {installed[name]}, but the run last used {ascii(packages[name])[1:-1][:40]}: results may not be "
        "identical to the bit"
        for name in PACKAGES
        if name in packages and packages[name] != installed[name]
    ]


def describe(config: Config) -> dict[str, Any]:
    """Return what is needed to repeat this launch: versions, revision, seed, command and hardware."""
    import torch  # takes seconds to import, and commands that only read a run do not need it

    return {
        "leap_dist": _git_revision(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "host": platform.node(),
        "command": describe_command(),
        "seed": config.seed,
        **({"init": _initialization(config.init)} if config.init else {}),
        "python": platform.python_version(),
        "packages": {name: metadata.version(name) for name in PACKAGES},
        "hardware": {
            "machine": platform.machine(),
            "system": f"{platform.system()} {platform.release()}",
            "processors": os.cpu_count(),
            "bfloat16": torch.cpu._is_avx512_bf16_supported(),
            "mps": config.worker.mps if shutil.which("nvidia-cuda-mps-control") else "not installed",
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        },
    }


def _initialization(source: str) -> dict[str, str | None]:
    """Return the source of the initialization that the run started from, and the SHA-256 of a file on this machine."""
    try:
        data = pretrained.path_of(source).read_bytes()
    except (ConfigError, OSError):  # a URL, or a file that has been removed since the run began
        return {"source": redact(source), "sha256": None}
    return {"source": source, "sha256": hashlib.sha256(data).hexdigest()}


def describe_command() -> list[str]:
    """Return the words of the command that started this process, without secrets."""
    return redact_all([Path(sys.argv[0]).name, *sys.argv[1:]])


def _read(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(read_regular(run_dir / "manifest.json", LARGEST))
    schema.check(content, {}, "manifest")
    sessions = content.get("sessions", [])
    schema.check(sessions, [{...: object}], "sessions")
    return content


def _git_revision() -> str:
    """Return the commit of the running code, with a + if it was modified; "unknown" outside a checkout."""
    here = Path(__file__).parents[1]
    try:
        revision = _git(here, "rev-parse", "--short=12", "HEAD")
        return revision + ("+" if _git(here, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()

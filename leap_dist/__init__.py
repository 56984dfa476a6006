"""Leap meta-learning of Atari initializations, as a service on Ray.

The names in `_LIBRARY` are for programs that use it as a library: docs/weights.md and docs/library.md. They are
imported when they are first asked for, so that `import leap_dist` alone costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LIBRARY = {
    "Config": "leap_dist.settings",
    "Contribution": "leap_dist.contribution",
    "CorruptFile": "leap_dist.files",
    "Lease": "leap_dist.contribution",
    "Manifest": "leap_dist.models",
    "MetaServer": "leap_dist.server",
    "MetaSettings": "leap_dist.settings",
    "PullForward": "leap_dist.leap",
    "flatten": "leap_dist.models",
    "load_encoder": "leap_dist.weights",
    "load_network": "leap_dist.weights",
    "load_vector": "leap_dist.models",
    "read_initialization": "leap_dist.weights",
}


def __getattr__(name: str) -> Any:
    """One of the names above. Raises AttributeError for any other."""
    if name not in _LIBRARY:
        raise AttributeError(f"module 'leap_dist' has no attribute {name!r}")
    return getattr(import_module(_LIBRARY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LIBRARY])

"""Leap meta-learning of Atari initializations, as a service on Ray.

For use as a library, these names come with the package, and are imported when they are first asked for, so that
`import leap_dist` alone costs nothing: `load_encoder` and `read_initialization` (docs/weights.md), `PullForward`,
`MetaServer` and `resolve` (docs/library.md), and `CorruptFile`, which reading a damaged file raises.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LIBRARY = {
    "CorruptFile": "leap_dist.files",
    "MetaServer": "leap_dist.server",
    "PullForward": "leap_dist.leap",
    "load_encoder": "leap_dist.weights",
    "read_initialization": "leap_dist.weights",
    "resolve": "leap_dist.config",
}


def __getattr__(name: str) -> Any:
    """One of the names above. Raises AttributeError for any other."""
    if name not in _LIBRARY:
        raise AttributeError(f"module 'leap_dist' has no attribute {name!r}")
    return getattr(import_module(_LIBRARY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LIBRARY])

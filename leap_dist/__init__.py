"""Leap meta-learning of Atari initializations, as a service on Ray.

The names in `_LIBRARY` are the public interface for other programs; see docs/weights.md and docs/library.md. They are
imported on first use, so that `import leap_dist` itself takes no time.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LIBRARY = {
    "Config": "leap_dist.config.settings",
    "Contribution": "leap_dist.protocol.messages",
    "CorruptFile": "leap_dist.storage.atomic",
    "Lease": "leap_dist.protocol.messages",
    "Manifest": "leap_dist.nn.flat_vector",
    "MetaServer": "leap_dist.server.meta_server",
    "MetaSettings": "leap_dist.config.settings",
    "PullForward": "leap_dist.leap.pull_forward",
    "flatten": "leap_dist.nn.flat_vector",
    "load_encoder": "leap_dist.weights.initialization",
    "load_network": "leap_dist.weights.initialization",
    "load_vector": "leap_dist.nn.flat_vector",
    "read_initialization": "leap_dist.weights.initialization",
}


def __getattr__(name: str) -> Any:
    """Import one of the public names. Raises AttributeError for any other name."""
    if name not in _LIBRARY:
        raise AttributeError(f"module 'leap_dist' has no attribute {name!r}")
    return getattr(import_module(_LIBRARY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LIBRARY])

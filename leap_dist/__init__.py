"""Leap meta-learning of Atari initializations, as a service on Ray.

The names in `_LIBRARY` are the public interface for other programs; see docs/python.md, docs/weights.md and
docs/library.md. They are imported on first use, so that `import leap_dist` itself takes no time.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what a type checker sees; at run time the names are imported on first use
    from leap_dist.api.callbacks import Callback as Callback
    from leap_dist.api.callbacks import LiveRun as LiveRun
    from leap_dist.api.callbacks import MetaUpdate as MetaUpdate
    from leap_dist.api.callbacks import TaskResult as TaskResult
    from leap_dist.api.errors import Interrupted as Interrupted
    from leap_dist.api.evaluating import Report as Report
    from leap_dist.api.evaluating import evaluate as evaluate
    from leap_dist.api.training import Run as Run
    from leap_dist.api.training import train as train
    from leap_dist.config.loading import ConfigError as ConfigError
    from leap_dist.config.settings import Config as Config
    from leap_dist.config.settings import MetaSettings as MetaSettings
    from leap_dist.driver.errors import RunFailed as RunFailed
    from leap_dist.leap.pull_forward import PullForward as PullForward
    from leap_dist.nn.flat_vector import Manifest as Manifest
    from leap_dist.nn.flat_vector import flatten as flatten
    from leap_dist.nn.flat_vector import load_vector as load_vector
    from leap_dist.protocol.messages import Contribution as Contribution
    from leap_dist.protocol.messages import Lease as Lease
    from leap_dist.server.meta_server import MetaServer as MetaServer
    from leap_dist.storage.atomic import CorruptFile as CorruptFile
    from leap_dist.storage.locks import RunDirectoryBusy as RunDirectoryBusy
    from leap_dist.weights.hub import from_pretrained as from_pretrained
    from leap_dist.weights.hub import push_to_hub as push_to_hub
    from leap_dist.weights.hub import save_pretrained as save_pretrained
    from leap_dist.weights.initialization import Initialization as Initialization
    from leap_dist.weights.initialization import load_encoder as load_encoder
    from leap_dist.weights.initialization import load_network as load_network
    from leap_dist.weights.initialization import read_initialization as read_initialization

__version__ = "0.1.0"

_LIBRARY = {
    "Callback": "leap_dist.api.callbacks",
    "Config": "leap_dist.config.settings",
    "ConfigError": "leap_dist.config.loading",
    "Contribution": "leap_dist.protocol.messages",
    "CorruptFile": "leap_dist.storage.atomic",
    "Initialization": "leap_dist.weights.initialization",
    "Interrupted": "leap_dist.api.errors",
    "Lease": "leap_dist.protocol.messages",
    "LiveRun": "leap_dist.api.callbacks",
    "Manifest": "leap_dist.nn.flat_vector",
    "MetaServer": "leap_dist.server.meta_server",
    "MetaSettings": "leap_dist.config.settings",
    "MetaUpdate": "leap_dist.api.callbacks",
    "PullForward": "leap_dist.leap.pull_forward",
    "Report": "leap_dist.api.evaluating",
    "Run": "leap_dist.api.training",
    "RunDirectoryBusy": "leap_dist.storage.locks",
    "RunFailed": "leap_dist.driver.errors",
    "TaskResult": "leap_dist.api.callbacks",
    "evaluate": "leap_dist.api.evaluating",
    "flatten": "leap_dist.nn.flat_vector",
    "from_pretrained": "leap_dist.weights.hub",
    "load_encoder": "leap_dist.weights.initialization",
    "load_network": "leap_dist.weights.initialization",
    "load_vector": "leap_dist.nn.flat_vector",
    "push_to_hub": "leap_dist.weights.hub",
    "read_initialization": "leap_dist.weights.initialization",
    "save_pretrained": "leap_dist.weights.hub",
    "train": "leap_dist.api.training",
}

__all__ = [*_LIBRARY]


def __getattr__(name: str) -> Any:
    """Import one of the public names. Raises AttributeError for any other name."""
    if name not in _LIBRARY:
        raise AttributeError(f"module 'leap_dist' has no attribute {name!r}")
    return getattr(import_module(_LIBRARY[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_LIBRARY])

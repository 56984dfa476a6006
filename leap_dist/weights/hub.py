"""Initializations as folders and as repositories of the Hugging Face Hub.

Only `push_to_hub`, and `from_pretrained` with the name of a repository, use the network, and need the extra `hub`
(`pip install "leap-dist[hub]"`).
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leap_dist.config import pretrained
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.config.validation import did_you_mean
from leap_dist.storage.atomic import CorruptFile
from leap_dist.weights import card
from leap_dist.weights.initialization import Initialization, read_initialization
from leap_dist.weights.warm_start import locate

LICENSES = ("apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-nc-4.0", "cc0-1.0", "openrail", "other")
"""Licenses that are suggested; any identifier of the Hub is accepted."""


def save_pretrained(
    init: str | Path | Initialization,
    folder: str | Path,
    *,
    title: str = "",
    summary: str = "",
    license: str = "apache-2.0",
    results: str | Path | Mapping[str, Any] | None = None,
    arm: str = "",
    source: str = ".",
) -> Path:
    """Write an initialization with its model card, license and settings to a new folder, and return the folder.

    Args:
        init: a file, a run directory, a URL, `pretrained:NAME`, or the result of `read_initialization`.
        folder: directory to create; it must not exist yet, or be empty.
        title: name of the model in the card; by default the name of the folder.
        summary: what it was meta-learned on, in one line; by default made from the metadata.
        license: identifier of the license, as the Hub writes it.
        results: directory or results.json of an evaluation, or its content, for the metrics in the card.
        arm: label of this initialization in that evaluation; needed if there is more than one besides scratch.
        source: repository that the example in the card loads from.

    Raises ConfigError, in one line, if something is missing or in the way.
    """
    folder = Path(folder)
    if not license or license != license.lower() or " " in license:
        raise ConfigError(f"license: {license[:80]!r} is not an identifier{did_you_mean(license, LICENSES)}")
    found, settings = _read(init)
    numbers = _results(results)
    card.write_folder(
        found,
        folder,
        title=title or folder.name,
        summary=summary or _summary(found),
        license=license,
        settings=settings,
        results=numbers,
        arm=arm or _only_arm(numbers),
        source=source,
    )
    return folder


def from_pretrained(source: str | Path, *, revision: str | None = None, token: str | None = None) -> Initialization:
    """Read an initialization from a folder, from `pretrained:NAME`, or from a repository OWNER/NAME of the Hub.

    A folder that exists is never looked up on the Hub. The checksum in the file is verified in any case.

    Raises ConfigError if there is none, or if the package huggingface_hub is needed and missing; CorruptFile; OSError.
    """
    text = str(source)
    if pretrained.is_name(text) or Path(source).exists() or text.count("/") != 1:
        return read_initialization(locate(text))
    hub = _hub()
    try:
        path = hub.hf_hub_download(text, card.WEIGHTS, revision=revision, token=token)
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"init: {text} is neither a folder nor a repository that can be read: {reason}") from None
    return read_initialization(path)


def push_to_hub(
    init: str | Path | Initialization, repo_id: str, *, private: bool = False, token: str | None = None, **about: Any
) -> str:
    """Upload an initialization, with everything that `save_pretrained` writes, and return the address of the commit.

    Args:
        init: as for `save_pretrained`.
        repo_id: repository OWNER/NAME; it is created if it does not exist.
        private: whether a new repository is private.
        token: access token; by default that of `hf auth login`.
        about: summary, license, results and arm, as for `save_pretrained`.

    Raises ConfigError if the package huggingface_hub is missing or refuses, or as `save_pretrained` does.
    """
    hub = _hub()
    with tempfile.TemporaryDirectory(prefix="leap-dist-hub-") as temporary:
        title = str(about.pop("title", "") or repo_id.rpartition("/")[2])
        folder = save_pretrained(init, Path(temporary) / "model", title=title, source=repo_id, **about)
        try:
            hub.create_repo(repo_id, private=private, token=token, exist_ok=True)
            return str(hub.upload_folder(repo_id=repo_id, folder_path=folder, token=token))
        except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
            raise ConfigError(f"repo_id: {repo_id} cannot be written: {' '.join(str(error).split())[:200]}") from None


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError:
        raise ConfigError('huggingface_hub is not installed; pip install "leap-dist[hub]"') from None
    return huggingface_hub


def _read(init: str | Path | Initialization) -> tuple[Initialization, Config | None]:
    """Return an initialization, and the settings of its run if the file is in its directory. Raises ConfigError."""
    if isinstance(init, Initialization):
        return init, None
    path = locate(str(init))
    try:
        found = read_initialization(path)
        return found, found.settings_in(path.parent)
    except OSError as error:
        raise ConfigError(f"init: {init} cannot be read ({error.strerror})") from None
    except CorruptFile as error:
        raise ConfigError(f"init: {error}") from None


def _summary(found: Initialization) -> str:
    games = found.metadata["games"]
    return f"Meta-learned with {found.metadata['meta_learner']} on {len(games)} tasks ({found.tasks})."


def _results(given: str | Path | Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    if given is None or isinstance(given, Mapping):
        return given
    path = Path(given)
    path = path / "results.json" if path.is_dir() else path
    try:
        content: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"results: {path} cannot be read: {error}") from None
    return content


def _only_arm(results: Mapping[str, Any] | None) -> str:
    arms = [arm for arm in (results or {}).get("arms", ()) if arm != "scratch"]
    return str(arms[0]) if len(arms) == 1 else ""

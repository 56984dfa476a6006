"""Model cards of initializations, and folders that hold one with everything that belongs to it.

A card is Markdown with YAML metadata in front, in the format of the Hugging Face Hub: license, tags, and the metrics of
an evaluation as a model index.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from leap_dist.config import loading as configuration
from leap_dist.config.loading import ConfigError
from leap_dist.config.plurals import counted
from leap_dist.config.settings import Config
from leap_dist.storage.atomic import pack
from leap_dist.storage.redaction import redact
from leap_dist.weights.initialization import ENVIRONMENTS, Initialization

WEIGHTS, MANIFEST, CARD, LICENSE, SETTINGS = (
    "init.safetensors", "manifest.json", "README.md", "LICENSE", "config.yaml"
)  # fmt: skip
"""Names of the files in such a folder."""

_ABOUT = """\
# {title}

{summary}

This is an initialization, not a trained model: weights from which training on a new task should be short, meta-learned
by leap-dist with {meta_learner} ([Leap](https://arxiv.org/abs/1812.01054) and its baselines). Add a fresh head, and
train everything.

```python
import leap_dist

{loading}
```

| | |
|---|---|
{facts}

{results}## Limitations

- Compare it with a random initialization on tasks that it was not trained on, with several seeds.
- The input has to be prepared as the table says.

License: {license}. The file is safetensors with a checksum: reading it runs no code.
"""
_LOADING = {
    True: 'encoder = leap_dist.from_pretrained("{source}").encoder()',
    False: 'network = leap_dist.from_pretrained("{source}").network(classes=N, head_seed=0)',
}


_PLACES = ("data_dir", "address", "init")
"""Settings that name directories or hosts."""


def text(
    found: Initialization,
    *,
    title: str,
    summary: str,
    license: str,
    results: Mapping[str, Any] | None = None,
    arm: str = "",
    source: str = ".",
) -> str:
    """Return the card of an initialization.

    Args:
        found: the initialization.
        title: name of the model.
        summary: what it was meta-learned on, in one line.
        license: identifier of the license, as the Hub writes it: apache-2.0, mit, …
        results: content of an evaluation's results.json, for the metrics.
        arm: label of this initialization in the evaluation.
        source: folder or repository that the example loads it from.
    """
    is_game = found.tasks in ENVIRONMENTS
    metrics = list(_metrics(results, arm, found.sha256)) if results else []
    front: dict[str, Any] = {
        "license": license,
        "library_name": "leap-dist",
        "pipeline_tag": "reinforcement-learning" if is_game else "image-classification",
        "tags": ["leap", "meta-learning", found.tasks],
    }
    if metrics:
        front["model-index"] = [
            {
                "name": title,
                "results": [
                    {
                        "task": {"type": front["pipeline_tag"]},
                        "dataset": {"name": game, "type": found.tasks},
                        "metrics": values,
                    }
                    for game, values in metrics
                ],
            }
        ]
    return "---\n{}---\n\n{}".format(
        yaml.safe_dump(front, sort_keys=False),
        _ABOUT.format(
            title=title,
            summary=summary,
            meta_learner=found.metadata["meta_learner"],
            loading=_LOADING[is_game].format(source=source),
            facts="\n".join(f"| {name} | {value} |" for name, value in _facts(found).items()),
            results=_table(metrics),
            license=license,
        ),
    )


def _facts(found: Initialization) -> dict[str, str]:
    metadata = found.metadata
    shown = {
        "tasks": f"{found.tasks}: {', '.join(metadata['games'])}",
        "meta-updates": metadata["version"],
        "mode": metadata.get("mode"),
        "steps per task": metadata.get("task_steps"),
        "steps in all": metadata.get("agent_steps"),
        "preset": metadata["preset"],
        "meta-learned part": found.scope,
        "input": ", ".join(f"{name} {value}" for name, value in metadata["preprocessing"].items()),
        "SHA-256 of the run's file": found.sha256,
    }
    return {
        name: f"{value:,}" if isinstance(value, int) else str(value)
        for name, value in shown.items()
        if value is not None
    }


def _metrics(results: Mapping[str, Any], arm: str, sha256: str) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield the name of each game or data set, and its metrics.

    Raises ConfigError if the arm is not in the results, or started from another file than the one with this SHA-256.
    """
    if arm not in results.get("arms", ()):
        raise ConfigError(f"results: no arm {arm[:80]!r}; there are {', '.join(results.get('arms', ()))}")
    for one in results.get("described") or ():
        found = str(one.get("sha256", sha256))  # results of older versions may not say it
        if one["label"] == arm and found != sha256:
            raise ConfigError(
                f"results: {arm} started from {one.get('source')} with SHA-256 {found[:12]}, not from these "
                f"weights ({sha256[:12]}); evaluate these, or publish those"
            )
    for game, cells in (results.get("cells") or {}).items():
        if (cell := cells.get(arm)) and (final := cell.get("final")):
            name = f"return, {counted(len(cell['seeds']), 'seed')}"
            yield game, [{"type": "mean_return", "name": name, "value": final["point"]}]
    for game, cells in (results.get("games") or {}).items():
        if (cell := cells.get(arm)) and (error := cell["intervals"].get("test_error")):
            name = f"test error, {counted(cell['runs'], 'seed')}"
            yield game, [{"type": "error", "name": name, "value": error["point"]}]


def _table(metrics: list[tuple[str, list[dict[str, Any]]]]) -> str:
    if not metrics:
        return ""
    rows = "\n".join(f"| {game} | {value['name']} | {value['value']:.4g} |" for game, one in metrics for value in one)
    head = "## Evaluation\n\nFresh agents, trained from this initialization:\n\n| | metric | value |\n|---|---|---|"
    return f"{head}\n{rows}\n\n"


def write_folder(
    found: Initialization,
    out: Path,
    *,
    title: str,
    summary: str,
    license: str,
    settings: Config | None = None,
    results: Mapping[str, Any] | None = None,
    arm: str = "",
    source: str = ".",
) -> list[Path]:
    """Write weights, card, manifest, license text (of apache-2.0) and settings to the folder `out`. Return their paths.

    `settings` are those of the run, if they are known; directories, hosts and secrets are left out. Raises ConfigError
    if `out` is not empty or cannot be written.
    """
    weights = pack(found.tensors, found.metadata)
    about = {"summary": summary, "license": license, "sha256": hashlib.sha256(weights).hexdigest()}
    card = text(found, title=title, summary=summary, license=license, results=results, arm=arm, source=source)
    files = {
        WEIGHTS: weights,
        MANIFEST: (json.dumps(about, indent=1) + "\n").encode(),
        CARD: card.encode(),
        **({LICENSE: _license_text()} if license == "apache-2.0" else {}),
        **({SETTINGS: _for_others(settings).encode()} if settings is not None else {}),
    }
    try:
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise ConfigError(f"out: {out} is not empty; choose a new directory")
        for name, data in files.items():
            (out / name).write_bytes(data)
    except OSError as error:
        raise ConfigError(f"out: {out} cannot be written ({error.strerror}); choose another") from None
    return [out / name for name in files]


def _for_others(settings: Config) -> str:
    """Return the settings as YAML, without what the owner of the run may not want to show: directories and hosts."""
    everything = yaml.safe_load(configuration.to_yaml(settings))
    shown = {name: value for name, value in everything.items() if name not in _PLACES}
    return redact(yaml.safe_dump(shown, sort_keys=False))


def _license_text() -> bytes:
    return resources.files("leap_dist.weights").joinpath("templates", "LICENSE").read_bytes()

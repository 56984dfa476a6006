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
from typing import Any, NamedTuple

import yaml

from leap_dist.config import loading as configuration
from leap_dist.config.loading import ConfigError
from leap_dist.config.plurals import counted
from leap_dist.config.registry import for_tasks
from leap_dist.config.settings import ENVIRONMENTS, Config
from leap_dist.storage.atomic import pack
from leap_dist.storage.redaction import redact
from leap_dist.weights.initialization import Initialization

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
    results = results or {}
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
                        "dataset": {"name": one.task, "type": found.tasks},
                        "metrics": [{"type": one.type, "name": one.name, "value": one.value}],
                    }
                    for one in metrics
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
            results=_table(metrics, results, found.tasks),
            license=license,
        ),
    )


def test_length(results: Mapping[str, Any] | None) -> int | None:
    """Return the number of agent steps or examples that the results of an evaluation count; None if tasks differ."""
    lengths = set(((results or {}).get("budgets") or {}).values())
    return int(lengths.pop()) if len(lengths) == 1 else None


def _facts(found: Initialization) -> dict[str, str]:
    metadata = found.metadata
    unit = for_tasks(found.tasks).step_unit
    shown = {
        "tasks": f"{found.tasks}: {', '.join(metadata['games'])}",
        "meta-updates": metadata["version"],
        "mode": metadata.get("mode"),
        f"{unit} per task": metadata.get("task_steps"),
        f"{unit} in all": metadata.get("agent_steps"),
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


class _Metric(NamedTuple):
    """What an evaluation has found on one game or data set."""

    task: str
    type: str
    name: str
    value: float
    baseline: float | None
    """The same of the evaluation's baseline; None if it has no result."""


def _metrics(results: Mapping[str, Any], arm: str, sha256: str) -> Iterator[_Metric]:
    """Yield a metric of each game or data set.

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
    other = _baseline(results, arm)
    for game, cells in (results.get("cells") or {}).items():
        if (cell := cells.get(arm)) and (final := cell.get("final")):
            theirs = (cells.get(other) or {}).get("final") or {}
            name = f"return, {counted(len(cell['seeds']), 'seed')}"
            yield _Metric(game, "mean_return", name, final["point"], theirs.get("point"))
    for game, cells in (results.get("games") or {}).items():
        if (cell := cells.get(arm)) and (error := cell["intervals"].get("test_error")):
            theirs = ((cells.get(other) or {}).get("intervals") or {}).get("test_error") or {}
            name = f"test error, {counted(cell['runs'], 'seed')}"
            yield _Metric(game, "error", name, error["point"], theirs.get("point"))


def _baseline(results: Mapping[str, Any], arm: str) -> str:
    """Return the label of the evaluation's baseline, or "" if it is this initialization itself."""
    label = str(results.get("baseline", ""))
    return "" if label == arm else label


def _table(metrics: list[_Metric], results: Mapping[str, Any], tasks: str) -> str:
    """Return the section with the metrics, beside those of the baseline, and for errors with their mean."""
    if not metrics:
        return ""
    is_game = tasks in ENVIRONMENTS
    sources = {one["label"]: one.get("source") for one in results.get("described") or ()}
    baseline = str(results.get("baseline", ""))
    if sources.get(baseline, baseline) == "scratch":
        baseline = f"random {'encoders' if is_game else 'networks'}"
    others = [one.baseline for one in metrics if one.baseline is not None]
    if len(others) < len(metrics):
        baseline = ""
    rows = list(metrics)
    if not is_game and len(rows) > 1:
        mean, baselines = (sum(values) / len(metrics) for values in ([m.value for m in metrics], others))
        rows.append(_Metric("**mean**", "error", rows[0].name, mean, baselines))
    lines = [
        f"| {one.task} | {one.name} | {_number(one.value)} |" + (f" {_number(one.baseline)} |" if baseline else "")
        for one in rows
    ]
    length = test_length(results)
    trained = f"Fresh {'agents' if is_game else 'networks'}, trained from this initialization"
    trained += f" for {length:,} {for_tasks(tasks).step_unit} each" if length else ""
    trained += f", beside {baseline} trained for as long" if baseline else ""
    head = f"| | metric | this initialization |{f' {baseline} |' if baseline else ''}"
    return "\n".join(
        ["## Evaluation", "", f"{trained}:", "", head, f"|---|---|---|{'---|' if baseline else ''}", *lines, "", ""]
    )


def _number(value: float | None) -> str:
    """Return a return or error with four digits, or without decimals if it has more."""
    return "" if value is None else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


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
    about: dict[str, Any] = {"summary": summary, "license": license, "sha256": hashlib.sha256(weights).hexdigest()}
    if length := test_length(results):
        about["test_steps"] = length
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

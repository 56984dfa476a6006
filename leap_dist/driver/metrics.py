"""Metrics for Prometheus: Ray serves what this process records on the metrics page of its node."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import ray
from ray.util import metrics as ray_metrics

from leap_dist.config import registry
from leap_dist.driver.waiting import last_line


class Sample(NamedTuple):
    """A value of one metric, with its labels besides `run`."""

    metric: str
    value: float
    labels: dict[str, str]


class Declaration(NamedTuple):
    """Description and labels of a metric, as shown by Prometheus."""

    description: str
    labels: tuple[str, ...] = ()
    """Names of its labels besides `run`, the name of the run directory."""


GAUGES: Mapping[str, Declaration] = {
    "leap_steps_per_second": Declaration("Agent steps, or examples, per second over the last 30 s."),
    "leap_workers": Declaration(
        "Workers whose process answers (alive), and workers that should run (wanted).", ("state",)
    ),
    "leap_tasks_wanted": Declaration("Tasks of the whole run."),
    "leap_contributions_waiting": Declaration("Contributions that are accepted and not yet applied."),
    "leap_staleness": Declaration("Mean staleness of the contributions of the newest meta-update, in versions."),
    "leap_checkpoint_age_seconds": Declaration("Time since the last meta-update was saved."),
    "leap_task_return": Declaration("Mean return at the end of the newest task of a game.", ("game",)),
    "leap_task_error": Declaration("Training error (0 to 1) at the end of the newest task of a data set.", ("game",)),
}
"""Metrics that rise and fall. Ray adds the prefix `ray_` to every name."""

COUNTERS: Mapping[str, Declaration] = {
    "leap_agent_steps_total": Declaration("Agent steps, or examples, reported to the server."),
    "leap_tasks_total": Declaration("Tasks whose contribution has been applied, or finished agents of an evaluation."),
    "leap_meta_updates_total": Declaration("Meta-updates so far; equals the version of the initialization."),
    "leap_contributions_total": Declaration(
        "Contributions by outcome: applied, partial, duplicate, refused (with the reason), or lost with its lease.",
        ("outcome", "reason"),
    ),
    "leap_restarts_total": Declaration("Restarts in this launch, of workers and of the server.", ("process",)),
}
"""Metrics that only rise. When a run is resumed, they continue at its totals."""

_OF_LAUNCH = ("leap_restarts_total",)
"""Counters whose totals begin at 0 with every launch; those of the others are the run's."""

_recorded: dict[tuple[str, ...], float] = {}
"""The totals that this process has recorded, by Ray session, run, metric and labels. Ray adds up what a process records
in a session, and a run may be trained in several parts, or be resumed."""

_OUTCOMES = {
    "applied": "contributions_applied",
    "partial": "partials",
    "duplicate": "duplicates",
    "lost": "leases_lost",
}


def samples(lines: list[dict[str, Any]], summary: dict[str, Any]) -> Iterator[Sample]:
    """Yield the value of each metric that the ledger's new lines and the summary of a run or an evaluation have."""
    for name, field in (
        ("leap_agent_steps_total", "agent_steps"),
        ("leap_tasks_total", "tasks"),
        ("leap_meta_updates_total", "meta_updates"),
        ("leap_steps_per_second", "steps_per_second"),
        ("leap_tasks_wanted", "tasks_wanted"),
        ("leap_contributions_waiting", "contributions_waiting"),
        ("leap_checkpoint_age_seconds", "checkpoint_age"),
    ):
        if field in summary:  # an evaluation has no meta-updates
            yield Sample(name, summary[field], {})
    for state in ("alive", "wanted"):
        yield Sample("leap_workers", summary[f"workers_{state}"], {"state": state})
    yield Sample("leap_restarts_total", summary["restarts"], {"process": "worker"})
    yield Sample("leap_restarts_total", summary["server_restarts"], {"process": "server"})
    for outcome, field in _OUTCOMES.items():
        if field in summary:
            yield Sample("leap_contributions_total", summary[field], {"outcome": outcome, "reason": ""})
    for reason, count in summary["refused"].items():
        yield Sample("leap_contributions_total", count, {"outcome": "refused", "reason": reason})
    yield from _of_ledger(lines)


def _of_ledger(lines: list[dict[str, Any]]) -> Iterator[Sample]:
    if lines:
        newest = [line["staleness"] for line in lines if line["version_after"] == lines[-1]["version_after"]]
        yield Sample("leap_staleness", sum(newest) / len(newest), {})
    for line in lines:
        points = [point for point in line["curve"] if point["score"] is not None] if line["final"] else []
        if points:
            name = f"leap_task_{registry.for_point(points[-1]).name}"
            yield Sample(name, points[-1]["score"], {"game": line["game"]})


class Exporter:
    """Records the metrics of one run. An error ends the export, with an alert, but never the run.

    Args:
        run: name of the run, the value of the label `run`.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._metrics: dict[str, Any] = {}  # made at the first record, when this process is connected to Ray
        self._session = ""
        self._of_launch: dict[tuple[str, ...], float] = {}
        self.alerts: list[str] = []

    def record(self, lines: list[dict[str, Any]], summary: dict[str, Any]) -> None:
        """Record the state of the run: the ledger's new lines and the driver's summary."""
        if self.alerts:
            return
        try:
            if not self._metrics:
                self._metrics, self._session = _declare(), _session()
            for sample in samples(lines, summary):
                self._record(sample)
        except Exception as error:  # whatever is wrong with Ray's metrics, the run does not need them
            self.alerts.append(f"metrics are no longer exported: {last_line(error)}")

    def _record(self, sample: Sample) -> None:
        labels = {"run": self._run, **sample.labels}
        if sample.metric in GAUGES:
            self._metrics[sample.metric].set(sample.value, labels)
            return
        # A restarted server counts from an older state; the counter stands still until the server has caught up.
        totals = self._of_launch if sample.metric in _OF_LAUNCH else _recorded
        key = (self._session, self._run, sample.metric, *sample.labels.values())
        more = sample.value - totals.get(key, 0.0)
        if more > 0:
            totals[key] = sample.value
            self._metrics[sample.metric].inc(more, labels)


def _session() -> str:
    """Return what distinguishes this process's connection to Ray from its earlier ones."""
    if not ray.is_initialized():
        return ""
    context = ray.get_runtime_context()
    return f"{context.gcs_address} {context.get_job_id()}"


def _declare() -> dict[str, Any]:
    kinds = ((ray_metrics.Gauge, GAUGES), (ray_metrics.Counter, COUNTERS))
    return {
        name: kind(name, declaration.description, ("run", *declaration.labels))
        for kind, declarations in kinds
        for name, declaration in declarations.items()
    }


def places() -> dict[str, str]:
    """Return where this node keeps Ray's logs (`logs`), and the address of its page for Prometheus (`metrics`).

    A place that Ray does not name is left out.
    """
    found = {}
    session: Any = ray._private.worker._global_node
    try:
        found["logs"] = str(session.get_logs_dir_path())
        own = ray.get_runtime_context().get_node_id()
        node = next(node for node in ray.nodes() if node["NodeID"] == own)
        found["metrics"] = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    except Exception:  # the first interface is not public, and a run needs neither
        return found
    return found


def describe(found: dict[str, str]) -> str:
    """Return the places that `places` has found, in one line."""
    texts = {"logs": "Ray's logs are in {}", "metrics": "metrics for Prometheus at {}"}
    known = [text.format(found[name]) for name, text in texts.items() if found.get(name)]
    return ", ".join(known) or "Ray does not say where its logs are"

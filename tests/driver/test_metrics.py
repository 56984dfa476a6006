"""Metrics for Prometheus: what is recorded, that an error costs the run nothing, and that the dashboard shows them."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import in_process_driver
import pytest
from service import SYNC, Launch
from toy_data_sets import short_run

import leap_dist
from leap_dist.driver import metrics
from leap_dist.driver.metrics import COUNTERS, GAUGES, Exporter
from leap_dist.storage.ledger import Ledger

ROOT = Path(__file__).parents[2]
DECLARED = {**GAUGES, **COUNTERS}


class Registry:
    """Stands in for ray.util.metrics, with its checks, and keeps what Prometheus would show."""

    def __init__(self) -> None:
        self.series: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self.broken = False
        registry = self

        class Metric:
            def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
                assert re.fullmatch("[a-z][a-z0-9_]*", name)
                assert description.endswith(".")
                self.name, self.keys = name, tag_keys

            def record(self, tags: dict[str, str], change: Callable[[float], float]) -> None:
                if registry.broken:
                    raise RuntimeError("the agent is gone")
                assert set(tags) == set(self.keys), "Ray raises an error for a missing or an unknown tag"
                assert all(isinstance(value, str) for value in tags.values())
                key = self.name, frozenset(tags.items())
                registry.series[key] = change(registry.series.get(key, 0.0))

        class Gauge(Metric):
            def set(self, value: float, tags: dict[str, str]) -> None:
                self.record(tags, lambda _: float(value))

        class Counter(Metric):
            def inc(self, value: float, tags: dict[str, str]) -> None:
                assert value > 0, "Ray raises an error for others"
                self.record(tags, lambda before: before + value)

        self.Gauge, self.Counter = Gauge, Counter

    def value(self, name: str, **labels: str) -> float:
        return self.series[name, frozenset(labels.items())]


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry:
    found = Registry()
    monkeypatch.setattr(metrics, "ray_metrics", found)
    monkeypatch.setattr(metrics, "_recorded", {})
    return found


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    in_process_driver.install(monkeypatch)
    return short_run(tmp_path / "data")


def summary(**changes: Any) -> dict[str, Any]:
    """What the exporter reads of the summary of a run."""
    return {
        "agent_steps": 1000, "tasks": 4, "tasks_wanted": 8, "meta_updates": 2, "steps_per_second": 80.5,
        "contributions_waiting": 1, "checkpoint_age": 2.5, "contributions_applied": 4, "partials": 9, "duplicates": 0,
        "leases_lost": 1, "refused": {"norm": 3, "stale": 2}, "workers_alive": 3, "workers_wanted": 4, "restarts": 1,
        "server_restarts": 0, **changes,
    }  # fmt: skip


def line(game: str, version: int, staleness: int, *scores: float | None, final: bool = True) -> dict[str, Any]:
    curve = [{"score": score, "means": {}} for score in scores]
    return {"game": game, "version_after": version, "staleness": staleness, "final": final, "curve": curve}


def test_a_run_has_its_totals_its_speed_and_its_newest_results(registry: Registry, settings: dict[str, Any],
                                                               tmp_path: Path) -> None:  # fmt: skip
    run = leap_dist.train(settings, run_dir=tmp_path / "demo", progress=False)
    assert run.summary["alerts"] == []
    assert registry.value("leap_agent_steps_total", run="demo") == run.summary["agent_steps"] == 256
    assert registry.value("leap_meta_updates_total", run="demo") == 2
    assert registry.value("leap_tasks_total", run="demo") == registry.value("leap_tasks_wanted", run="demo") == 4
    assert registry.value("leap_contributions_total", run="demo", outcome="applied", reason="") == 4
    assert registry.value("leap_contributions_waiting", run="demo") == 0
    assert registry.value("leap_steps_per_second", run="demo") == run.summary["steps_per_second"] > 0
    assert registry.value("leap_workers", run="demo", state="wanted") == 1
    lines = list(Ledger(tmp_path / "demo" / "ledger.jsonl").lines())
    last = [task for task in lines if task["version_after"] == 2]
    assert registry.value("leap_staleness", run="demo") == sum(task["staleness"] for task in last) / len(last)
    assert registry.value("leap_task_error", run="demo", game="mnist") == lines[-1]["curve"][-1]["score"]


def test_values_by_label(registry: Registry) -> None:
    exporter = Exporter("mine")
    exporter.record(
        [
            line("pong", 1, 7, -21.0, final=True),
            line("pong", 2, 1, -20.5, -19.0, None),
            line("qbert", 2, 4, 150.0),
            line("freeway", 2, 4, 3.0, final=False),
        ],
        summary(),
    )
    assert exporter.alerts == []
    assert registry.value("leap_task_return", run="mine", game="pong") == -19.0, "its newest task, newest episode"
    assert registry.value("leap_task_return", run="mine", game="qbert") == 150.0
    assert ("leap_task_return", frozenset({"run": "mine", "game": "freeway"}.items())) not in registry.series
    assert registry.value("leap_staleness", run="mine") == 3.0, "of the newest meta-update"
    assert registry.value("leap_contributions_total", run="mine", outcome="refused", reason="norm") == 3
    assert registry.value("leap_contributions_total", run="mine", outcome="refused", reason="stale") == 2
    assert registry.value("leap_contributions_total", run="mine", outcome="lost", reason="") == 1
    assert registry.value("leap_workers", run="mine", state="alive") == 3
    assert registry.value("leap_restarts_total", run="mine", process="worker") == 1
    assert registry.value("leap_checkpoint_age_seconds", run="mine") == 2.5
    assert {name for name, _ in registry.series} == set(DECLARED) - {"leap_task_error"}


def test_counters_follow_the_totals_and_never_fall(registry: Registry) -> None:
    exporter = Exporter("mine")
    for steps, shown in ((1000, 1000), (1500, 1500), (1200, 1500), (1500, 1500), (1700, 1700)):
        exporter.record([], summary(agent_steps=steps))  # the server restarts after the second
        assert registry.value("leap_agent_steps_total", run="mine") == shown


def test_what_several_parts_of_a_run_record_adds_up_to_its_totals(registry: Registry) -> None:
    """As with early stopping, and when a run is resumed in the same program: Ray adds up what a process records."""
    for steps, restarts in ((1000, 1), (1500, 0), (1700, 2)):
        exporter = Exporter("parts")
        exporter.record([], summary(agent_steps=steps - 200, restarts=0))
        exporter.record([], summary(agent_steps=steps, restarts=restarts))
    assert registry.value("leap_agent_steps_total", run="parts") == 1700
    assert registry.value("leap_restarts_total", run="parts", process="worker") == 3, "they are counted by launch"
    Exporter("other").record([], summary(agent_steps=50))
    assert registry.value("leap_agent_steps_total", run="other") == 50


def test_an_evaluation_has_no_meta_updates(registry: Registry, settings: dict[str, Any], tmp_path: Path) -> None:
    chosen = {name: value for name, value in settings.items() if name != "meta_updates"}
    leap_dist.evaluate({"scratch": "scratch"}, chosen, seeds=2, out=tmp_path / "comparison", progress=False)
    assert registry.value("leap_tasks_total", run="comparison") == 2
    assert not {"leap_meta_updates_total", "leap_staleness"} & {name for name, _ in registry.series}


def test_an_error_ends_the_export_with_one_alert_and_never_the_run(
    registry: Registry, settings: dict[str, Any], tmp_path: Path
) -> None:
    registry.broken = True
    run = leap_dist.train(settings, run_dir=tmp_path / "run", progress=False)
    assert run.outcome == "done"
    assert run.summary["alerts"] == ["metrics are no longer exported: the agent is gone"]
    assert not registry.series


def expressions() -> list[str]:
    """Every expression of the dashboard, also those of its variables."""
    dashboard = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    found = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = dashboard["templating"]["list"]
    return found + [variable["query"] for variable in variables if variable["type"] == "query"]


def test_the_dashboard_shows_every_metric_by_labels_that_it_has() -> None:
    functions = {"sum", "max", "by", "rate", "increase", "label_values"}
    shown = set()
    for expression in expressions():
        bare = re.sub(r'"[^"]*"|\[\w+\]', "", expression)
        names = re.findall(r"\bray_(\w+)", bare)
        shown |= set(names)
        assert set(names) <= set(DECLARED), expression
        known = {"run", *(label for name in names for label in DECLARED[name].labels)}
        assert set(re.findall(r"\b[a-z]\w*", bare)) - functions - {f"ray_{name}" for name in names} <= known, expression
    assert shown == set(DECLARED)
    dashboard = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    for panel in dashboard["panels"]:
        assert panel["description"].endswith(".")
        for target in panel["targets"]:
            (name, *_) = re.findall(r"\bray_(\w+)", target["expr"])
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= {"run", *DECLARED[name].labels}


def test_the_page_about_monitoring_describes_every_metric() -> None:
    text = (ROOT / "docs" / "monitoring.md").read_text()
    rows = dict(re.findall(r"^\| `ray_(\w+)` \| ([^|]*) \|", text, re.MULTILINE))
    assert {name: cell.replace("`", "").split(", ") for name, cell in rows.items()} == {
        name: ["run", *declaration.labels] for name, declaration in DECLARED.items()
    }


def page(run: Launch) -> str:
    """Prometheus's text page of the node that the driver of a run is on."""
    with urllib.request.urlopen(run.summary()["metrics"], timeout=10) as answer:
        return answer.read().decode()


@pytest.mark.slow
@pytest.mark.ray
def test_prometheus_reads_the_metrics_of_a_real_run(launch: Callable[..., Launch]) -> None:
    endless = ["500" if before == "--meta-updates" else word for before, word in zip(["", *SYNC], SYNC, strict=False)]
    run = launch("demo", *endless, "--workers", "1")
    run.wait_for(lambda summary: summary["meta_updates"] >= 1)
    deadline = time.monotonic() + 120  # Ray collects every ten seconds
    # Nothing restarts, and in so short a task no game of pong ends; a counter at 0 has no series.
    wanted = set(DECLARED) - {"leap_task_error", "leap_task_return", "leap_restarts_total"}
    while missing := {name for name in wanted if f"\nray_{name}{{" not in (text := page(run))}:
        assert time.monotonic() < deadline, missing
        time.sleep(0.5)
    series = dict(re.findall(r"^(ray_leap_\w+{.*?}) (\S+)$", text, re.MULTILINE))
    assert all('run="demo"' in name for name in series)
    (updates,) = (float(value) for name, value in series.items() if name.startswith("ray_leap_meta_updates_total{"))
    assert 1 <= updates <= run.summary()["meta_updates"]
    assert any('outcome="applied"' in name for name in series)
    assert Path(run.summary()["logs"]).is_dir()
    assert f"Ray's logs are in {run.summary()['logs']}" in run.log.read_text()

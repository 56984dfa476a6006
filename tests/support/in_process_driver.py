"""Stands in for leap_dist.driver.driver: the same servers, tasks and reports, in this process and without Ray."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from leap_dist.config.settings import Config
from leap_dist.driver import driver
from leap_dist.driver.signals import stop_signal
from leap_dist.evaluation.initializations import vectors
from leap_dist.evaluation.runs import Run
from leap_dist.evaluation.server import EvaluationServer
from leap_dist.protocol.messages import Idle
from leap_dist.server.meta_server import MetaServer
from leap_dist.storage import run_directory
from leap_dist.tasks.task import family_of
from leap_dist.telemetry.progress import Progress
from leap_dist.weights.warm_start import initial_vector
from leap_dist.worker.run_task import run_task
from leap_dist.worker.start import Start

OF_THE_POOL = {
    "waiting": "",
    "workers": [],
    "workers_alive": 1,
    "workers_wanted": 1,
    "restarts": 0,
    "server_restarts": 0,
    "server_pid": 1,
    "plan": "",
    "mps": {},
}


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Put it in the driver's place."""
    monkeypatch.setattr(driver, "train", train)
    monkeypatch.setattr(driver, "evaluate", evaluate)


def train(
    config: Config,
    run_dir: Path,
    record: Any,
    *,
    wall_seconds_before: float = 0.0,
    profile: bool = False,
    remote: Any = None,
    ledger_offset: int = 0,
    **more: Any,
) -> str:
    family = family_of(config)
    manifest, initial = family.initialization(config, config.seed, config.scope)
    start_vector = None if run_directory.has_begun(run_dir) else initial_vector(config)
    initial = initial if start_vector is None else start_vector
    server = MetaServer(
        config, run_dir, manifest=manifest, initial=initial, session="s", preprocessing=family.preprocessing(config)
    )

    def start(lease: Any) -> Start:
        return Start(server.snapshot()[1], server.head(lease.task.game))

    return _work(server, config, start, record, wall_seconds_before, ledger_offset)


def evaluate(
    config: Config,
    runs: Sequence[Run],
    out: Path,
    record: Any,
    *,
    wall_seconds_before: float = 0.0,
    announce: Any = None,
) -> str:
    server = EvaluationServer(config, list(runs), vectors([run.arm for run in runs]), out)

    def start(lease: Any) -> Start:
        vector, scope, _ = server.start(lease)
        return Start(vector, scope=scope, evaluation=True)

    return _work(server, config, start, record, wall_seconds_before, 0)


def _work(server: Any, config: Config, start: Any, record: Any, before: float, offset: int) -> str:
    progress = Progress(config, before)

    def report(state: str) -> None:
        nonlocal offset
        lines, offset = server.ledger(offset)
        record(lines, progress.summary({**server.status(), **OF_THE_POOL}, state, {}), [], offset)

    with stop_signal() as stop:
        try:
            while not stop.asked and not isinstance(lease := server.lease("w0", "i0"), Idle):
                run_task(lease, start(lease), config, server)
                report("running")
            outcome = "done" if server.finished else "interrupted" if stop.asked else "failed"
            report(outcome)
            return outcome
        finally:
            server.close()

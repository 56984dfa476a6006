"""`meta.shift trajectory` is the algorithm of its source, and φ, path and durability are what it needs them to be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protocol import INITIAL, contribution, grant, serve
from protocol import config as smoke
from trajectory_shifting import shifted

from benchmarks.toy import Quadratic, stream
from leap_dist.config.loading import resolve
from leap_dist.config.presets import PRESETS, TASKS
from leap_dist.config.settings import Config
from leap_dist.nn.flat_vector import Manifest
from leap_dist.server.meta_optimizer import MetaOptimizer
from leap_dist.server.meta_server import MetaServer
from leap_dist.worker import run_task, trajectory
from leap_dist.worker.start import Start

START = np.linspace(-2, 2, Quadratic.dimension).astype(np.float32)
STEPS = 12


def setting(tasks: int, interval: int, **more: Any) -> Config:
    return smoke(
        mode="stream", meta__shift="trajectory", meta_learner="reptile", meta__batch_size=tasks, meta_updates=1,
        meta__learning_rate=0.2, task_steps=STEPS, agent__envs=1, agent__unroll=1, worker__push_interval=interval,
        server__pushes_per_second=1e6, **more,
    )  # fmt: skip


def source(seeds: range, interval: int) -> np.ndarray:
    tasks = [Quadratic(START, seed) for seed in seeds]
    gradients = [lambda theta, task=task: task.A.numpy() @ (theta - task.c.numpy()) for task in tasks]
    return shifted(START, gradients, inner_rate=Quadratic.learning_rate, meta_rate=0.2, steps=STEPS, interval=interval)


@pytest.mark.parametrize("interval", [1, 3, 5])
def test_one_task_through_worker_and_server_is_the_algorithm_of_the_paper(tmp_path: Path, monkeypatch, interval):
    config, learner = setting(1, interval), Quadratic(START, 7)
    server = MetaServer(config, tmp_path, manifest=Manifest.of(learner.shared), initial=START)
    monkeypatch.setattr(run_task, "make_learner", lambda *_: learner)
    lease = grant(server)
    ack = run_task.run_task(lease, Start(server.snapshot()[1]), config, server)
    assert ack is not None
    assert ack.durable
    assert server.version == -(-STEPS // interval)
    np.testing.assert_allclose(server.snapshot()[1], source(range(7, 8), interval), rtol=2e-5, atol=2e-6)
    server.close()


@pytest.mark.parametrize("interval", [1, 4])
def test_several_tasks_in_lockstep_are_the_algorithm_of_the_paper(interval):
    config = setting(3, interval)
    phi = MetaOptimizer(config.mode, config.meta, START)
    assert stream(config, [Quadratic(START, seed) for seed in range(3)], phi)
    expected = source(range(3), interval)
    np.testing.assert_allclose(phi.vector, expected, rtol=2e-5, atol=2e-6)

    other = replace(config, meta=replace(config.meta, shift="increments"))
    phi = MetaOptimizer(config.mode, config.meta, START)
    assert stream(other, [Quadratic(START, seed) for seed in range(3)], phi)
    assert np.abs(phi.vector - expected).max() > 0.1, "increments are another algorithm"


def test_every_push_counts_whole_also_after_a_restart_and_the_end_of_a_lost_lease_adds_nothing(tmp_path: Path):
    config = setting(1, 4)
    server, first = serve(tmp_path, config), np.arange(len(INITIAL), dtype=np.float32)
    lease = grant(server)
    assert server.push(contribution(lease, first, seq=1, final=False)).durable
    moved = server.snapshot()[1]
    np.testing.assert_allclose(moved, INITIAL - 0.2 * first, rtol=1e-6)
    server.close()

    server = serve(tmp_path, config)
    second = replace(contribution(lease, 2 * first, seq=2, final=False), base_version=server.version)
    assert server.push(second).durable
    moved = moved - np.float32(0.2) * 2 * first
    np.testing.assert_allclose(server.snapshot()[1], moved, rtol=1e-6)
    assert server.push(second).reason == "duplicate"
    server.close()

    server = serve(tmp_path, config, session="another")  # whose workers are new: the lease is closed
    np.testing.assert_allclose(server.snapshot()[1], moved, rtol=1e-6)
    assert server.finished
    assert [(line["seq"], line["final"], line["norm"] > 0) for line in server.ledger(0)[0]] == [
        (1, False, True),
        (2, False, True),
        (2, True, False),
    ]
    server.close()


def test_the_whole_shift_is_followed_however_large_it_is():
    config, learner = setting(1, 4), Quadratic(START, 7)
    shift = np.full(Quadratic.dimension, 1e3, np.float32)
    assert trajectory.limited_shift(shift, learner, config) is shift
    config = replace(config, meta=replace(config.meta, shift="increments", max_shift=0.5))
    norm = np.linalg.norm(trajectory.limited_shift(shift, learner, config))
    assert norm == pytest.approx(0.5 * np.linalg.norm(START))


def test_nothing_is_weighted_or_clipped_unless_that_is_asked_for():
    assert (setting(1, 4).meta.contribution_clip, setting(1, 4).meta.staleness) == (0.0, "constant")
    assert setting(1, 4, meta__contribution_clip=2.0).meta.contribution_clip == 2.0


@pytest.mark.parametrize("learner", ["leap", "reptile"])
@pytest.mark.parametrize(
    ("tasks", "preset"),
    [(tasks, preset) for tasks, presets in {"atari": PRESETS, **TASKS}.items() for preset in presets],
)
def test_no_preset_limits_what_arrives(tasks, preset, learner):
    given = {"tasks": tasks, "mode": "stream", "meta.shift": "trajectory", "meta_learner": learner}
    given |= {"early_stopping.interval": 0, **({"games": "x"} if tasks in ("gymnasium", "images") else {})}
    meta = resolve(preset, given).meta
    assert (meta.contribution_clip, meta.max_norm, meta.staleness) == (0.0, 0.0, "constant")
    assert resolve(preset, {**given, "meta.max_norm": 3}).meta.max_norm == 3.0

"""The trained agents that an evaluation keeps: which ones, and what is made of damage."""

from __future__ import annotations

import numpy as np
import pytest

from leap_dist.config.loading import resolve
from leap_dist.evaluation import agents
from leap_dist.evaluation.agents import AgentStore
from leap_dist.evaluation.initializations import Arm
from leap_dist.evaluation.runs import Run, plan
from leap_dist.storage.atomic import CorruptFile, pack

VECTOR = np.linspace(-1, 1, 1001, dtype=np.float32)
ARMS = [Arm("leap", "/x", "encoder"), Arm("scratch", "scratch", "encoder")]
RUNS = plan(ARMS, resolve("smoke", {"games": "pong,qbert"}), seeds=3, first=4)


def keep_all(out, vector=VECTOR):
    store = AgentStore(out, RUNS)
    for run in RUNS:
        store.keep(run, 400, vector)


def test_one_agent_of_each_arm_and_game_is_kept(tmp_path):
    keep_all(tmp_path)
    assert agents.names(tmp_path) == [(arm, game, 4) for arm in ("leap", "scratch") for game in ("pong", "qbert")]
    agent = agents.load(tmp_path, "leap", "qbert", 4)
    assert (agent.arm, agent.game, agent.seed, agent.steps, agent.scope) == ("leap", "qbert", 4, 400, "encoder")
    assert agent.vector.dtype == np.float32
    assert np.abs(agent.vector - VECTOR).max() < 1e-3


def test_their_total_size_is_bounded_across_launches(tmp_path, monkeypatch):
    monkeypatch.setattr(agents, "MOST_BYTES", 4000)  # an agent takes 2 kB and its header
    keep_all(tmp_path)
    assert len(agents.names(tmp_path)) == 2
    keep_all(tmp_path)
    assert len(agents.names(tmp_path)) == 2


def test_a_run_that_sends_no_parameters_leaves_no_agent(tmp_path):
    keep_all(tmp_path, VECTOR[:0])
    assert agents.names(tmp_path) == []


@pytest.mark.parametrize(
    "content",
    [
        b"",
        pack({"parameters": VECTOR.astype(np.float16)}, {"arm": "leap"}),
        pack({"a": VECTOR.astype(np.float16), "b": VECTOR}, {}),
        pack(
            {"parameters": np.full(3, np.nan, np.float16)},
            {"arm": "leap", "game": "pong", "seed": 4, "steps": 1, "scope": "encoder"},
        ),
    ],
    ids=["empty", "no header", "two tensors", "not finite"],
)
def test_damage_is_one_error(tmp_path, content):
    keep_all(tmp_path)
    agents.path_of(tmp_path, "leap", "pong", 4).write_bytes(content)
    with pytest.raises(CorruptFile):
        agents.load(tmp_path, "leap", "pong", 4)


def test_files_of_others_are_not_taken_for_agents(tmp_path):
    (tmp_path / "agents" / "leap" / "pong").mkdir(parents=True)
    (tmp_path / "agents" / "leap" / "pong" / "notes.safetensors").write_text("")
    assert agents.names(tmp_path) == []
    assert Run(ARMS[0], "pong", 4, RUNS[0].steps) in RUNS

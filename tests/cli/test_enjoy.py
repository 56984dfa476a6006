"""`enjoy`: agents of evaluations, and agents that are trained from an initialization first."""

from __future__ import annotations

import json
import re
import shutil

import numpy as np
import pytest
import torch
from commands import no_ray, refused  # noqa: F401
from initialization_files import written
from PIL import Image

from leap_dist.cli import enjoy
from leap_dist.cli.main import main
from leap_dist.config import loading
from leap_dist.evaluation import agents, initializations, runs
from leap_dist.evaluation.initializations import Arm
from leap_dist.evaluation.server import EvaluationServer
from leap_dist.protocol.messages import Idle
from leap_dist.storage import run_directory
from leap_dist.worker.run_task import run_task
from leap_dist.worker.start import Start

pytestmark = pytest.mark.emulator
SHORT = ["--episodes", "1", "--seconds", "2"]
SETTINGS = {
    "games": "pong",
    "task_steps": 100,
    "meta_learner": "none",
    "atari.max_episode_frames": 400,
    "worker.wire": "int8",
}


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """An evaluation of one game with two arms and two seeds, as the service makes it."""
    out = tmp_path_factory.mktemp("evaluated") / "report"
    config = loading.resolve("smoke", SETTINGS)
    run_directory.prepare(out, config)
    arms = [Arm("leap", "scratch", "encoder"), Arm("scratch", "scratch", "encoder")]
    initializations.write(out, arms)
    server = EvaluationServer(config, runs.plan(arms, config, 2), {}, out)
    while not isinstance(lease := server.lease("w0", "i0"), Idle):
        vector, scope, rate = server.start(lease)
        run_task(lease, Start(vector, scope=scope, evaluation=True, learning_rate=rate), config, server)
    assert not server.alerts, server.alerts
    server.close()
    return out


def test_an_evaluation_keeps_the_parameters_with_which_its_agents_end(evaluated):
    assert agents.names(evaluated) == [("leap", "pong", 0), ("scratch", "pong", 0)]
    leap, scratch = (agents.load(evaluated, arm, "pong", 0) for arm in ("leap", "scratch"))
    assert leap.steps == 100
    assert np.array_equal(leap.vector, scratch.vector), "the same start and seed give the same agent"


def test_an_agent_of_an_evaluation_is_filmed(capsys, evaluated, tmp_path):
    film = tmp_path / "pong.gif"
    assert main(["enjoy", str(evaluated), "--arm", "scratch", "--out", str(film), *SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pong: the agent of scratch with seed 0, after 100 agent steps"
    assert re.fullmatch(r"episode 1: return -?\d+\.0 in 100 steps", lines[1])
    assert re.fullmatch(r"mean return over 1 episode: -?\d+\.0; random play -20\.7, a person 14\.6", lines[2])
    assert lines[3] == f"{film}: 2 seconds of play"
    with Image.open(film) as gif:
        assert 20 <= gif.n_frames <= 30, "Pillow joins pictures that are equal"


def test_the_same_seed_plays_the_same_episodes(capsys, evaluated):
    played = []
    for seed in ("1", "1", "2"):
        assert main(["enjoy", str(evaluated), "--seed", seed, "--episodes", "2"]) == 0
        played.append(capsys.readouterr().out)
    assert played[0] == played[1]
    assert len(played[0].splitlines()) == 4


def test_from_an_initialization_an_agent_is_trained_first(capsys, monkeypatch, tmp_path):
    written(tmp_path / "run", **{"atari.max_episode_frames": 400})
    assert main(["enjoy", str(tmp_path / "run"), "--game", "pong", "--steps", "200", *SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4:-2] == [
        "training the agent: 100% of 200 steps",
        "pong: an agent trained for 200 agent steps from run",
    ]
    assert lines[-2].startswith("episode 1: return ")


def test_an_agent_is_trained_in_one_thread_as_workers_do_it(monkeypatch):
    """With one thread for each processor, it took 30 times as long beside a training."""
    found = []
    monkeypatch.setattr(enjoy, "_train", lambda learner, steps: found.append(torch.get_num_threads()))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        main(["enjoy", "scratch", "--game", "pong", "--steps", "100", *SHORT])
    finally:
        torch.set_num_threads(before)
    assert found == [1]


def test_without_game_and_arm_the_first_that_were_asked_for_play(capsys, evaluated, tmp_path):
    """The agents' files are sorted by name, and the alphabet would choose another game and arm."""
    out = tmp_path / "report"
    shutil.copytree(evaluated, out)
    described = json.loads((out / "arms.json").read_text())
    (out / "arms.json").write_text(json.dumps({**described, "arms": described["arms"][::-1]}))
    for arm in ("leap", "scratch"):  # of another game: only its name matters for the choice
        content = (out / "agents" / arm / "pong" / "0.safetensors").read_bytes()
        (out / "agents" / arm / "asterix").mkdir()
        (out / "agents" / arm / "asterix" / "0.safetensors").write_bytes(content)
    assert main(["enjoy", str(out), *SHORT]) == 0
    assert capsys.readouterr().out.startswith("pong: the agent of scratch with seed 0, ")


def test_an_untrained_agent_is_called_so(capsys):
    assert main(["enjoy", "scratch", "--game", "pong", "--steps", "0", *SHORT]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "pong: an untrained agent, from scratch"


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["nowhere"], "init: nowhere cannot be read"),
        (["--game", "pong"], "enjoy: needs a path or URL"),
        (["scratch", "--game", "pogn"], "game: no game 'pogn'; the nearest are pong"),
        (["scratch", "--episodes", "0"], "episodes: 0 is not between 1 and"),
        (["scratch", "--seconds", "0"], "seconds: 0 is not between 1 and 600"),
        (["scratch", "--steps", "-1"], "steps: -1 is not between 0 and 1,000,000,000"),
        (["scratch", "--episodes", "1e6"], "episodes: 1,000,000 is not between 1 and 10,000"),
        (["scratch", "--out", "x.avi"], "out: x.avi is neither a .gif nor a .mp4"),
        (["scratch", "--out", "nowhere/x.gif"], "out: there is no directory nowhere; make it first"),
        (["scratch", "--arm", "leap"], "arm: scratch is not an evaluation; leave --arm out"),
    ],
)
def test_mistakes_get_one_line(capsys, monkeypatch, tmp_path, arguments, line):
    monkeypatch.chdir(tmp_path)
    assert refused(capsys, "enjoy", *arguments).startswith(line)


def test_mistakes_about_an_evaluation_get_one_line(capsys, evaluated, tmp_path):
    assert refused(capsys, "enjoy", str(evaluated), "--arm", "lepa").endswith("did you mean leap?")
    line = refused(capsys, "enjoy", str(evaluated), "--steps", "20000")
    assert line == f"steps: the agents of {evaluated} are trained already; leave --steps out"
    for flag, value in (("--out", [str(tmp_path / "x.png")]), ("--phone", [])):
        line = refused(capsys, "plot", str(evaluated), flag, *value)
        assert line == f"{flag[2:]}: {evaluated} is an evaluation, whose report has its own place; leave {flag} out"
    assert "has no agent of 'qbert', only of pong" in refused(capsys, "enjoy", str(evaluated), "--game", "qbert")
    (tmp_path / "arms.json").write_text("{}")
    assert "has no agents" in refused(capsys, "enjoy", str(tmp_path))

"""Environments that the user brings along, from their registration to a trained and evaluated initialization."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import gymnasium
import in_process_driver
import numpy as np
import pytest
import torch

import leap_dist
from leap_dist.cli import console, results
from leap_dist.config.loading import ConfigError, resolve
from leap_dist.storage.ledger import Ledger
from leap_dist.tasks.gymnasium.family import Gymnasium, registered_id
from leap_dist.tasks.gymnasium.vector import GymnasiumVector
from leap_dist.tasks.task import family_of

SETTINGS: dict[str, Any] = {
    "preset": "smoke",
    "tasks": "gymnasium",
    "games": ("Catch10-v0", "Catch12-v0"),
    "gymnasium": {"modules": ["catch_env"]},
    "task_steps": 200,
    "worker.device": "cpu",
    "worker.precision": "float32",
}


class Counting(gymnasium.Env[np.ndarray, int]):
    """Shows its step number as brightness; ends after `length` steps."""

    def __init__(
        self, shape: tuple[int, ...] = (84, 84), kind: Any = np.uint8, length: int = 5, start: int = 0
    ) -> None:
        self.observation_space = gymnasium.spaces.Box(0, 255 if kind is np.uint8 else 1, shape, kind)
        self.action_space = gymnasium.spaces.Discrete(2, start=start)
        self._length, self._kind = length, kind
        self.actions: list[int] = []

    def _image(self) -> np.ndarray:
        value = 10 * (1 + self._steps)
        return np.full(self.observation_space.shape, value if self._kind is np.uint8 else value / 255, self._kind)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self._steps = 0
        return self._image(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action)
        self._steps += 1
        return self._image(), float(action), self._steps >= self._length, False, {}


@pytest.fixture(autouse=True)
def registered() -> Any:
    gymnasium.register("Counting-v0", Counting)
    gymnasium.register("Space/Counting-v1", Counting)
    yield
    gymnasium.registry.pop("Counting-v0")
    gymnasium.registry.pop("Space/Counting-v1")


def test_an_initialization_of_own_environments_is_trained_loaded_and_evaluated(tmp_path, monkeypatch):
    in_process_driver.install(monkeypatch)
    run = leap_dist.train(SETTINGS, run_dir=tmp_path / "run", progress=False)
    assert run.config.games == ("catch10_v0", "catch12_v0")
    tasks = [task for update in run.meta_updates() for task in update.tasks]
    assert {task.game for task in tasks} == {"catch10_v0", "catch12_v0"}
    assert all(-1 <= task.score <= 1 for task in tasks if task.score is not None)
    assert all(task.score is not None for task in tasks), "episodes of ten steps end within 200"
    encoder = run.load_encoder()
    assert encoder.preprocessing.frames == "gray4"
    assert encoder(torch.zeros(2, 4, 84, 84)).shape == (2, 256)
    with pytest.raises(ValueError, match="see load_encoder"):
        leap_dist.load_network(tmp_path / "run" / "init.safetensors")

    arms, own = {"leap": tmp_path / "run", "scratch": "scratch"}, {"gymnasium.modules": ["catch_env"]}
    settings = {"games": ["Catch14-v0"], **own}
    report = leap_dist.evaluate(arms, settings, seeds=2, out=tmp_path / "out", progress=False)
    assert len(report.runs()) == 4
    assert all(run.game == "catch14_v0" for run in report.runs())
    assert "catch14_v0" in report.markdown
    with pytest.raises(ConfigError, match=r"gymnasium.frames: rgb1 is not what run was trained with; use gymnasium"):
        leap_dist.evaluate([tmp_path / "run"], {"gymnasium.frames": "rgb1", **own}, out=tmp_path / "other")


def test_a_run_directory_cannot_bring_code_that_is_imported(tmp_path, monkeypatch):
    """Neither to resume somebody's run nor to evaluate what it has learned: only the user names modules."""
    in_process_driver.install(monkeypatch)
    leap_dist.train(SETTINGS, run_dir=tmp_path / "run", progress=False)
    config = (tmp_path / "run" / "config.yaml").read_text()
    assert config.count("- catch_env") == 1
    (tmp_path / "run" / "config.yaml").write_text(config.replace("- catch_env", "- run.payload"))
    (tmp_path / "run" / "payload.py").write_text("from pathlib import Path\nPath('executed').write_text('')\n")
    monkeypatch.chdir(tmp_path)
    line = "gymnasium.modules: the run .* names run.payload, and .*; if you trust it, add gymnasium.modules run.payload"
    with pytest.raises(ConfigError, match=line):
        leap_dist.train({"meta_updates": 9}, run_dir="run", resume=True, progress=False)
    with pytest.raises(ConfigError, match=line):
        leap_dist.evaluate(["run"], {"games": ["Catch14-v0"]}, out="out", progress=False)
    assert not (tmp_path / "executed").exists()
    assert not (tmp_path / "out").exists()


def test_the_command_that_continues_a_run_names_its_modules():
    modules = ["a", "b.c"]
    assert console.resume_command("runs/my run", modules).endswith(
        "train --run-dir 'runs/my run' --resume --gymnasium.modules a b.c"
    )
    assert console.resume_command("runs/mine").endswith("train --run-dir runs/mine --resume")
    summary = {"kind": "training", "quarantined": [], "quarantined_workers": [], "modules": modules}
    assert results.next_step({**summary, "state": "died"}, "r").endswith(
        "--run-dir r --resume --gymnasium.modules a b.c"
    )
    assert results.next_step({**summary, "state": "done"}, "r").endswith(
        "evaluate --init r --init scratch --gymnasium.modules a b.c"
    )
    with pytest.raises(ConfigError, match=r"gymnasium.modules: 'a; rm -rf' is not the name of a module, such as"):
        resolve("fast", {"tasks": "gymnasium", "games": ("Catch10-v0",), "gymnasium.modules": ("a; rm -rf",)})


def test_one_agent_learns_all_own_environments_and_its_encoder_is_an_arm_like_any_other(tmp_path, monkeypatch):
    in_process_driver.install(monkeypatch)
    joint = {**SETTINGS, "meta_learner": "multitask", "meta_updates": 1}
    run = leap_dist.train(joint, run_dir=tmp_path / "run", progress=False)
    more = {"meta_updates": 2, "gymnasium.modules": ["catch_env"]}
    run = leap_dist.train(more, run_dir=tmp_path / "run", resume=True, progress=False)
    tasks = [task for update in run.meta_updates() for task in update.tasks]
    assert [task.game for task in tasks] == ["all_games"] * 2
    _, last = Ledger(tmp_path / "run" / "ledger.jsonl").lines()
    assert last["steps"] == run.config.meta.batch_size * run.config.task_steps
    assert last["curve"][-1]["means"].keys() >= {"return/catch10_v0", "return/catch12_v0"}
    assert run.load_encoder()(torch.zeros(2, 4, 84, 84)).shape == (2, 256)
    arms = {"multitask": tmp_path / "run", "scratch": "scratch"}
    settings = {"games": ["Catch14-v0"], "gymnasium.modules": ["catch_env"]}
    report = leap_dist.evaluate(arms, settings, seeds=1, out=tmp_path / "out", progress=False)
    assert {run.arm for run in report.runs()} == {"multitask", "scratch"}
    first = {run.arm: run for run in report.runs()}
    assert not np.array_equal(first["multitask"].returns, first["scratch"].returns)


def test_a_module_in_the_current_directory_is_found_wherever_the_program_lies(tmp_path):
    (tmp_path / "nearby.py").write_text("import gymnasium\ngymnasium.register('Nearby-v0', 'nearby:Nothing')\n")
    program = Path(__file__).parents[2] / "launch.py"
    command = [sys.executable, str(program), "train", "--tasks", "gymnasium", "--gymnasium.modules", "nearby"]
    done = subprocess.run([*command, "--games", "Nerby-v0"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "no environment nerby_v0 is registered with Gymnasium; did you mean nearby_v0?" in done.stderr


def test_the_same_seed_gives_the_same_episodes():
    def played(seed: int) -> list[bytes]:
        vector = GymnasiumVector(registered_id("catch12_v0", ("catch_env",)), 3, "gray4")
        found = [vector.reset(seed).tobytes()]
        for number in range(25):
            step = vector.step(np.array([0, 1, 2]) * (number % 2))
            found += [step.observations.tobytes(), step.rewards.tobytes()]
        vector.close()
        return found

    assert played(3) == played(3)
    assert played(3) != played(4)


@pytest.mark.parametrize(("shape", "kind"), [((84, 84), np.uint8), ((42, 63, 3), np.uint8), ((3, 100, 90), np.float32)])
@pytest.mark.parametrize("frames", ["gray4", "rgb1", "rgb4"])
def test_observations_are_stacked_as_those_of_atari_games(shape, kind, frames):
    gymnasium.register("Shaped-v0", Counting, kwargs={"shape": shape, "kind": kind, "start": 3})
    try:
        vector = GymnasiumVector("Shaped-v0", 2, frames)
        shown = [vector.reset(0)]
        for _ in range(5):
            step = vector.step(np.array([0, 1]))
            shown.append(step.observations)
    finally:
        gymnasium.registry.pop("Shaped-v0")
    stack, colors = {"gray4": (4, 1), "rgb1": (1, 3), "rgb4": (4, 3)}[frames]
    assert all(images.shape == (2, stack * colors, 84, 84) and images.dtype == np.uint8 for images in shown)
    values = [images.reshape(2, stack, colors, -1).mean((2, 3))[0].tolist() for images in shown]
    expected = [10, 20, 30, 40, 50, 10]  # the fifth step ends the episode, and the next one begins
    for number, value in enumerate(values):
        before = expected[max(0, number - stack + 1) : number + 1] if number < 5 else [10]
        assert value == pytest.approx([0] * (stack - len(before)) + before, abs=0.51)
    assert step.terminated.all()
    assert not step.truncated.any()
    assert step.rewards.tolist() == [3, 4]


def test_a_truncated_episode_keeps_its_last_observation():
    vector = GymnasiumVector("Counting-v0", 2, "gray4", max_episode_steps=3)
    vector.reset(0)
    for _ in range(3):
        step = vector.step(np.array([0, 1]))
    assert step.truncated.all()
    assert not step.terminated.any()
    assert step.final.shape == (2, 4, 84, 84)
    assert step.final[0].mean((1, 2)).tolist() == [10, 20, 30, 40]
    assert step.observations[0].mean((1, 2)).tolist() == [0, 0, 0, 10]


@pytest.mark.parametrize(
    ("games", "more", "message"),
    [
        (("nothing-v0",), {}, r"games: no environment nothing_v0 is registered with Gymnasium"),
        (("Countin-v0",), {}, r"did you mean counting_v0\?"),
        (("Catch10-v0",), {"gymnasium.modules": ("no_such_module",)}, r"gymnasium.modules: no_such_module cannot be"),
        (("CartPole-v1",), {}, r"CartPole-v1 shows Box\(.*\), which is not an image"),
        (("Broken-v0",), {}, r"games: broken_v0 cannot be used: RuntimeError: it is broken"),
        (("Continuous-v0",), {}, r"has actions Box\(.*\), but only Discrete ones can be learned"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_starts(games, more, message):
    def broken() -> gymnasium.Env[Any, Any]:
        raise RuntimeError("it is broken")

    def continuous() -> gymnasium.Env[Any, Any]:
        env = Counting()
        env.action_space = gymnasium.spaces.Box(0, 1, (1,))  # type: ignore[assignment]
        return env

    gymnasium.register("Broken-v0", broken)
    gymnasium.register("Continuous-v0", continuous)
    try:
        config = resolve("smoke", {"tasks": "gymnasium", "games": games, **more})
        with pytest.raises(ConfigError, match=message):
            family_of(config).check(config)
    finally:
        gymnasium.registry.pop("Broken-v0")
        gymnasium.registry.pop("Continuous-v0")


def test_settings_that_cannot_be_are_refused():
    for wrong, message in (
        ({}, "games: name your environments, such as Catch-v0"),
        ({"games": ("Catch10-v0",), "meta_learner": "finetune-single"}, "environments have different actions"),
        ({"games": ("Catch10-v0",), "meta.shared": "model"}, "environments have different actions; use encoder"),
        ({"games": ("---",)}, "has no letter or digit"),
    ):
        with pytest.raises(ConfigError, match=message):
            resolve("smoke", {"tasks": "gymnasium", **wrong})


def test_an_id_with_a_namespace_is_found_by_its_spelling(tmp_path: Path):
    config = resolve("smoke", {"tasks": "gymnasium", "games": ("Space/Counting-v1",)})
    assert config.games == ("space_counting_v1",)
    assert registered_id("space_counting_v1", ()) == "Space/Counting-v1"
    Gymnasium().check(config)

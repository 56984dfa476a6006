"""`launch.py export`: what other libraries get is our encoder, on frames that are ours, or as near as they come."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from commands import refused
from initialization_files import CHANNELS, written
from safetensors.numpy import load_file

from leap_dist import load_encoder
from leap_dist.cli import main as launch
from leap_dist.cli.parser import LIBRARIES
from leap_dist.config.loading import resolve
from leap_dist.envs import atari_vector
from leap_dist.storage import run_directory
from leap_dist.storage.atomic import pack, unpack
from leap_dist.weights.export import TARGETS, export

ROOT = Path(__file__).parents[2]
EXPORTS = ROOT / "leap_dist" / "weights" / "templates"


@pytest.fixture
def exported(tmp_path, monkeypatch):
    """Exports an initialization of some frames to a library; gives back the file, the folder, and its modules."""

    def make(to: str, frames: str = "gray4", **settings: Any) -> tuple[Path, Path, Any]:
        init = written(tmp_path / frames, frames, **settings)
        folder = tmp_path / f"{to}-{frames}"
        assert launch.main(["export", "--init", str(init), "--to", to, "--out", str(folder)]) == 0
        return init, folder, lambda name: module(folder / f"{name}.py")

    def module(path: Path) -> ModuleType:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        found = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, found)
        spec.loader.exec_module(found)
        return found

    return make


def observations(frames: str, game: str = "breakout") -> torch.Tensor:
    """What our own agents see, after some play: uint8 (4, C, 84, 84)."""
    env = atari_vector.make(game, 4, frames=frames)
    env.reset(0)
    random = np.random.default_rng(0)
    for _ in range(20):
        seen = env.step(random.integers(len(env.actions), size=4)).observations
    env.close()
    return torch.from_numpy(seen)


@pytest.mark.parametrize("frames", CHANNELS)
def test_torch_gives_the_same_features_bit_for_bit(exported, frames):
    init, folder, module = exported("torch", frames)
    images = observations(frames) / 255
    encoder, ours = module("load").load(), load_encoder(init)
    assert torch.equal(encoder(images), ours(images))
    assert set(load_file(folder / "encoder.safetensors")) == set(ours.state_dict())
    ours.load_state_dict(encoder.state_dict())  # the same names, so either can go on from the other


@pytest.mark.parametrize("frames", CHANNELS)
def test_cleanrl_gives_the_same_features_bit_for_bit(exported, frames):
    init, folder, module = exported("cleanrl", frames)
    images = observations(frames).float()  # CleanRL keeps observations as floats up to 255
    torch.manual_seed(0)
    agent = module("agent").Agent(SimpleNamespace(single_action_space=SimpleNamespace(n=6)))
    assert torch.equal(agent.network(images / 255), load_encoder(init)(images / 255))
    names = {f"network.{n}.{kind}" for n in (0, 2, 5) for kind in ("weight", "bias")}
    assert set(load_file(folder / "agent.safetensors")) == names
    assert set(agent.state_dict()) - names == {"actor.weight", "actor.bias", "critic.weight", "critic.bias"}
    action, log_probability, entropy, value = agent.get_action_and_value(images)
    assert (action.shape, log_probability.shape, entropy.shape, value.shape) == ((4,), (4,), (4,), (4, 1))
    assert torch.equal(value, agent.get_value(images))
    again = agent.get_action_and_value(images, action)
    assert torch.equal(again[0], action)
    assert torch.equal(again[1], log_probability)
    assert entropy.min() > 0.99 * np.log(6), "a fresh actor knows nothing"
    (log_probability.sum() + value.sum()).backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in agent.network.parameters())


@pytest.mark.parametrize("frames", CHANNELS)
def test_stable_baselines_gives_the_same_features_bit_for_bit(exported, frames):
    init, _, module = exported("sb3", frames)
    envs = module("environments").make("Breakout", 2)
    agent = stable_baselines_agent(module, envs)
    images = observations(frames)
    features = agent.policy.extract_features(images)  # scales by itself
    assert torch.equal(features, load_encoder(init)(images / 255))
    envs.close()


def stable_baselines_agent(module: Any, envs: Any, **kwargs: Any) -> Any:
    from stable_baselines3 import A2C

    return A2C(module("features_extractor").LeapPolicy, envs, device="cpu", seed=0, **kwargs)


@pytest.mark.parametrize("frames", CHANNELS)
def test_stable_baselines_trains_the_encoder_from_the_initialization(exported, frames):
    _, folder, module = exported("sb3", frames)
    envs = module("environments").make("Breakout", 2)
    agent = stable_baselines_agent(module, envs)
    initialization = load_file(folder / "encoder.safetensors")
    encoder = agent.policy.features_extractor
    assert {name: tensor.numpy().tobytes() for name, tensor in encoder.state_dict().items()} == {
        name: tensor.tobytes() for name, tensor in initialization.items()
    }
    gains = [
        torch.linalg.matrix_norm(net.weight, 2).item() for net in (agent.policy.action_net, agent.policy.value_net)
    ]
    assert gains == pytest.approx([0.01, 1.0], rel=1e-4)  # the heads are fresh, and as an actor-critic's should be
    agent.learn(40)
    for name, tensor in encoder.state_dict().items():
        assert not np.array_equal(tensor.numpy(), initialization[name]), name
    envs.close()


def test_stable_baselines_overwrites_an_extractor_without_a_word(exported):
    """Why there is a policy: were this to change, the note in usage.md could go."""
    from stable_baselines3 import A2C

    _, folder, module = exported("sb3")
    envs = module("environments").make("Breakout", 1)
    initialization = load_file(folder / "encoder.safetensors")["conv1.weight"]
    extractor = {"features_extractor_class": module("features_extractor").LeapEncoder, "net_arch": []}
    for ortho_init, same in ((True, False), (False, True)):
        agent = A2C("CnnPolicy", envs, policy_kwargs={**extractor, "ortho_init": ortho_init}, device="cpu")
        found = agent.policy.features_extractor.conv1.weight.detach().numpy()
        assert np.array_equal(found, initialization) == same
    envs.close()


def test_stable_baselines_separate_extractors_are_both_initialized(exported):
    _, folder, module = exported("sb3")
    envs = module("environments").make("Breakout", 1)
    policy = stable_baselines_agent(module, envs, policy_kwargs={"share_features_extractor": False}).policy
    initialization = load_file(folder / "encoder.safetensors")["conv1.weight"]
    assert policy.pi_features_extractor is not policy.vf_features_extractor
    for extractor in (policy.pi_features_extractor, policy.vf_features_extractor):
        assert np.array_equal(extractor.conv1.weight.detach().numpy(), initialization)
    envs.close()


def test_stable_baselines_is_told_of_wrong_frames(exported):
    _, _, gray = exported("sb3", "gray4")
    envs = gray("environments").make("Breakout", 1)
    _, _, colour = exported("sb3", "rgb1")
    with pytest.raises(ValueError, match=r"observations are uint8 \(4, 84, 84\), but .* uint8 \(3, 84, 84\)"):
        stable_baselines_agent(colour, envs)
    envs.close()


def differences(frames: str, game: str, ale: Any, step: Any, over: Any, steps: int = 150) -> np.ndarray:
    """How far another chain's newest frames are from ours, step by step: (steps, planes, 84, 84).

    Before each step our emulator is brought into the state of theirs, so only what is made of the screens differs.
    """
    ours = atari_vector.make(game, 1, frames=frames)
    ours.reset(0)
    random = np.random.default_rng(0)
    planes = 1 if frames == "gray4" else 3
    found = []
    while len(found) < steps:
        ours._ales[0].restoreState(ale.cloneState())
        action = int(random.integers(len(ours.actions)))
        theirs = step(action)
        mine = ours.step(np.array([action]))
        if not over() and not mine.terminated[0]:
            found.append(np.abs(theirs[-planes:].astype(int) - mine.observations[0, -planes:]))
    ours.close()
    return np.array(found)


@pytest.mark.parametrize("game", ["breakout", "ms_pacman"])
@pytest.mark.parametrize("frames", CHANNELS)
def test_the_gymnasium_environment_shows_what_ours_does(exported, frames, game):
    """But for rounding: OpenCV's area averaging is not exact."""
    _, _, module = exported("torch", frames)
    env = module("environment").make("".join(part.title() for part in game.split("_")))
    env.reset(seed=0)
    ended = [False]

    def step(action: int) -> np.ndarray:
        seen, _, terminated, truncated, _ = env.step(action)
        ended[0] = terminated or truncated
        if ended[0]:
            env.reset()
        return seen

    difference = differences(frames, game, env.unwrapped.ale, step, lambda: ended[0])
    assert difference.max() <= 1
    assert difference.mean() < 0.005
    env.close()


@pytest.mark.parametrize("game", ["breakout", "ms_pacman"])
@pytest.mark.parametrize("frames", CHANNELS)
def test_stable_baselines_environments_show_what_ours_do(exported, frames, game):
    """But for rounding, and in gray where two colours meet: pooled first and made gray then, they are brighter."""
    _, _, module = exported("sb3", frames)
    envs = module("environments").make("".join(part.title() for part in game.split("_")), 1)
    from stable_baselines3.common.vec_env import VecTransposeImage

    envs = VecTransposeImage(envs)  # as A2C does it by itself
    envs.reset()
    ended = [False]

    def step(action: int) -> np.ndarray:
        seen, _, done, _ = envs.step(np.array([action]))
        ended[0] = bool(done[0])
        return seen[0]

    difference = differences(frames, game, envs.get_attr("unwrapped")[0].ale, step, lambda: ended[0])
    if frames == "gray4":
        assert (difference > 1).mean() < 0.02
        assert difference.mean() < 0.1
    else:
        assert difference.max() <= 1
        assert difference.mean() < 0.005
    assert envs.observation_space.shape == (CHANNELS[frames], 84, 84)
    envs.close()


@pytest.mark.parametrize("frames", CHANNELS)
def test_stacks_are_in_our_order(exported, frames):
    """Of both chains: the newest frame last, colours within a frame, zeros before an episode's first frame."""
    from stable_baselines3.common.vec_env import VecTransposeImage

    _, _, module = exported("torch", frames)
    env = module("environment").make("Breakout")
    _, _, module = exported("sb3", frames)
    envs = VecTransposeImage(module("environments").make("Breakout", 1))
    planes = 1 if frames == "gray4" else 3
    for first, following in (
        (env.reset(seed=0)[0], lambda: env.step(0)[0]),
        (envs.reset()[0], lambda: envs.step(np.array([0]))[0][0]),
    ):
        assert first[-planes:].any()
        assert not first[:-planes].any()
        second = following()
        assert np.array_equal(second[:-planes], first[planes:])
    env.close()
    envs.close()


def test_the_example_runs_on_its_own(exported):
    """In a process that knows nothing of this project but the folder."""
    _, folder, _ = exported("sb3")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    command = [sys.executable, "example.py", "Pong", "--train", "160"]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert (folder / "a2c-Pong.zip").exists()
    assert done.stdout.splitlines()[-1] == "Pong: 160 steps, no episode ended; the agent is in a2c-Pong.zip"
    done = subprocess.run(
        [*command[:2], "Pogn"], cwd=folder, env=environment, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("example.py: Pogn: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("to", "words"),
    [("torch", "become features (1, 256)"), ("sb3", "the agent chooses the action"), ("cleanrl", "(actor): Linear")],
)
def test_the_program_that_checks_an_export_ends_at_once(exported, to, words):
    _, folder, _ = exported(to)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    command = [sys.executable, LIBRARIES[to]]
    before = set(folder.iterdir())
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
    assert {path for path in folder.iterdir() if path.name != "__pycache__"} <= before, "nothing is trained or saved"


def test_the_command_line_knows_every_library_and_its_program():
    assert LIBRARIES.keys() == TARGETS.keys()
    for name, program in LIBRARIES.items():
        assert program in {Path(path).name for path in TARGETS[name].code}


def test_the_command_takes_a_run_directory_and_says_what_to_do_next(tmp_path, monkeypatch, capsys):
    written(tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert launch.main(["export", "run", "--to", "torch", "--out", "policy"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "to check that it works: cd policy && python load.py"
    assert (tmp_path / "policy" / "encoder.safetensors").exists()


def test_the_command_suggests_the_nearest_run(tmp_path, monkeypatch, capsys):
    written(tmp_path / "runs" / "mine")
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, "export", "runs/mime", "--to", "torch", "--out", "policy")
    assert line == "init: runs/mime cannot be read (No such file or directory); did you mean runs/mine?"


@pytest.mark.parametrize("path", sorted(EXPORTS.rglob("*.py")), ids=lambda path: path.name)
def test_what_is_copied_needs_nothing_of_ours_and_reads_no_pickle(path):
    text = path.read_text()
    imported = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(str(node.module).split(".")[0])
    assert not imported & {"leap_dist", "envs", "launch", "pickle"}
    assert "torch.load" not in text


def test_everything_that_is_copied_is_part_of_the_package():
    globs = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["leap_dist"]
    packaged = {path for pattern in globs for path in (ROOT / "leap_dist").glob(pattern) if path.is_file()}
    wanted = {
        EXPORTS / "README.md",
        EXPORTS / "LICENSE",
        *(EXPORTS / path for target in TARGETS.values() for path in target.code),
    }
    wanted |= {EXPORTS / name / "usage.md" for name in TARGETS}
    assert wanted <= packaged
    assert wanted == {path for path in EXPORTS.rglob("*") if path.is_file() and path.suffix != ".pyc"}


@pytest.mark.parametrize("to", TARGETS)
def test_the_model_card(exported, to):
    init, folder, _ = exported(to)
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    for line in (
        "| meta-trained on 2 games | pong, freeway |",
        "| meta-learner | leap |",
        "| meta-updates | none yet: the weights are random |",
        "| mode | buffered |",
        "| agent steps per task | 400 |",
        "| agent steps in all | 0 |",
        "| meta-optimizer | adam, learning rate 0.001, \\|B\\| = 2 |",
        "| rewards in training | −1, 0 or 1 |",
        "Four gray frames",
        "with 4 frames per agent step",
        "oldest frame first.",
    ):
        assert line in card, line
    assert "$" not in card
    hashes = dict(reversed(line.split("  ")) for line in card.splitlines() if len(line.split("  ")[0]) == 64)
    assert hashes.pop("init.safetensors (its source)") == hashlib.sha256(init.read_bytes()).hexdigest()
    assert hashes == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file() and path.name != "README.md"
    }
    preprocessing = json.loads((folder / "preprocessing.json").read_text())
    assert preprocessing["channels"] == 4
    assert (preprocessing["frames"], preprocessing["order"]) == ("gray4", "oldest frame first")


def test_a_file_on_its_own_and_one_in_another_runs_directory_say_what_they_know(tmp_path):
    init = written(tmp_path / "run")
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes(init.read_bytes())
    export(alone, "torch", tmp_path / "a")
    card = (tmp_path / "a" / "README.md").read_text()
    assert "| mode | buffered |" in card
    assert "meta-optimizer" not in card
    run_directory.prepare(tmp_path, resolve("smoke", {"games": "pong"}))
    export(alone, "torch", tmp_path / "b")
    assert "meta-optimizer" not in (tmp_path / "b" / "README.md").read_text()
    (tmp_path / "run" / "manifest.json").write_text("[")
    export(init, "torch", tmp_path / "c")
    card = (tmp_path / "c" / "README.md").read_text()
    assert "meta-optimizer" in card
    assert "revision" not in card


def test_what_older_files_lack_is_left_out_and_nothing_breaks_the_card(tmp_path):
    init = written(tmp_path / "run")
    tensors, header = unpack(init.read_bytes(), init.name)
    for name in ("mode", "task_steps", "agent_steps"):
        del header[name]
    alone = tmp_path / "older.safetensors"
    alone.write_bytes(pack(tensors, {**header, "preset": "a | b\n\n# c \ud800 $usage"}))
    export(alone, "torch", tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| preset that the settings started from | a \\| b # c ? $usage |" in card
    assert "agent steps in all" not in card


def test_convolutions_need_a_seed(capsys, tmp_path):
    init = written(tmp_path / "run", **{"meta.shared": "convolutions"})
    given = ("export", "--init", str(init), "--to", "torch", "--out", str(tmp_path / "out"))
    assert refused(capsys, *given).startswith(f"linear-seed: {init} holds the convolutions only; give --linear-seed 0")
    assert "linear-seed: -1 is out of range; use 0 to 2147483647" in refused(capsys, *given, "--linear-seed", "-1")
    assert launch.main([*given, "--linear-seed", "4"]) == 0
    found = load_file(tmp_path / "out" / "encoder.safetensors")
    expected = load_encoder(init, linear_seed=4).state_dict()
    assert all(np.array_equal(found[name], expected[name].numpy()) for name in expected)
    assert "the linear layer is a fresh one" in (tmp_path / "out" / "README.md").read_text()


def test_of_a_whole_model_the_encoder_is_exported(tmp_path):
    export(written(tmp_path / "run", meta_learner="finetune-single"), "torch", tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "encoder.safetensors")) == {
        f"{layer}.{kind}" for layer in ("conv1", "conv2", "linear") for kind in ("weight", "bias")
    }
    assert "one head for all games, which is left out here" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("init", "to", "out", "line"),
    [
        (
            ".",
            "sb3",
            "new",
            "init: . holds no init.safetensors; give a run directory, an init.safetensors, a URL or pretrained:NAME",
        ),
        (
            "run/ini.safetensors",
            "sb3",
            "new",
            "init: run/ini.safetensors cannot be read (No such file or directory); did you mean run/init.safetensors?",
        ),
        ("no/init.safetensors", "sb3", "new", "init: no/init.safetensors cannot be read (No such file or directory); "),
        ("run/config.yaml/x", "sb3", "new", "init: run/config.yaml/x cannot be read (Not a directory); give a run"),
        ("run/config.yaml", "sb3", "new", "init: run/config.yaml is not a leap-dist file, or "),
        ("damaged", "sb3", "new", "init: damaged is damaged: its checksum does not match"),
        ("run/init.safetensors", "sb", "new", "to: 'sb' is not one of sb3, torch, cleanrl; did you mean sb3?"),
        (
            "run/init.safetensors",
            "Pytorch",
            "new",
            "to: 'Pytorch' is not one of sb3, torch, cleanrl; did you mean torch?",
        ),
        ("run/init.safetensors", "onnx", "new", "to: 'onnx' is not one of sb3, torch, cleanrl"),
        ("run/init.safetensors", "sb3", "run", "out: run is not empty; choose a new one"),
        ("run/init.safetensors", "sb3", "damaged", "out: damaged is not a directory; choose a new one"),
        ("run/init.safetensors", "sb3", "damaged/x", "out: damaged/x cannot be written ("),
        ("run/init.safetensors", "sb3", "link", "out: link is not a directory; choose a new one"),
        ("run/init.safetensors", "sb3", "/proc/leap", "out: /proc/leap cannot be written (No such file or di"),
    ],
)
def test_what_is_refused(capsys, tmp_path, monkeypatch, init, to, out, line):
    monkeypatch.chdir(tmp_path)
    good = bytearray(written(tmp_path / "run").read_bytes())
    good[-1] ^= 1
    (tmp_path / "damaged").write_bytes(good)
    (tmp_path / "link").symlink_to("elsewhere")
    before = sorted(tmp_path.rglob("*"))
    assert refused(capsys, "export", "--init", init, "--to", to, "--out", out).startswith(line)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_current_directory_is_not_replaced(capsys, tmp_path, monkeypatch):
    init = written(tmp_path / "run")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    line = refused(capsys, "export", "--init", str(init), "--to", "sb3", "--out", ".")
    assert line == "out: . is the current directory; choose a new one"


def test_an_empty_directory_and_missing_parents_will_do(tmp_path):
    init = written(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    for out in (tmp_path / "empty", tmp_path / "not" / "there"):
        names = export(init, "torch", out)
        assert sorted(names) == sorted(path.name for path in out.iterdir())


@pytest.mark.parametrize("operation", ["pathlib.Path.mkdir", "leap_dist.weights.export.create_new", "os.replace"])
def test_there_is_everything_or_nothing(capsys, tmp_path, monkeypatch, operation):
    init = written(tmp_path / "run")

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(operation, full)
    line = refused(capsys, "export", "--init", str(init), "--to", "sb3", "--out", str(tmp_path / "out"))
    monkeypatch.undo()
    assert line == f"out: {tmp_path / 'out'} cannot be written (No space left on device); choose another"
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

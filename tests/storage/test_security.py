"""Nothing on disk is executed or leads out of the run directory; the token's file is private."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from protocol import config, finish, grant, serve

from leap_dist.cli import main as launch
from leap_dist.config.loading import ConfigError, read_yaml, resolve
from leap_dist.driver import driver
from leap_dist.storage import auth_token, manifest, run_directory
from leap_dist.telemetry import pictures, tensorboard

# --- What is on disk is never executed -----------------------------------------------------------------------------


class Canary:
    """Whoever unpickles this makes the directory that LEAP_TEST_CANARY names."""

    def __reduce__(self):
        return os.mkdir, (os.environ["LEAP_TEST_CANARY"],)


def torch_file() -> bytes:
    buffer = io.BytesIO()
    torch.save({"weight": Canary()}, buffer)
    return buffer.getvalue()


def numpy_file(save: Callable[..., None]) -> bytes:
    buffer = io.BytesIO()
    save(buffer, np.array([Canary()], dtype=object))
    return buffer.getvalue()


def yaml_file() -> bytes:
    path = os.environ["LEAP_TEST_CANARY"]
    return f"preset: smoke\nworkers: !!python/object/apply:os.mkdir [{path!r}]\n".encode()


EVIL: dict[str, tuple[Callable[[], bytes], Callable[[bytes], object]]] = {
    "pickle": (lambda: pickle.dumps(Canary()), pickle.loads),
    "pickle as text": (lambda: pickle.dumps(Canary(), protocol=0), pickle.loads),
    "torch": (torch_file, lambda data: torch.load(io.BytesIO(data), weights_only=False)),
    "npy": (lambda: numpy_file(np.save), lambda data: np.load(io.BytesIO(data), allow_pickle=True)),
    "npz": (lambda: numpy_file(np.savez), lambda data: np.load(io.BytesIO(data), allow_pickle=True)["arr_0"]),
    "yaml": (yaml_file, yaml.unsafe_load),
}
"""What a file may hold, and who would execute it."""


@pytest.fixture
def canary(tmp_path, monkeypatch):
    path = tmp_path / "executed"
    monkeypatch.setenv("LEAP_TEST_CANARY", str(path))
    return path


def a_run(run_dir: Path) -> None:
    """A run that stopped in the middle: checkpoints, a ledger, a contribution that waits, an open lease, curves."""
    settings = config(mode="buffered", meta__batch_size=2, meta_updates=3)
    run_directory.prepare(run_dir, settings)
    server = serve(run_dir, settings)
    for _ in range(3):
        finish(server, grant(server), server.snapshot()[1])
    grant(server)
    lines, _ = server.ledger(0)
    server.close()
    board = tensorboard.TensorBoard(run_dir)
    board.text("config", "some")
    board.close()
    assert lines
    run_directory.write_summary(run_dir, {"state": "running", "tasks_wanted": 6, "wall_seconds": 1.0})


def use(run_dir: Path) -> None:
    """Everything that reads a run directory. What it says of the files is for other tests."""
    commands = (["status", "--json"], ["plot"], ["train", "--resume"])
    for command in commands:
        with contextlib.suppress(Exception, SystemExit):
            launch.main([*command, "--run-dir", str(run_dir)])
    with contextlib.suppress(Exception):
        read_yaml(run_dir / "config.yaml")
    with contextlib.suppress(Exception):
        tensorboard.TensorBoard(run_dir).close()
    with contextlib.suppress(Exception):
        serve(run_dir, config(mode="buffered", meta__batch_size=2, meta_updates=3)).close()


@pytest.fixture
def no_ray(monkeypatch):
    reached = []

    def train(*_, **__):
        reached.append(True)
        raise ConfigError("as far as a test goes")

    monkeypatch.setattr(driver, "train", train)
    monkeypatch.setattr(pictures, "progress_picture", lambda *_: None)  # slow, and reads nothing itself
    monkeypatch.setattr(manifest, "_git_revision", lambda: "unknown")
    return reached


@pytest.mark.parametrize("kind", EVIL)
def test_no_file_of_a_run_directory_is_executed(tmp_path, canary, no_ray, kind):
    content, sing = EVIL[kind]
    run_dir = tmp_path / "run"
    a_run(run_dir)
    files = sorted(path.relative_to(run_dir) for path in run_dir.rglob("*") if path.is_file())
    assert {path.parts[0] for path in files} >= {
        "config.yaml", "manifest.json", "summary.json", "ledger.jsonl", "init.safetensors", ".lock", "journal",
        "checkpoints", "tensorboard",
    }  # fmt: skip
    assert {path.name.split("-")[0] for path in files if path.parts[0] == "journal"} == {"contribution", "lease"}
    use(run_dir)
    assert no_ray, "an untouched run gets as far as Ray"
    for path in files:
        original = (run_dir / path).read_bytes()
        (run_dir / path).write_bytes(content())
        use(run_dir)
        assert not canary.exists(), path
        (run_dir / path).parent.mkdir(exist_ok=True)  # a damaged checkpoint was set aside
        (run_dir / path).write_bytes(original)
    for path in files:
        (run_dir / path).parent.mkdir(exist_ok=True)
        (run_dir / path).write_bytes(content())
    use(run_dir)
    assert not canary.exists(), "all of them at once"
    with contextlib.suppress(yaml.YAMLError):
        sing(content())
    assert canary.exists(), "the canary must be able to sing"


def test_a_configuration_file_is_not_executed(tmp_path, canary, capsys):
    (tmp_path / "mine.yaml").write_bytes(yaml_file())
    with pytest.raises(SystemExit) as caught:
        launch.main(["train", "--config", str(tmp_path / "mine.yaml")])
    assert caught.value.code == 2
    assert "cannot read" in capsys.readouterr().err
    assert not canary.exists()


# --- Links ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["status"], ["plot"], ["train", "--resume"]])
@pytest.mark.parametrize(
    "name",
    ["config.yaml", "init.safetensors", "summary.json", ".lock", "ledger.jsonl", "checkpoints", "journal",
     "tensorboard", "manifest.json", "checkpoints/000001", "checkpoints/000001/state.json", "journal/more"],
)  # fmt: skip
def test_links_in_a_run_directory_are_refused(tmp_path, capsys, no_ray, command, name):
    run_dir = tmp_path / "run"
    a_run(run_dir)
    capsys.readouterr()
    outside, inside = tmp_path / "outside", run_dir / name
    if inside.exists():
        inside.rename(outside)
    else:
        outside.write_text("precious")
    inside.symlink_to(outside)
    with pytest.raises(SystemExit) as caught:
        launch.main([*command, "--run-dir", str(run_dir)])
    line = capsys.readouterr().err
    assert caught.value.code == 2
    assert line == (
        f"leap-dist: error: run-dir: {name} in {run_dir} is a symbolic link; put a copy there, or choose another\n"
    )
    assert not no_ray
    assert inside.is_symlink()


def test_a_link_that_waits_where_a_run_would_write_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"summary.json in .* is a symbolic link"):
        run_directory.prepare(tmp_path / "run", resolve("smoke"))
    assert not (tmp_path / "nowhere").exists()


def test_the_run_directory_itself_may_be_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "real" / "notes").symlink_to(tmp_path)  # not of the run
    run_directory.prepare(tmp_path / "link", resolve("smoke"))
    assert (tmp_path / "real" / "config.yaml").exists()


# --- The token's file ----------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def written(home: Path) -> None:
    """Make a token as docs/security.md says."""
    path = home / ".ray" / "auth_token"
    path.parent.mkdir(mode=0o700, parents=True)
    path.touch(0o600)
    path.write_text("0123456789abcdef\n")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_the_order_is_that_of_ray(home, monkeypatch, tmp_path):
    from ray._raylet import AuthenticationTokenLoader

    def of_ray() -> str:
        loader = AuthenticationTokenLoader.instance()
        loader.reset_cache()
        return loader.get_raw_token(ignore_auth_mode=True)

    assert auth_token.find() is None
    written(home)
    assert auth_token.find() == (of_ray(), str(home / ".ray" / "auth_token"))
    (tmp_path / "named").write_text("named-token\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "named"))
    assert auth_token.find() == ("named-token", str(tmp_path / "named"))
    assert of_ray() == "named-token"
    monkeypatch.setenv("RAY_AUTH_TOKEN", "said-token")
    assert auth_token.find() == ("said-token", "RAY_AUTH_TOKEN")
    assert of_ray() == "said-token"


@pytest.mark.parametrize("rights", [0o644, 0o640, 0o604, 0o620, 0o666])
def test_a_token_that_others_can_read_is_made_private_with_a_warning(home, capsys, rights):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir(parents=True)
    path.write_text("0123456789")
    path.chmod(rights)
    assert auth_token.find() == ("0123456789", str(path))
    assert mode(path) == 0o600
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == f"warning: {path} was readable by others and has been made private; renew the token\n"
    auth_token.find()
    assert capsys.readouterr().err == ""


def test_a_token_that_is_a_link_is_refused_and_its_target_left_alone(home, tmp_path):
    path = home / ".ray" / "auth_token"
    path.parent.mkdir(parents=True)
    (tmp_path / "other").write_text("0123456789")
    (tmp_path / "other").chmod(0o644)
    path.symlink_to(tmp_path / "other")
    with pytest.raises(ConfigError, match="is a symbolic link"):
        auth_token.find()
    assert mode(tmp_path / "other") == 0o644
    (tmp_path / "other").unlink()
    with pytest.raises(ConfigError, match="is a symbolic link"):
        auth_token.find()
    assert not (tmp_path / "other").exists()


def test_a_token_of_another_user_is_refused(home, monkeypatch):
    written(home)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(ConfigError, match="is not a file of this user"):
        auth_token.find()


@pytest.mark.parametrize("named", [False, True])
def test_an_empty_token_and_a_directory_are_refused(home, monkeypatch, tmp_path, named):
    path = tmp_path / "named" if named else home / ".ray" / "auth_token"
    path.parent.mkdir(parents=True, exist_ok=True)
    if named:
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(path))
        with pytest.raises(ConfigError, match=r"RAY_AUTH_TOKEN_PATH names .*, which cannot be read"):
            auth_token.find()
    path.write_text("\n")
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"the token file .* is empty"):
        auth_token.find()
    path.unlink()
    path.mkdir()
    with pytest.raises(ConfigError, match=r"cannot be read|not a file of this user"):
        auth_token.find()


def test_a_home_that_cannot_be_written_is_one_line(home):
    home.write_text("a file")
    with pytest.raises(ConfigError, match=r"address: the token file .* cannot be"):
        auth_token.find()

"""Files and directories that are not ours alone: links, pipes, devices, sparse files, and other launches."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import resource
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from protocol import INITIAL, config, contribution, grant, serve
from tensorboard.compat.proto.summary_pb2 import Summary

from leap_dist.cli import main as command
from leap_dist.config import files
from leap_dist.config.loading import ConfigError, resolve
from leap_dist.driver import driver
from leap_dist.storage import manifest, new_directory, run_directory
from leap_dist.storage.atomic import pack, write_atomic
from leap_dist.storage.ledger import Ledger
from leap_dist.storage.locks import RunDirectoryBusy, RunLock
from leap_dist.storage.remote_run import open_run
from leap_dist.telemetry import event_file, pictures
from leap_dist.telemetry.event_file import EventFile

ROOT = Path(__file__).parents[2]


# Writing never goes through a link -----------------------------------------------------------------------------------


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A file outside the run directory that must stay as it is."""
    path = tmp_path / "victim"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


def test_a_temporary_file_has_a_name_that_nobody_can_prepare(tmp_path: Path, victim: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in (f".summary.json.{os.getpid()}.tmp", "summary.json"):
        (tmp_path / "run" / name).symlink_to(victim)
    write_atomic(tmp_path / "run" / "summary.json", b"{}", "summary")
    assert (tmp_path / "run" / "summary.json").read_bytes() == b"{}"
    assert not (tmp_path / "run" / "summary.json").is_symlink()


@pytest.mark.parametrize("target", ["victim", "nowhere"])
def test_a_temporary_file_is_never_one_that_is_there_already(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """Even if the name were guessed."""
    monkeypatch.setattr(secrets, "token_hex", lambda size: "0" * 2 * size)
    (tmp_path / ".summary.json.0000000000000000.tmp").symlink_to(tmp_path / target)
    with pytest.raises(FileExistsError):
        write_atomic(tmp_path / "summary.json", b"{}", "summary")
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_files_that_are_appended_to_are_not_opened_through_links(
    tmp_path: Path, victim: Path, link: Callable[[Path, Path], None]
) -> None:
    (tmp_path / "run").mkdir()
    for name in (".lock", ".launch"):
        link(victim, tmp_path / "run" / name)
        if link is os.symlink:
            with pytest.raises(OSError, match="link"):
                RunLock(tmp_path / "run", name)
        else:
            RunLock(tmp_path / "run", name).release()
            assert (tmp_path / "run" / name).read_text().startswith("process ")
    ledger = tmp_path / "run" / "ledger.jsonl"
    link(victim, ledger)
    if link is os.symlink:
        with pytest.raises(OSError, match="link"):
            Ledger(ledger).append(0, [])
    else:  # a backup may have made it, so the server goes on with a copy
        Ledger(ledger).append(0, [{"of": "the run"}])
        assert ledger.read_text() == '{"of": "the run"}\n'
        assert ledger.stat().st_nlink == 1


def test_a_backup_that_shares_the_lock_neither_opens_a_run_to_two_servers_nor_closes_it(tmp_path: Path) -> None:
    """`cp -al` gives the lock file a second name, also while a server holds it."""
    (tmp_path / "run").mkdir()
    held = RunLock(tmp_path / "run")
    os.link(tmp_path / "run" / ".lock", tmp_path / "backup")
    with pytest.raises(RunDirectoryBusy, match="is in use by a live server"):
        RunLock(tmp_path / "run")
    held.release()
    again = RunLock(tmp_path / "run")
    with pytest.raises(RunDirectoryBusy):
        RunLock(tmp_path / "run")
    assert not (tmp_path / "run" / ".lock").samefile(tmp_path / "backup")
    again.release()


def test_an_event_file_is_never_one_that_is_there_already(
    tmp_path: Path, victim: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "time", lambda: 7.0)
    monkeypatch.setattr(event_file, "_numbers", iter([0]))
    EventFile(tmp_path / "before").close()
    (name,) = (path.name for path in (tmp_path / "before").iterdir())
    monkeypatch.setattr(event_file, "_numbers", iter([0]))
    (tmp_path / name).symlink_to(victim)
    with pytest.raises(FileExistsError):
        EventFile(tmp_path)


def test_an_event_file_stays_the_same_file_when_its_name_becomes_a_link(tmp_path: Path, victim: Path) -> None:
    events = EventFile(tmp_path / "tensorboard")
    (path,) = (tmp_path / "tensorboard").iterdir()
    path.unlink()
    path.symlink_to(victim)
    events.add(Summary(value=[Summary.Value(tag="a", simple_value=1.0)]), 1)
    events.flush()
    events.close()


@pytest.mark.parametrize("folder", ["journal", "checkpoints", "tensorboard", "figures", "runs", "profile"])
def test_a_folder_of_a_run_directory_that_is_a_link_is_refused(tmp_path: Path, folder: str) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / folder).symlink_to(tmp_path / "outside")
    with pytest.raises(ConfigError, match=f"{folder} in .* is a symbolic link"):
        run_directory.prepare(tmp_path / "run", resolve("smoke"))
    assert not any((tmp_path / "outside").iterdir())


# Reading neither blocks nor fills the memory -------------------------------------------------------------------------


def pipe(path: Path) -> None:
    os.mkfifo(path)


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        before = Path.cwd()
        os.chdir(path.parent)  # the name of a socket may have no more than 107 characters
        try:
            listener.bind(path.name)
        finally:
            os.chdir(before)


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def directory(path: Path) -> None:
    path.mkdir()


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**40)


def sparse_with_header(path: Path) -> None:
    """A sound beginning, and then a terabyte of nothing."""
    path.write_bytes(pack({"weight": np.ones(3, np.float32)}, {}))
    os.truncate(path, 2**40)


KINDS = [pipe, unix_socket, device, directory, sparse, sparse_with_header]


@contextlib.contextmanager
def quickly(most: int = 200 * 2**20) -> Iterator[None]:
    """Fail if the block never ends, or takes seconds of processor time or much memory. The machine may be busy."""

    def too_long(*_: object) -> None:
        raise AssertionError("it waits, or works, for a minute")

    before, begun = signal.signal(signal.SIGALRM, too_long), time.process_time()
    signal.setitimer(signal.ITIMER_REAL, 60.0)
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < most
        assert time.process_time() - begun < 10.0
    finally:
        tracemalloc.stop()
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Return the one line that a command prints before it ends with exit code 2."""
    with quickly(), pytest.raises(SystemExit) as ended:
        command.main(list(arguments))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def exit_code(*arguments: str) -> object:
    try:
        return command.main(list(arguments))
    except SystemExit as ended:
        return ended.code


@pytest.mark.parametrize("make", KINDS)
def test_what_is_no_file_is_refused_as_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None]
) -> None:
    make(tmp_path / "f.yaml")
    line = refused(capsys, "train", "--config", str(tmp_path / "f.yaml"), "--run-dir", str(tmp_path / "run"))
    assert "config: cannot read" in line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("make", KINDS)
def test_what_is_no_file_is_refused_as_an_initialization(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None]
) -> None:
    make(tmp_path / "init.safetensors")
    path = str(tmp_path / "init.safetensors")
    assert "init" in refused(capsys, "evaluate", "--init", path, "--init", "scratch", "--out", str(tmp_path / "out"))
    assert "init" in refused(capsys, "export", "--init", path, "--to", "torch", "--out", str(tmp_path / "policy"))


def a_run(run_dir: Path) -> Any:
    """A run that stopped in the middle: checkpoints, a ledger, a waiting contribution, an open lease."""
    settings = config(mode="buffered", meta__batch_size=2, meta_updates=3)
    run_directory.prepare(run_dir, settings)
    server = serve(run_dir, settings)
    for number in range(3):
        server.push(contribution(grant(server, f"w{number}", f"i{number}"), INITIAL))
        server.tick()
    grant(server)
    server.close()
    run_directory.write_summary(run_dir, {"state": "running", "tasks_wanted": 6, "wall_seconds": 1.0})
    return settings


@pytest.mark.parametrize("make", [pipe, unix_socket, directory, sparse])
@pytest.mark.parametrize("name", ["config.yaml", "manifest.json", "summary.json", ".lock", ".launch", "ledger.jsonl"])
def test_no_command_waits_for_what_is_no_file_in_a_run_directory(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    make: Callable[[Path], None], name: str,
) -> None:  # fmt: skip
    def train(*_: object, **__: object) -> None:
        raise ConfigError("as far as this test goes")

    monkeypatch.setattr(driver, "train", train)
    monkeypatch.setattr(pictures, "progress_picture", lambda *_: None)  # slow, and reads nothing itself
    a_run(tmp_path / "run")
    path = tmp_path / "run" / name
    path.unlink(missing_ok=True)
    make(path)
    for arguments in (["status", "--json"], ["plot"], ["train", "--resume"]):
        with quickly():
            assert exit_code(*arguments, "--run-dir", str(tmp_path / "run")) in (0, 2)
        errors = capsys.readouterr().err.splitlines()
        assert len([line for line in errors if ": warning: " not in line]) <= 1


@pytest.mark.parametrize("make", [pipe, unix_socket, directory, sparse, sparse_with_header])
def test_a_server_sets_aside_what_is_no_file(tmp_path: Path, make: Callable[[Path], None]) -> None:
    settings = a_run(tmp_path / "run")
    journal = sorted((tmp_path / "run" / "journal").iterdir())
    assert {path.name.partition("-")[0] for path in journal} == {"contribution", "lease"}
    newest = max((tmp_path / "run" / "checkpoints").iterdir())
    for path in (*journal, newest / "init.safetensors", newest / "state.json"):
        path.unlink()
        make(path)
    with quickly():
        server = serve(tmp_path / "run", settings)
    assert server.version == 0
    assert server.alerts
    server.close()


# Two launches, one directory -----------------------------------------------------------------------------------------

_LAUNCH = """
import sys
from pathlib import Path
from leap_dist.config.loading import ConfigError, resolve
from leap_dist.storage import run_directory
from leap_dist.storage.remote_run import open_run
from leap_dist.storage.locks import RunDirectoryBusy

folder, seed = Path(sys.argv[1]), sys.argv[2]
print("ready", flush=True)
sys.stdin.readline()
try:
    with open_run(folder, resume=False) as run:
        run_directory.prepare(run.folder, resolve("smoke", {"seed": seed}))
        print("runs", flush=True)
        sys.stdin.readline()
        (run.folder / "ledger.jsonl").write_text("")
except (ConfigError, RunDirectoryBusy) as error:
    print(f"refused: {error}", flush=True)
"""


def test_of_two_launches_that_begin_in_one_directory_at_once_one_runs(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    launches = [
        subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, str(folder), seed],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for seed in ("1", "2")
    ]  # fmt: skip
    said = {}
    for launch in launches:
        assert launch.stdout is not None
        assert launch.stdout.readline() == "ready\n"
    for launch in launches:
        assert launch.stdin is not None
        launch.stdin.write("\n")
        launch.stdin.flush()
    for seed, launch in enumerate(launches, 1):
        assert launch.stdout is not None
        said[seed] = launch.stdout.readline()
    for launch in launches:
        launch.communicate("\n")
    (winner,) = (seed for seed, line in said.items() if line == "runs\n")
    (line,) = (line for line in said.values() if line.startswith("refused: "))
    assert f"run-dir: {folder} is in use by another launch (process " in line or "holds a run" in line
    assert run_directory.load_config(folder, {}).seed == winner
    assert json.loads((folder / "manifest.json").read_text())["seed"] == winner


def test_a_launch_is_in_the_way_of_another_until_it_ends(tmp_path: Path) -> None:
    with open_run(tmp_path / "run", resume=False):
        with pytest.raises(RunDirectoryBusy, match=r"is in use by another launch \(process \d+ on "):
            open_run(tmp_path / "run", resume=False).__enter__()
        with pytest.raises(RunDirectoryBusy), run_directory.claimed(tmp_path / "run"):
            pass
    with open_run(tmp_path / "run", resume=False):
        pass


def test_the_default_name_is_free_even_within_one_second(tmp_path: Path) -> None:
    made = [new_directory.create_unique(tmp_path / "runs" / "smoke-20260101-000000") for _ in range(3)]
    assert [path.name.removeprefix("smoke-20260101-000000") for path in made] == ["", "-2", "-3"]
    assert all(path.is_dir() for path in made)


# A start that fails --------------------------------------------------------------------------------------------------


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Let `driver.train` raise what "error" holds, or note the seed that it is called with."""
    state: dict[str, Any] = {"error": ConfigError("address: nobody answers")}

    def train(settings: Any, run_dir: Path, *_: object, **__: object) -> str:
        state["seed"] = settings.seed
        assert (run_dir / "config.yaml").exists()
        (run_dir / "checkpoints").mkdir(exist_ok=True)
        if state["error"] is not None:
            raise state["error"]
        (run_dir / "ledger.jsonl").write_text("")
        return "failed"

    monkeypatch.setattr(driver, "train", train)
    monkeypatch.setattr("leap_dist.cli.results.print_training", lambda *_: None)
    return state


@pytest.mark.parametrize("there", [False, True])
def test_a_start_that_fails_can_be_repeated(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: dict[str, Any], there: bool
) -> None:
    folder = tmp_path / "run"
    if there:
        folder.mkdir()
        (folder / ".nfs01").write_text("mine")
        (folder / "start.log").write_text("mine")
        before = sorted(folder.iterdir())
    arguments = ["train", "--preset", "smoke", "--run-dir", str(folder)]
    for _ in range(2):
        with pytest.raises(SystemExit):
            command.main(arguments)
        assert "nobody answers" in capsys.readouterr().err
        assert folder.exists() == there
        assert not there or sorted(folder.iterdir()) == before, "what the start has written is removed again"
    failing["error"] = None
    assert command.main([*arguments, "--seed", "4"]) == 1
    assert failing["seed"] == 4
    with pytest.raises(SystemExit):
        command.main(arguments)
    assert "already holds a run; add --resume" in capsys.readouterr().err


def test_what_a_killed_start_leaves_is_taken_up_by_the_same_command(tmp_path: Path, failing: dict[str, Any]) -> None:
    run_directory.prepare(tmp_path / "run", resolve("smoke", {"seed": 1}))
    failing["error"] = None
    assert command.main(["train", "--preset", "smoke", "--run-dir", str(tmp_path / "run"), "--seed", "2"]) == 1
    assert failing["seed"] == 2
    assert len(json.loads((tmp_path / "run" / "manifest.json").read_text())["sessions"]) == 1


def test_a_run_directory_that_is_removed_in_mid_run_ends_the_run_with_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(settings: Any, run_dir: Path, record: Callable[..., None], **_: object) -> str:
        shutil.rmtree(run_dir)
        record([], {"state": "running", "alerts": []}, [], 0)
        raise AssertionError("it was not noticed")

    monkeypatch.setattr(driver, "train", train)
    assert command.main(["train", "--preset", "smoke", "--run-dir", str(tmp_path / "run")]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert f"run-dir: {tmp_path / 'run'} was removed during the run" in line
    assert not (tmp_path / "run").exists()


# Who ran, and when ---------------------------------------------------------------------------------------------------


def test_each_launch_adds_a_session_to_the_manifest_and_the_first_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_directory.prepare(tmp_path, resolve("smoke", {"seed": 1}))
    first = json.loads((tmp_path / "manifest.json").read_text())
    assert first["sessions"] == [{name: value for name, value in first.items() if name != "sessions"}]
    (tmp_path / "ledger.jsonl").write_text("")  # the run has begun
    monkeypatch.setattr(manifest.metadata, "version", lambda name: "9.9")
    run_directory.prepare(tmp_path, resolve("smoke", {"seed": 1}))
    second = json.loads((tmp_path / "manifest.json").read_text())
    assert {**second, "sessions": None} == {**first, "sessions": None}
    assert second["sessions"][0] == first["sessions"][0]
    assert second["sessions"][1]["packages"]["torch"] == "9.9"
    assert {"started", "host", "leap_dist", "packages", "python"} <= second["sessions"][1].keys()
    assert manifest.changed_packages(tmp_path) == [], "compared with the last session"


def test_a_manifest_without_sessions_becomes_the_first_of_them(tmp_path: Path) -> None:
    run_directory.prepare(tmp_path, resolve("smoke"))
    (tmp_path / "ledger.jsonl").write_text("")
    old = json.loads((tmp_path / "manifest.json").read_text())
    del old["sessions"]
    (tmp_path / "manifest.json").write_text(json.dumps(old))
    run_directory.prepare(tmp_path, resolve("smoke"))
    assert json.loads((tmp_path / "manifest.json").read_text())["sessions"][0] == old


def test_a_user_without_a_home_directory_gets_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.delenv("RAY_AUTH_TOKEN_PATH", raising=False)
    monkeypatch.setattr(Path, "home", nowhere)
    from leap_dist.storage import auth_token

    with pytest.raises(ConfigError, match="set HOME"):
        auth_token.find()


def test_files_are_read_within_bounds(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    assert files.read_regular(tmp_path / "file", 5) == b"12345"
    with pytest.raises(files.Unreadable, match="larger than 4 bytes"):
        files.read_regular(tmp_path / "file", 4)
    (tmp_path / "link").symlink_to(tmp_path / "file")
    assert files.read_regular(tmp_path / "link", 5, follow_links=True) == b"12345"
    with pytest.raises(files.Unreadable, match="symbolic link"):
        files.read_regular(tmp_path / "link", 5)


def lock_on_a_full_disk(run_dir: Path) -> None:
    """Takes the lock in a process whose files cannot grow."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
    held = RunLock(run_dir)
    assert (run_dir / ".lock").read_bytes() == b""
    with pytest.raises(RunDirectoryBusy, match="an unknown process"):
        RunLock(run_dir)
    held.release()
    RunLock(run_dir).release()


def test_a_lock_can_be_taken_though_no_file_can_grow(tmp_path: Path) -> None:
    child = multiprocessing.get_context("fork").Process(target=lock_on_a_full_disk, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0

"""Runs by their URL, without Ray: what is refused, what is read, what is copied, and who owns it."""

from __future__ import annotations

import json
import re
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from faulty_storage import Bucket
from protocol import config, serve, work

from leap_dist.cli import main as command
from leap_dist.config.loading import resolve
from leap_dist.envs.atari_vector import channels
from leap_dist.evaluation import initializations
from leap_dist.nn.actor_critic import FRAME_SIZE, SCALE, initialization
from leap_dist.storage import location, locks, reader, remote_run, run_directory
from leap_dist.storage import objects as storage
from leap_dist.storage.atomic import pack
from leap_dist.storage.location import Url
from leap_dist.storage.locks import RunDirectoryBusy, RunLock, other_host
from leap_dist.storage.objects import Storage, open_storage
from leap_dist.storage.replica import NO_REPLICA, Remote, Replica, connect, pull


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that is printed; exit code 2."""
    with pytest.raises(SystemExit) as ended:
        command.main(list(arguments))
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("foo://bucket/run", "foo:// URLs cannot hold a run; use one of file://, memory://, s3://"),
        ("fiel:///tmp/run", "did you mean file://?"),
        ("s3://key:verysecret@bucket/run", "has a user or password in it"),
        ("nope://key:verysecret@bucket/run", "has a user or password in it"),
        ("s3://AKIAIOSFODNN7EXAMPLE:verysecret/def+ghi@bucket/run", "has a user or password in it"),
        ("s3://bucket", "names no folder; add one, as in s3://bucket/run"),
        ("file://runs/mine", "has no absolute path; it begins with file:///"),
        ("file:///tmp/../etc/run", "leave that out"),
        ("s3://bucket/run?token=verysecret", "leave that out"),
        ("s3://bucket/r*n", "leave that out"),
        ("s3://[bucket/run", "this is not a valid URL"),
        ("memory://run", "memory:// belongs to one process"),
    ],
)
def test_a_url_that_cannot_hold_a_run_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], url: str, says: str
) -> None:
    line = refused(capsys, "train", "--preset", "smoke", "--run-dir", url)
    assert "run-dir: " in line
    assert says in line
    assert "verysecret" not in line


@pytest.mark.parametrize(("scheme", "package", "extra"), [("s3", "s3fs", "s3"), ("gs", "gcsfs", "gcs")])
def test_a_package_that_is_missing_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, scheme: str, package: str, extra: str
) -> None:
    def missing(url: str, **options: object) -> None:
        raise ImportError(f"Install {package}")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    line = refused(capsys, "train", "--preset", "smoke", "--run-dir", f"{scheme}://bucket/run")
    assert f"{scheme}:// needs the package {package}; pip install {package}, or pip install '.[{extra}]'" in line


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (FileNotFoundError("The specified bucket does not exist"), "The specified bucket does not exist"),
        (PermissionError("Access Denied"), "Access Denied"),
        (RuntimeError("no route to host, key=AKIAABCDEFGHIJKLMNOP"), "no route to host, key=***"),
    ],
)
def test_storage_that_cannot_be_written_is_found_by_a_probe(error: Exception, says: str) -> None:
    bucket = Bucket()

    def refuse(number: int, when: str) -> None:
        if bucket.requests[number][0] == "put" and when == "before":
            raise error

    bucket.fault = refuse
    with pytest.raises(OSError, match=re.escape(says)):
        bucket.storage.probe()
    bucket.fault = lambda number, when: None
    bucket.storage.probe()
    assert not bucket.names(), "the probe leaves nothing behind"


def test_storage_that_keeps_something_else_is_found_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket()
    monkeypatch.setattr(bucket, "cat_file", lambda path: b"something else")
    with pytest.raises(OSError, match="read back with different content"):
        bucket.storage.probe()


def test_storage_that_never_answers_is_given_up_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, forever = Bucket(), threading.Event()
    monkeypatch.setattr(storage, "CALL_SECONDS", 0.1)
    bucket.fault = lambda number, when: forever.wait() and None
    begun = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        bucket.storage.put("name", b"")
    assert time.monotonic() - begun < 5
    count = len(bucket.requests)
    there = bucket.storage
    with pytest.raises(TimeoutError, match="no answer within 0 s"):
        there.get("name")
    with pytest.raises(TimeoutError, match="no request sent, because the last one has just timed out"):
        there.get("name")
    assert len(bucket.requests) == count + 1, "and not tried again at once: the server has others to serve"
    forever.set()


def test_objects_in_a_directory_appear_whole(tmp_path: Path) -> None:
    there = open_storage(f"file://{tmp_path}/run")
    assert there.names() == []
    assert there.find("a/b") is None
    there.put("a/b", b"1")
    there.put("a/b", b"22")
    there.put("c", b"")
    assert (there.names(), there.names("a"), there.get("a/b")) == (["a/b", "c"], ["a/b"], b"22")
    there.remove(["a/b", "nothing"])
    assert there.names() == ["c"]
    assert [path.name for path in (tmp_path / "run").rglob("*") if path.is_file()] == ["c"], "and no temporary file"


def test_memory_holds_a_run_within_one_process() -> None:
    there = open_storage("memory://test-storage/run")
    there.put("a/b", b"1")
    assert open_storage("memory://test-storage/run/").names() == ["a/b"]
    there.remove(["a/b", "nothing"])
    assert there.names() == []


def test_a_whole_run_against_a_directory_and_back(tmp_path: Path) -> None:
    settings = config(mode="sync", meta_updates=1, meta__batch_size=2)
    url = f"file://{tmp_path}/kept/run"
    there = open_storage(url)
    claim, before = locks.take_over(there, watch=0.0)
    (tmp_path / "a").mkdir()
    pull(there, tmp_path / "a", claim, before)
    server = serve(tmp_path / "a", settings, replica=connect(Remote(url, claim), tmp_path / "a"))
    work(server)
    server.close()
    assert connect(None, tmp_path) is NO_REPLICA
    claim, before = locks.take_over(there, watch=0.0)
    (tmp_path / "b").mkdir()
    pull(there, tmp_path / "b", claim, before)
    again = serve(tmp_path / "b", settings, replica=Replica(there, claim, tmp_path / "b"))
    assert np.array_equal(again.snapshot()[1], server.snapshot()[1])
    assert again.finished
    again.close()


# The driver's side --------------------------------------------------------------------------------------------------


@pytest.fixture
def fast(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "copies").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "copies"))
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.0)
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.02)
    for name in ("SUMMARY_SECONDS", "COPY_SECONDS"):
        monkeypatch.setattr(remote_run, name, 0.02)


def begin(url: str, *, resume: bool = False) -> location.Run:
    run = remote_run.open_run(location.location(url), resume=resume)
    run.__enter__()
    run_directory.prepare(run.folder, resolve("smoke"))
    run.publish()
    return run


def until(condition: object, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_what_changes_is_copied_in_the_background_and_all_of_it_at_the_end(tmp_path: Path, fast: None) -> None:
    kept = tmp_path / "kept"
    run = begin(f"file://{kept}")
    assert (kept / "config.yaml").exists(), "from now on others see that there is a run"
    run_directory.write_summary(run.folder, {"state": "running", "tasks_wanted": 4})
    (run.folder / "tensorboard" / "server").mkdir(parents=True)
    (run.folder / "tensorboard" / "server" / "events.1").write_bytes(b"1")
    until(lambda: (kept / "summary.json").exists() and (kept / "tensorboard/server/events.1").exists())
    (run.folder / "progress.png").write_bytes(b"picture")
    (run.folder / "ledger.jsonl").write_text('{"task": 0}\n')
    run.__exit__(None, None, None)
    assert (kept / "progress.png").read_bytes() == b"picture"
    assert (kept / "ledger.jsonl").read_text() == '{"task": 0}\n'
    assert locks.is_released(open_storage(f"file://{kept}"), run.remote.claim)  # type: ignore[union-attr]
    again = remote_run.open_run(Url(f"file://{kept}"), resume=True)
    with again:
        assert (again.folder / "progress.png").read_bytes() == b"picture"
        assert (again.folder / "ledger.jsonl").read_text() == '{"task": 0}\n'
        assert again.folder.name.startswith("leap-dist-kept-")
        assert again.folder.stat().st_mode & 0o077 == 0, "nobody else's business"


def test_copies_that_fail_are_told_and_tried_again(
    tmp_path: Path, fast: None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = begin(f"file://{tmp_path}/kept")
    (run.folder / "progress.png").write_bytes(b"picture")
    put = Storage.put

    def fail(self: Storage, name: str, data: bytes) -> None:
        if name == "progress.png":
            raise OSError(5, "password=verysecret is wrong")
        put(self, name, data)

    monkeypatch.setattr(Storage, "put", fail)
    until(lambda: run.report({"alerts": []})["alerts"])
    (alert,) = run.report({"alerts": []})["alerts"]
    assert "some files could not be copied" in alert
    assert "verysecret" not in alert
    monkeypatch.setattr(Storage, "put", put)
    until(lambda: (tmp_path / "kept" / "progress.png").exists())
    run.__exit__(None, None, None)

    monkeypatch.setattr(remote_run, "LAST_ATTEMPTS", 1)
    run = begin(f"file://{tmp_path}/kept", resume=True)
    (run.folder / "progress.png").write_bytes(b"another")
    monkeypatch.setattr(Storage, "put", fail)
    run.__exit__(None, None, None)
    assert f"find them in {run.folder}" in caplog.text
    run._remove_working_copy()  # type: ignore[attr-defined]
    assert (run.folder / "progress.png").exists(), "kept for a person to look at"


def test_a_run_that_is_there_is_not_begun_and_one_that_is_not_is_not_resumed(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, fast: None
) -> None:
    url = f"file://{tmp_path}/kept"
    assert f"{url} holds no run; leave --resume out" in refused(capsys, "train", "--resume", "--run-dir", url)
    begin(url).__exit__(None, None, None)
    begun = begin(url)  # again: what a start has left that went no further is taken up
    (begun.folder / "ledger.jsonl").write_text("")
    begun.__exit__(None, None, None)
    line = refused(capsys, "train", "--preset", "smoke", "--run-dir", url)
    assert f"{url} already holds a run; add --resume" in line
    line = refused(capsys, "train", "--resume", "--run-dir", url, "--seed", "5")
    assert "seed: 0 -> 5" in line
    line = refused(capsys, "train", "--resume", "--run-dir", str(tmp_path / "kept"))
    assert f"holds a run that belongs to a URL; use {url}" in line


def test_a_run_in_use_is_not_taken_and_one_that_fell_silent_is(
    tmp_path: Path, fast: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"file://{tmp_path}/kept"
    run = begin(url)
    other = remote_run.open_run(Url(url), resume=True)
    with pytest.raises(RunDirectoryBusy, match=r"is in use \(process \d+ on "):
        other.__enter__()
    assert reader.is_alive(Url(url))
    run._heartbeat.stop()  # type: ignore[attr-defined]
    run._copy.stop()  # type: ignore[attr-defined]  # as if it had been killed
    monkeypatch.setattr(locks, "STATUS_SECONDS", 0.1)
    take_over = locks.take_over
    monkeypatch.setattr(locks, "take_over", lambda storage, warn: take_over(storage, watch=0.1, warn=warn))
    assert not locks.is_alive(open_storage(url), run.remote.claim, 0.1)  # type: ignore[union-attr]
    with other:
        with pytest.raises(locks.LockLost):
            locks.check(open_storage(url), run.remote.claim)  # type: ignore[union-attr]
        assert locks.read_claim(open_storage(url)) == other.remote.claim  # type: ignore[union-attr]
    before = sorted(path.name for path in (tmp_path / "kept").iterdir())
    run._heartbeat.lost = locks.LockLost("gone")  # type: ignore[attr-defined]
    (run.folder / "progress.png").write_bytes(b"late")
    run.__exit__(None, None, None)
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == before, "it copies nothing any more"


def test_a_launch_that_has_lost_the_run_hears_of_it(tmp_path: Path, fast: None) -> None:
    url = f"file://{tmp_path}/kept"
    run = begin(url)
    run.report({"alerts": []})
    locks.take_over(open_storage(url), watch=0.0)

    def lost() -> bool:
        try:
            run.report({"alerts": []})
        except locks.LockLost:
            return True
        return False

    until(lost)
    run.__exit__(None, None, None)


def test_a_directory_with_a_live_server_in_it_is_not_taken_by_its_url(tmp_path: Path, fast: None) -> None:
    run_directory.prepare(tmp_path / "plain", resolve("smoke"))
    lock = RunLock(tmp_path / "plain")
    run = remote_run.open_run(Url(f"file://{tmp_path}/plain"), resume=True)
    with pytest.raises(RunDirectoryBusy, match="live server"):
        run.__enter__()
    lock.release()


def test_the_server_of_a_working_copy_stays_on_the_driver_s_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where else would the folder be."""
    import ray

    from leap_dist.driver import server_start
    from leap_dist.driver.signals import StopSignal

    class Actor:
        problem: Any

        def options(self, scheduling_strategy: Any) -> Any:
            self.chosen = scheduling_strategy
            return self

        def remote(self, *_: object) -> Any:
            self.problem = self
            return self

    monkeypatch.setattr(ray, "get_runtime_context", lambda: type("Here", (), {"get_node_id": lambda _: "0" * 56})())
    monkeypatch.setattr(server_start, "first_answer", lambda *_: None)
    for movable in (True, False):
        plan = server_start.ServerPlan(Actor(), (), Path(), movable=movable, most_workers=1, one_kind=False)
        server = server_start.start_server(plan)
        server_start.wait_for_server(server, plan, StopSignal())
        assert (server.chosen.node_id, server.chosen.soft) == ("0" * 56, movable)


# Who only reads -----------------------------------------------------------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, fast: None) -> Path:
    """A directory in which a run is kept by its URL, done, with the initialization that a real one has."""
    run = begin(f"file://{tmp_path}/kept/mine")
    settings = resolve("smoke")
    manifest, initial = initialization(channels(settings.atari.frames), 0, "encoder")
    header = {
        "version": 1, "preset": "smoke", "meta_learner": "leap", "shared": "encoder", "mode": "buffered",
        "games": list(settings.games), "task_steps": 10, "agent_steps": 10,
        "preprocessing": {"frames": settings.atari.frames, "size": FRAME_SIZE, "frame_skip": 4, "scale": SCALE},
    }  # fmt: skip
    (run.folder / "init.safetensors").write_bytes(pack(manifest.split(initial), header))
    (run.folder / "ledger.jsonl").write_text("")
    run_directory.write_summary(run.folder, {"state": "done", "tasks_wanted": 4})
    run.__exit__(None, None, None)
    return tmp_path / "kept" / "mine"


def test_status_reads_a_run_at_its_url(
    capsys: pytest.CaptureFixture[str], kept: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for where in (f"file://{kept}", str(kept)):
        assert command.main(["status", "--json", "--run-dir", where]) == 0
        assert json.loads(capsys.readouterr().out) == {"state": "done", "tasks_wanted": 4}
    assert "holds no run" in refused(capsys, "status", "--run-dir", f"file://{kept}/nothing")
    (kept / "init.safetensors").write_bytes(b"none")
    line = refused(capsys, "export", "--init", f"file://{kept}/init.safetensors", "--to", "torch", "--out", "x")
    assert f"init: file://{kept}/init.safetensors is not a leap-dist file" in line
    (kept / "summary.json").write_text("[]")
    assert f"file://{kept}/summary.json is damaged" in refused(capsys, "status", "--run-dir", f"file://{kept}")
    (kept / "summary.json").write_text(json.dumps({"state": "running", "tasks_wanted": 4}))
    monkeypatch.setattr(locks.is_alive, "__defaults__", (0.1,))
    assert command.main(["status", "--json", "--run-dir", f"file://{kept}"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "died"


def test_a_picture_is_drawn_from_a_url_to_a_file(
    capsys: pytest.CaptureFixture[str], kept: Path, tmp_path: Path
) -> None:
    for where in (f"file://{kept}", str(kept)):
        assert "out: name a file with --out" in refused(capsys, "plot", "--run-dir", where)
        assert command.main(["plot", "--run-dir", where, "--out", str(tmp_path / "p.png")]) == 0
        assert (tmp_path / "p.png").stat().st_size > 1000
        (tmp_path / "p.png").unlink()


def test_an_initialization_at_a_url_is_exported_and_evaluated(
    capsys: pytest.CaptureFixture[str], kept: Path, tmp_path: Path
) -> None:
    url = f"file://{kept}/init.safetensors"
    assert command.main(["export", "--init", url, "--to", "torch", "--out", str(tmp_path / "policy")]) == 0
    assert "leap-dist revision" in (tmp_path / "policy" / "README.md").read_text(), "its run is known"
    assert "there is no x.safetensors" in refused(
        capsys, "export", "--init", f"file://{kept}/x.safetensors", "--to", "torch", "--out", str(tmp_path / "q")
    )
    labels, files = initializations.read([f"file://{kept}", f"other={url}"])
    assert labels == ["mine", "other"]
    chosen = initializations.arms(
        labels, files, initializations.resolve({}, {}, initializations.settings(files, {}, None))
    )
    assert [arm.source for arm in chosen] == [f"file://{kept}", url]
    assert chosen[0].sha256 == chosen[1].sha256
    assert len(initializations.vectors(chosen)["other"]) > 600_000


def test_a_report_is_not_written_to_a_url(capsys: pytest.CaptureFixture[str]) -> None:
    line = refused(capsys, "evaluate", "--init", "scratch", "--out", "s3://bucket/report")
    assert "out: must be a path on this machine, not a URL" in line


# A file system that hosts share, and flock does not reach -----------------------------------------------------------


def noted(run_dir: Path, holder: str) -> None:
    run_directory.prepare(run_dir, resolve("smoke"))
    (run_dir / ".lock").write_text(holder)
    run_directory.write_summary(run_dir, {"state": "running", "tasks_wanted": 4, "n": 0})


class Reporting:
    """A driver on another host, which writes its summary again and again."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir, self._ended = run_dir, threading.Event()
        self._thread = threading.Thread(target=self._report)

    def _report(self) -> None:
        count = 0
        while not self._ended.wait(0.02):
            count += 1
            run_directory.write_summary(self._run_dir, {"state": "running", "tasks_wanted": 4, "n": count})

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()


def test_a_run_of_another_host_is_in_use_while_it_reports(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted(tmp_path, "process 7 on elsewhere")
    assert other_host(tmp_path) == "process 7 on elsewhere"
    with Reporting(tmp_path):
        with pytest.raises(RunDirectoryBusy, match=r"in use from another host \(process 7 on elsewhere"):
            run_directory.prepare(tmp_path, resolve("smoke"))
        assert command.main(["status", "--json", "--run-dir", str(tmp_path)]) == 0
        assert json.loads(capsys.readouterr().out)["state"] == "running"
    monkeypatch.setattr(run_directory, "WATCH_SECONDS", 0.6)
    assert command.main(["status", "--json", "--run-dir", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "died"
    run_directory.prepare(tmp_path, resolve("smoke"))


@pytest.mark.parametrize("last", ["ended", "here"])
def test_nobody_waits_for_a_run_that_has_ended_or_was_on_this_host(tmp_path: Path, last: str) -> None:
    noted(tmp_path, "process 7 on elsewhere")
    if last == "here":
        RunLock(tmp_path).release()
        assert other_host(tmp_path) is None
    else:
        run_directory.write_summary(tmp_path, {"state": "interrupted", "tasks_wanted": 4})
    begun = time.monotonic()
    run_directory.prepare(tmp_path, resolve("smoke"))
    assert time.monotonic() - begun < run_directory.WATCH_SECONDS / 2

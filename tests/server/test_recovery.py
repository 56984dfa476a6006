"""What a server finds after a restart: records that should be gone, files that were not synced, a quarantine."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from crashes import RUNS, Killed, assert_same_end, play
from protocol import INITIAL, Clock, Worker, config, contribution, finish, grant, ledger, pull, serve, work

from leap_dist.protocol.messages import Idle
from leap_dist.server.monitoring import INTERVAL, Alerts
from leap_dist.storage import atomic
from leap_dist.storage.locks import RunDirectoryBusy
from leap_dist.testing import failpoints


@pytest.fixture(autouse=True)
def _disarmed():
    yield
    failpoints.arm("")


def sync_fails(*_: object) -> None:
    raise OSError(errno.EIO, "Input/output error")


# --- records of leases ---------------------------------------------------------------------------------------------

ONE_BATCH_AT_A_TIME = {"sync": {"mode": "sync"}, "buffered": {"mode": "buffered"}, "async": {"mode": "async"}}


def records(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "journal").glob("lease-*"))


def assert_each_task_counted_once(server, run) -> None:
    assert server.finished
    assert sorted(line["task"] for line in server.ledger(0)[0]) == list(range(run.total_tasks))


@pytest.mark.parametrize("mode", ONE_BATCH_AT_A_TIME)
@pytest.mark.parametrize("session", ["s", "next"])
def test_a_lease_whose_record_could_not_be_synced_leaves_none(tmp_path, monkeypatch, mode, session):
    run = config(**ONE_BATCH_AT_A_TIME[mode], meta_updates=2, meta__batch_size=2)
    server = serve(tmp_path, run)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "sync_directory", sync_fails)
        assert server.lease("w0", "i0") == Idle(finished=False)
    assert records(tmp_path) == []
    finish(server, grant(server), INITIAL)
    server.close()
    server = serve(tmp_path, run, session=session)
    assert server.status()["leases"] == []
    work(server)
    assert_each_task_counted_once(server, run)


@pytest.mark.parametrize("mode", ONE_BATCH_AT_A_TIME)
@pytest.mark.parametrize("session", ["s", "next"])
def test_the_record_of_a_lost_lease_that_could_not_be_removed_is_not_opened_again(tmp_path, mode, session):
    """Another worker has finished its task: trained again, it would count twice, and another one not at all."""
    run = config(**ONE_BATCH_AT_A_TIME[mode], meta_updates=3, meta__batch_size=2, server__keep_checkpoints=1)
    server = serve(tmp_path, run)
    grant(server, "lost", "lost")
    failpoints.arm("lease.close=full@1-100")
    server.release("lost")
    for _ in range(4):
        finish(server, grant(server), server.snapshot()[1])
    assert server.version >= 2
    assert len(records(tmp_path)) == 5
    server.close()
    failpoints.arm("")
    server = serve(tmp_path, run, session=session)
    assert server.status()["leases"] == []
    assert records(tmp_path) == []
    work(server)
    assert_each_task_counted_once(server, run)


def test_of_two_records_of_one_task_the_newer_one_is_opened(tmp_path):
    run = config(meta_updates=2, meta__batch_size=2)
    server = serve(tmp_path, run)
    lost = grant(server, "lost", "lost")
    failpoints.arm("lease.close=full@1-2")
    server.release("lost")
    held = grant(server, "w1", "i1")
    assert held.task == lost.task
    older, newer = (tmp_path / "journal" / f"lease-{lease.id}.json" for lease in (lost, held))
    os.utime(older, ns=(0, newer.stat().st_mtime_ns - 1))
    server.close()
    failpoints.arm("")
    server = serve(tmp_path, run)
    assert [lease["lease"] for lease in server.status()["leases"]] == [held.id]
    assert server.push(contribution(held, INITIAL)).durable
    assert not server.push(contribution(lost, INITIAL)).accepted


def test_a_record_that_could_not_be_removed_is_removed_with_the_next_one(tmp_path):
    server = serve(tmp_path, config(meta_updates=2, meta__batch_size=2))
    failpoints.arm("lease.close=full@1")
    finish(server, grant(server), INITIAL)
    assert len(records(tmp_path)) == 1
    finish(server, grant(server), INITIAL)
    assert records(tmp_path) == []


def test_an_entry_that_could_not_be_synced_does_not_stay(tmp_path, monkeypatch):
    """Its worker was told that it does not count, and its task may fail for good before it is pushed again."""
    server = serve(tmp_path, config(meta__batch_size=4))
    lease = grant(server)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "sync_directory", sync_fails)
        assert server.push(contribution(lease, INITIAL)).reason == "storage"
    assert not list((tmp_path / "journal").glob("contribution-*"))


# --- what a killed server had not synced ---------------------------------------------------------------------------


class Synced:
    """Notes the path of every file and directory that is synced."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.paths: set[Path] = set()
        fsync = os.fsync

        def noted(handle: int) -> None:
            fsync(handle)
            self.paths.add(Path(f"/proc/self/fd/{handle}").resolve())

        monkeypatch.setattr(os, "fsync", noted)


def killed(*_: object) -> None:
    raise Killed


def test_an_entry_renamed_and_not_yet_synced_by_a_killed_server_is_synced_before_it_is_called_durable(
    tmp_path, monkeypatch
):
    run = config(meta__batch_size=4)
    server = serve(tmp_path, run)
    lease = grant(server)
    with monkeypatch.context() as patch:
        patch.setattr(atomic, "sync_directory", killed)
        with pytest.raises(Killed):
            server.push(contribution(lease, INITIAL))
    server.close()
    (entry,) = (tmp_path / "journal").glob("contribution-*")
    server = serve(tmp_path, run)
    with monkeypatch.context() as patch:
        patch.setattr(atomic.os, "fsync", sync_fails)
        ack = server.push(contribution(lease, INITIAL))
        assert (ack.durable, ack.reason) == (False, "storage")
    synced = Synced(monkeypatch)
    ack = server.push(contribution(lease, INITIAL))
    assert (ack.durable, ack.reason) == (True, "duplicate")
    assert {entry.resolve(), entry.parent.resolve()} <= synced.paths


def test_a_checkpoint_renamed_and_not_yet_synced_by_a_killed_server_is_synced_before_anything_builds_on_it(
    tmp_path, monkeypatch
):
    run = config(meta_updates=2, meta__batch_size=1, server__keep_checkpoints=1)
    server = serve(tmp_path, run)
    lease = grant(server)
    with monkeypatch.context() as patch:
        patch.setattr(failpoints, "ACTIONS", {"raise": killed})
        failpoints.arm("checkpoint.renamed=raise")
        with pytest.raises(Killed):
            server.push(contribution(lease, INITIAL))
    server.close()
    failpoints.arm("")
    newest = (tmp_path / "checkpoints" / "000001").resolve()
    synced = Synced(monkeypatch)
    server = serve(tmp_path, run)
    assert server.version == 1
    assert {newest.parent, newest, *newest.iterdir()} <= synced.paths


# --- what nobody expects -------------------------------------------------------------------------------------------

DURING_AN_UPDATE = [
    point
    for point in failpoints.POINTS
    if point.startswith(("update.", "checkpoint.", "checkpoint-file.", "ledger.", "init."))
]


@pytest.mark.parametrize("run", ["sync", "stream-heads"])
@pytest.mark.parametrize("point", DURING_AN_UPDATE)
def test_an_error_that_nobody_expects_during_a_meta_update_applies_nothing_twice(tmp_path, run, point):
    """A MemoryError, say: whoever pushed gets it, and pushes again."""
    settings = config(**RUNS[run], server__keep_checkpoints=2)
    undisturbed, _ = play(tmp_path / "undisturbed", settings)
    for hit in (1, 4):
        run_dir = tmp_path / str(hit)
        server = serve(run_dir, settings)
        failpoints.arm(f"{point}=raise@{hit}")
        found, _ = play(run_dir, settings, start=lambda *_, server=server: Unbroken(server))
        failpoints.arm("")
        assert_same_end(found, run_dir, undisturbed, tmp_path / "undisturbed", f"{point}@{hit}")
        server.close()
        again = serve(run_dir, settings)
        assert np.array_equal(again.snapshot()[1], undisturbed.snapshot()[1])
        again.close()
        shutil.rmtree(run_dir)


class Unbroken:
    """A server as workers see it that call again after an error."""

    def __init__(self, server) -> None:
        self._server = server

    def __getattr__(self, name):
        value = getattr(self._server, name)
        if not callable(value):
            return value

        def call(*arguments):
            try:
                return value(*arguments)
            except RuntimeError:
                return value(*arguments)

        return call


def test_an_update_for_which_memory_does_not_suffice_is_made_later(tmp_path, monkeypatch):
    run = config(mode="async", meta_updates=1, meta__batch_size=2)
    server = serve(tmp_path, run)
    lease = grant(server)
    with monkeypatch.context() as patch:
        patch.setattr(server._state.checkpoints, "save", exhausted)
        assert server.push(contribution(lease, INITIAL)).durable
        assert np.array_equal(server.snapshot()[1], INITIAL)
        assert "could not be saved and waits" in server.alerts[-1]
    server.tick()
    assert server.version == 1
    assert len(ledger(tmp_path)) == 1


def exhausted(*_: object) -> None:
    raise MemoryError


@pytest.mark.parametrize("together", [False, True])
def test_a_worker_keeps_its_lease_while_the_journal_cannot_be_flushed(tmp_path, monkeypatch, together):
    """It waits in its push, and sends no other sign of life."""
    clock = Clock()
    server = serve(tmp_path, config(meta_updates=1, meta__batch_size=1, server__lease_seconds=20.0), clock=clock)
    done = contribution(grant(server), INITIAL)
    with monkeypatch.context() as patch:
        patch.setattr(server._state.backlog.journal, "sync", sync_fails)
        for _ in range(5):
            (ack,) = server.push_together([done], []) if together else [server.push(done)]
            assert (ack.reason, ack.proceed, ack.durable) == ("storage", True, False)
            clock.advance(15, server)
    assert server.push(done).durable
    assert server.status()["leases_lost"] == 0
    assert server.version == 1


def test_messages_that_alternate_are_recorded_once():
    alerts = Alerts()
    for _ in range(5):
        for name in ("meta-update", "ledger", "init.safetensors", "journal"):
            alerts(f"{name}: full")
    assert len(alerts.messages) == 4


def test_a_full_disk_is_reported_as_often_to_many_workers_as_to_one(tmp_path):
    """Each repeats its push once a second. A minute gives one line, whatever file each push would have written."""
    clock = Clock()
    server = serve(tmp_path, config(mode="buffered", meta__batch_size=64, workers=40), clock=clock)
    held = [contribution(grant(server, f"w{n}", f"i{n}"), INITIAL, seq=2) for n in range(40)]
    assert not server.alerts
    try:
        failpoints.arm("journal.write=full@1-100000")
        for second in range(180):
            if second % 20 == 0:
                assert {server.push(one).reason for one in held} == {"storage"}
            clock.advance(1, server)
    finally:
        failpoints.arm("")
    assert len(server.alerts) == 3
    assert all("could not be stored" in alert for alert in server.alerts)
    assert all(server.push(one).durable for one in held)


def test_alerts_about_different_things_are_all_recorded():
    clock = Clock()
    alerts = Alerts(clock)
    for number in range(30):
        alerts(f"w{number} has not reported")
    alerts("w0 failed", kind="a")
    alerts("w0 failed", kind="b")
    alerts("w1 failed", kind="a")
    clock.now += INTERVAL
    alerts("w2 failed", kind="a")
    assert list(alerts.messages)[30:] == ["w0 failed", "w2 failed"]
    assert len(alerts.messages) == 32


# --- quarantine ----------------------------------------------------------------------------------------------------


def fail_three_times(server, game: str) -> None:
    """Fails every task of a game until it is quarantined; finishes all others."""
    worker = Worker(server._config)
    while game not in server.status()["quarantined"]:
        worker.step(server)
        if worker.todo and worker.lease.task.game == game:
            server.fail(worker.lease.id, worker.name, "broken")
            worker.todo = []


@pytest.mark.parametrize("mode", ["sync", "buffered", "async"])
def test_a_run_that_is_resumed_gives_quarantined_games_another_try_and_says_so(tmp_path, mode):
    run = config(mode=mode, meta_updates=8, meta__batch_size=2, games="pong,freeway")
    server = serve(tmp_path, run, session="first")
    fail_three_times(server, "pong")
    before = server.version
    while server.version == before:  # the checkpoint that knows of it
        finish(server, grant(server), server.snapshot()[1])
    server.close()
    restarted = serve(tmp_path, run, session="first")
    assert restarted.status()["quarantined"] == ["pong"], "a server that was killed has learned nothing new"
    restarted.close()

    resumed = serve(tmp_path, run, session="second")
    assert resumed.status()["quarantined"] == []
    assert "the run is resumed: pong left quarantine for another try" in resumed.alerts
    work(resumed)
    assert resumed.status()["complete"]
    assert "pong" in {line["game"] for line in ledger(tmp_path)}


def test_a_run_that_ended_because_all_its_games_were_quarantined_can_be_resumed(tmp_path):
    run = config(mode="buffered", meta_updates=4, meta__batch_size=1, games="pong,freeway")
    server = serve(tmp_path, run, session="first")
    fail_three_times(server, "pong")
    finish(server, grant(server), server.snapshot()[1])
    fail_three_times(server, "freeway")
    assert (server.finished, server.status()["complete"]) == (True, False)
    server.close()
    resumed = serve(tmp_path, run, session="second")
    work(resumed)
    assert resumed.status()["complete"]


FULL = ",".join(f"{point}=full@1-1000" for point in ("ledger.write", "init.write", "checkpoint.write", "journal.write"))


@pytest.mark.parametrize("before", ["ledger.write=full@1-1000", "ledger.written=full@1-1000,init.write=full@1-1000"])
def test_a_server_that_restarts_while_the_disk_is_full_goes_on_when_there_is_space(tmp_path, before):
    """The last checkpoint just fitted; the ledger did not, or only a part of it that was never acknowledged."""
    run = config(mode="buffered", meta__batch_size=1, meta_updates=5)
    undisturbed = serve(tmp_path / "undisturbed", run)
    work(undisturbed)
    server = serve(tmp_path / "run", run)
    finish(server, grant(server), INITIAL)
    lease = grant(server)
    try:
        failpoints.arm(before)
        finish(server, lease, server.snapshot()[1])
        server.close()
        failpoints.arm(FULL)
        for _ in range(2):
            server = serve(tmp_path / "run", run)
            assert server.version == 2
            assert not server.status()["files_written"]
            assert any("the ledger could not be written" in alert for alert in server.alerts)
            assert len(server.ledger(0)[0]) == 1
            lease = grant(server)
            refused = server.push(contribution(lease, pull(lease.task.seed, server.snapshot()[1]), seq=2))
            assert (refused.durable, refused.reason) == (False, "storage")
            server.close()
    finally:
        failpoints.arm("")
    server = serve(tmp_path / "run", run)
    server.tick()
    assert server.status()["files_written"]
    work(server)
    assert_same_end(server, tmp_path / "run", undisturbed, tmp_path / "undisturbed")


def test_a_restarted_server_writes_its_files_as_soon_as_there_is_space(tmp_path):
    run = config(mode="buffered", meta__batch_size=1, meta_updates=2)
    server = serve(tmp_path, run)
    finish(server, grant(server), INITIAL)
    server.close()
    written = (tmp_path / "ledger.jsonl").read_text()
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"a line that a crash')
    try:
        failpoints.arm("ledger.write=full@1-2")
        server = serve(tmp_path, run)
        server.tick()
        assert not server.status()["files_written"]
        server.tick()
    finally:
        failpoints.arm("")
    assert server.status()["files_written"]
    assert (tmp_path / "ledger.jsonl").read_text() == written


def test_a_server_that_is_refused_leaves_the_temporary_files_of_the_live_one(tmp_path):
    server = serve(tmp_path, config())
    names = ("journal/.contribution-00000007.safetensors.ab12.tmp", "checkpoints/.000001.tmp")
    for name in names:
        (tmp_path / name).write_bytes(b"being written")
    with pytest.raises(RunDirectoryBusy):
        serve(tmp_path, config())
    assert all((tmp_path / name).exists() for name in names)
    server.close()
    serve(tmp_path, config()).close()
    assert not (tmp_path / names[0]).exists(), "nobody is writing it"

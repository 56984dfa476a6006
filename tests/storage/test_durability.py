"""Crashes at every write, damaged files, full disks: what was acknowledged is applied exactly once."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from crashes import RUNS, Killed, assert_same_end, parts, play, team
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol import (
    INITIAL,
    Clock,
    Worker,
    config,
    contribution,
    drive,
    fast_folder,
    finish,
    grant,
    ledger,
    pull,
    serve,
    work,
)

from leap_dist.config import files
from leap_dist.protocol.messages import Ack, Idle
from leap_dist.storage import checkpoint, journal
from leap_dist.storage.atomic import CorruptFile, pack, read_packed, unpack, write_atomic
from leap_dist.storage.ledger import Ledger
from leap_dist.testing import failpoints


class Failpoints:
    """Kills the process before or after those calls that change the disk whose number is in `at`."""

    CALLS = ((os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree"))

    def __init__(self, monkeypatch, at: set[int], after: bool) -> None:
        self.at, self.after, self.count, self.fired = at, after, 0, 0
        for owner, name in self.CALLS:
            monkeypatch.setattr(owner, name, self._wrap(getattr(owner, name)))

    def _wrap(self, call):
        def wrapped(*args, **kwargs):
            hit = self.count in self.at
            self.count += 1
            if hit:
                self.fired += 1
                if self.after:
                    call(*args, **kwargs)
                raise Killed
            return call(*args, **kwargs)

        return wrapped


@pytest.fixture
def fast_path():
    with fast_folder() as folder:
        yield folder


KILLS = [
    *((run, "before") for run in RUNS),
    # After a call is before the next one, but for what is written and not yet flushed in between.
    *((run, "after") for run in ("sync", "buffered", "async", "stream-heads")),
    *((run, "twice") for run in ("sync", "buffered-heads", "stream-heads")),
]
FAST = {
    ("async-stale", "before"),
    ("buffered-heads", "before"),
    ("stream-heads", "before"),
    ("buffered-heads", "twice"),
}
"""A batch, a refusal, heads and a stream; the other runs are left to `make test-all`."""


@pytest.mark.parametrize(
    ("run", "kill"), [one if one in FAST else pytest.param(*one, marks=pytest.mark.slow) for one in KILLS]
)
def test_a_kill_at_any_write_changes_neither_initialization_nor_heads_nor_ledger(fast_path, monkeypatch, run, kill):
    settings = config(**RUNS[run], server__keep_checkpoints=2)
    undisturbed, acknowledged = play(fast_path / "undisturbed", settings)
    lines = ledger(fast_path / "undisturbed")
    assert {(line["task"], line["seq"]) for line in lines} == acknowledged
    assert len(lines) == len(acknowledged) == (7 if settings.mode == "stream" else settings.total_tasks)
    assert any(line["staleness"] for line in lines) == (run != "sync")
    assert ("stale" in undisturbed.status()["refused"]) == (run == "async-stale")
    at = 0
    while True:
        # The second kill comes while the server is restarting, or soon after that.
        hits = {at, at + 1 + at % 13} if kill == "twice" else {at}
        with monkeypatch.context() as patch:
            failpoints = Failpoints(patch, hits, after=kill == "after")
            server, found = play(fast_path / str(at), settings)
        server.close()
        if not failpoints.fired:
            break
        assert failpoints.fired == len(hits) or at > 80
        assert_same_end(server, fast_path / str(at), undisturbed, fast_path / "undisturbed", f"call {at}")
        assert found == acknowledged, f"call {at}"
        if run != "async-stale":  # nobody hears of the steps of what is refused
            assert server.status()["agent_steps"] == undisturbed.status()["agent_steps"], f"call {at}"
        shutil.rmtree(fast_path / str(at))
        at += 1
    assert at > 80, "the loop must have visited every write of the run"


def test_a_driver_killed_at_any_write_of_a_stream_leaves_each_prefix_counted_once(fast_path, monkeypatch):
    """Its workers die with it; those of the next session train what had not begun, and what had begun is closed."""
    settings = config(**RUNS["stream-heads"], meta__staleness="constant", meta__contribution_clip=0)
    at = 0
    while True:
        run_dir, everyone, acknowledged = fast_path / str(at), [], {}
        with monkeypatch.context() as patch:
            failpoints = Failpoints(patch, {at}, after=at % 2 == 1)
            server, turn = None, 0
            while server is None or not server.finished:
                try:
                    if server is None:
                        everyone += team(settings, f" of {len(everyone)}")
                        server = serve(run_dir, settings, session=str(len(everyone)))
                    worker = everyone[-1 - turn % 2]
                    answer, turn = worker.step(server), turn + 1
                    if isinstance(answer, Ack) and answer.durable:
                        acknowledged[worker.lease.id] = max(acknowledged.get(worker.lease.id, 0), worker.pushed.seq)
                except Killed:
                    if server is not None:
                        server.close()
                    server = None
        server.close()
        if not failpoints.fired:
            break
        sent = {name: contribution for worker in everyone for name, contribution in worker.sent.items()}
        assert_applied_once(run_dir, settings, server, sent, acknowledged)
        shutil.rmtree(run_dir)
        at += 1
    assert at > 80, "the loop must have visited every write of the run"


def assert_applied_once(run_dir, settings, server, sent, acknowledged):
    """The ledger holds what was acknowledged, one task each; φ and heads are what it says, added up here again."""
    lines = [json.loads(line) for line in (run_dir / "ledger.jsonl").read_text().splitlines()]
    last = {line["lease"]: line["seq"] for line in lines}
    assert all(last[lease] >= seq for lease, seq in acknowledged.items())
    finals = [line["task"] for line in lines if line["final"]]
    assert len(finals) == len(set(finals)) == settings.total_tasks
    assert {line["task"] for line in lines} == set(finals)
    assert len(last) == settings.total_tasks, "a task that had begun is not trained again"
    assert sum(line["new_steps"] for line in lines) == lines[-1]["total_steps"]
    phi, heads, size = INITIAL.astype(np.float64), {}, len(INITIAL)
    for lease, seq in last.items():
        vector = sent[lease, seq].vector.astype(np.float64)
        phi -= settings.meta.learning_rate / settings.meta.batch_size * vector[:size]
        game = next(line["game"] for line in lines if line["lease"] == lease)
        heads[game] = heads.get(game, 0) - vector[size:]
    np.testing.assert_allclose(server.snapshot()[1], phi, rtol=1e-5, atol=1e-6)
    for game in heads if settings.keeps_heads else ():
        np.testing.assert_allclose(server.head(game), heads[game], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("run", ["sync", "buffered", "stream", "buffered-heads", "stream-heads"])
@pytest.mark.parametrize("name", ["init.safetensors", "optimizer.safetensors", "heads.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
@pytest.mark.parametrize("count", [1, 2])
def test_damaged_checkpoints_fall_back_to_the_one_before_and_lose_nothing(fast_path, run, name, damage, count):
    settings = config(**{**RUNS[run], "meta_updates": 8, "meta__batch_size": 2})
    undisturbed = serve(fast_path / "undisturbed", settings)
    drive(undisturbed, team(settings))

    server, workers = serve(fast_path / "damaged", settings), team(settings)
    drive(server, workers, 28)  # some meta-updates, and every worker in the middle of a task
    version = server.version
    assert version > 2
    server.close()
    for number in range(count):
        spoil(fast_path / "damaged" / "checkpoints" / f"{version - number:06d}" / name, damage)

    server = serve(fast_path / "damaged", settings)
    assert server.version == version, "the journal still holds what the damaged checkpoints held"
    assert [f"checkpoint {version - n} cannot be used" in server.alerts[n] for n in range(count)] == [True] * count
    drive(server, workers[28 % len(workers) :] + workers[: 28 % len(workers)])
    assert_same_end(server, fast_path / "damaged", undisturbed, fast_path / "undisturbed")
    assert server.status()["agent_steps"] == undisturbed.status()["agent_steps"]


def test_a_new_session_closes_what_had_begun_also_where_the_checkpoints_after_the_lease_are_damaged(tmp_path):
    """The lease is of a version that only the journal brings back, and the prefix is part of that."""
    settings = config(**RUNS["stream-heads"], meta__staleness="constant", meta__contribution_clip=0)
    server, worker = serve(tmp_path, settings, session="first"), Worker(settings, "w", parts)
    drive(server, [worker], 5)  # a whole task, a lease, and its first push
    assert (worker.lease.version, worker.pushed.seq, server.version) == (2, 1, 3)
    server.close()
    for version in (2, 3):
        spoil(tmp_path / "checkpoints" / f"{version:06d}" / "state.json", "cut")
    server, other = serve(tmp_path, settings, session="second"), Worker(settings, "x", parts)
    assert server.status()["tasks"] == 2
    drive(server, [other])
    assert_applied_once(tmp_path, settings, server, {**worker.sent, **other.sent}, {worker.lease.id: 1})


def spoil(file, damage):
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()


def test_without_any_usable_checkpoint_the_server_refuses_to_start_over(tmp_path):
    server = serve(tmp_path, config())
    server.close()
    (tmp_path / "checkpoints" / "000000" / "state.json").write_text("{}")
    with pytest.raises(CorruptFile, match="no usable checkpoint is left"):
        serve(tmp_path, config())


def test_a_newer_format_is_refused(tmp_path):
    server = serve(tmp_path, config())
    server.close()
    file = tmp_path / "checkpoints" / "000000" / "state.json"
    state = json.loads(file.read_text())
    state["format"] = 99
    file.write_text(json.dumps(state))
    with pytest.raises(CorruptFile, match=r"format 99 is newer than 3"):
        serve(tmp_path, config())


def test_leases_survive_a_restart_of_the_server_but_not_of_the_run(tmp_path):
    run = config(meta__batch_size=3, games="pong,freeway,assault")
    server = serve(tmp_path, run, session="first")
    kept, done = grant(server, "w0"), grant(server, "w1")
    finish(server, done, INITIAL)
    server.close()

    restarted = serve(tmp_path, run, session="first")
    assert restarted.renew(kept.id, "i0", 0).proceed
    assert restarted.push(contribution(done, INITIAL, seq=2)).reason == "duplicate"
    next_one = grant(restarted, "w2")
    assert next_one.task.index == 2
    restarted.close()

    resumed = serve(tmp_path, run, session="second")
    assert resumed.push(contribution(kept, INITIAL, seq=2)).reason == "worker-lost"
    assert [grant(resumed, f"x{i}").task.index for i in range(2)] == [0, 2]


def test_a_full_disk_stops_acknowledgements_and_nothing_else(tmp_path, monkeypatch):
    run = config(meta_updates=2, meta__batch_size=2)
    undisturbed = serve(tmp_path / "undisturbed", run)
    work(undisturbed)
    clock = Clock()
    server = serve(tmp_path / "full", run, clock=clock)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    lease = grant(server)
    final = contribution(lease, pull(lease.task.seed, INITIAL), seq=2)
    with monkeypatch.context() as patch:
        patch.setattr(journal, "write_atomic", full)
        for _ in range(3):
            clock.now += 0.9 * lease.seconds
            ack = server.push(final)
            assert (ack.durable, ack.proceed, ack.reason) == (False, True, "storage")
            server.tick()
        assert server.lease("w1", "i1") == Idle(finished=False)
        assert "No space left" in server.alerts[-1]
    assert server.push(final).durable

    lease = grant(server)
    original = checkpoint.CheckpointStore.save
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.CheckpointStore, "save", full)
        ack = server.push(contribution(lease, pull(lease.task.seed, INITIAL), seq=2))
        assert ack.durable, "it is in the journal"
        assert server.version == 0
        assert np.array_equal(server.snapshot()[1], INITIAL), "the update is undone whole"
    assert checkpoint.CheckpointStore.save is original
    server.tick()
    assert server.version == 1
    work(server)
    assert_same_end(server, tmp_path / "full", undisturbed, tmp_path / "undisturbed")


def test_a_ledger_that_cannot_be_written_is_made_up_for_later(tmp_path, monkeypatch):
    run = config(meta_updates=3, meta__batch_size=1)
    undisturbed = serve(tmp_path / "undisturbed", run)
    work(undisturbed)
    server = serve(tmp_path / "full", run)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(Ledger, "append", full)
        finish(server, grant(server), server.snapshot()[1])
    assert server.version == 1
    assert not (tmp_path / "full" / "ledger.jsonl").read_text()
    server.close()
    server = serve(tmp_path / "full", run)
    work(server)
    assert_same_end(server, tmp_path / "full", undisturbed, tmp_path / "undisturbed")


def _exported_version(run_dir: Path) -> int:
    _, metadata = unpack(read_packed(run_dir / "init.safetensors"), "init.safetensors")
    version: int = metadata["version"]
    return version


@pytest.mark.parametrize(("fault", "behind"), [("ledger", "ledger.jsonl"), ("init", "init.safetensors")])
def test_a_file_that_could_not_be_written_after_the_last_meta_update_is_written_when_it_can_be(tmp_path, fault, behind):
    """No other meta-update follows that would write it. One file does not wait for the other."""
    run = config(meta_updates=2, meta__batch_size=1)
    undisturbed = serve(tmp_path / "undisturbed", run)
    work(undisturbed)
    folder = tmp_path / "full"
    server = serve(folder, run)
    finish(server, grant(server), server.snapshot()[1])
    assert server.status()["files_written"]
    lease = grant(server)
    try:
        failpoints.arm(f"{fault}.write=full@1-3")
        finish(server, lease, server.snapshot()[1])
        written = {
            "ledger.jsonl": len(ledger(folder)) == 2,
            "init.safetensors": _exported_version(folder) == 2,
        }
        assert written == {name: name != behind for name in written}
        server.tick()
        server.tick()
        assert (server.finished, server.status()["files_written"]) == (True, False)
        assert len([alert for alert in server.alerts if "could not be written; the server tries again" in alert]) == 1
        server.tick()
        assert server.status()["files_written"]
        assert_same_end(server, folder, undisturbed, tmp_path / "undisturbed")
    finally:
        failpoints.arm("")


def test_a_backup_that_shares_the_ledger_keeps_it_as_it_was(tmp_path):
    """Hard links of a backup must neither receive what is written later, nor keep the server from writing."""
    run = config(meta_updates=3, meta__batch_size=1)
    undisturbed = serve(tmp_path / "undisturbed", run)
    work(undisturbed)
    server = serve(tmp_path / "run", run)
    finish(server, grant(server), server.snapshot()[1])
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    os.link(tmp_path / "run" / "ledger.jsonl", tmp_path / "backup.jsonl")
    work(server)
    assert server.status()["files_written"]
    assert (tmp_path / "backup.jsonl").read_bytes() == before
    assert (tmp_path / "run" / "ledger.jsonl").stat().st_nlink == 1
    assert not list((tmp_path / "run").glob(".ledger*"))
    assert_same_end(server, tmp_path / "run", undisturbed, tmp_path / "undisturbed")


def test_a_ledger_that_cannot_be_read_for_a_while_ends_nothing(tmp_path, monkeypatch):
    server = serve(tmp_path, config(meta_updates=2, meta__batch_size=1))
    work(server)
    lines, end = server.ledger(0)
    with monkeypatch.context() as patch:

        def stale(*_, **__):
            raise OSError(errno.ESTALE, "Stale file handle")

        patch.setattr(files, "open_regular", stale)
        assert server.ledger(end) == ([], end), "nobody reads it again from the beginning"
        assert "the ledger could not be read" in server.alerts[-1]
    assert server.ledger(0) == (lines, end)


def test_a_checkpoint_that_could_not_be_read_back_is_not_written(tmp_path, monkeypatch):
    """Its state.json has everything that the ledger lacks, which may be more than a file may have."""
    server = serve(tmp_path, config(meta_updates=2, meta__batch_size=1))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "LARGEST", 500)
        finish(server, grant(server), server.snapshot()[1])
        assert server.version == 0
        assert "state.json would be larger than 500 bytes" in server.alerts[-1]
        assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000000"]
    server.tick()
    assert server.version == 1


def test_equal_errors_of_a_write_read_alike(tmp_path, monkeypatch):
    """The name of the temporary file is another one each time, so alerts would repeat themselves forever."""

    def read_only(path):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(files, "create_new", read_only)
    texts = []
    for _ in range(2):
        with pytest.raises(OSError, match="Read-only") as error:
            write_atomic(tmp_path / "summary.json", b"", "summary")
        texts.append(str(error.value))
    assert texts == [f"[Errno {errno.EROFS}] Read-only file system: '{tmp_path / 'summary.json'}'"] * 2


def test_journal_files_are_removed_once_every_kept_checkpoint_covers_them(tmp_path):
    server = serve(tmp_path, config(meta_updates=9, meta__batch_size=2, server__keep_checkpoints=2))
    work(server)
    assert len(list((tmp_path / "journal").iterdir())) == 2
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["000008", "000009"]


@settings(max_examples=300)
@given(st.binary(max_size=400), st.data())
def test_unpack_refuses_whatever_pack_did_not_write(noise, data):
    good = pack({"vector": INITIAL}, {"norm": 1.0, "text": "φ"})
    tensors, header = unpack(good, "good")
    assert np.array_equal(tensors["vector"], INITIAL)
    assert header == {"norm": 1.0, "text": "φ"}
    position = data.draw(st.integers(0, len(good) - 1))
    bit = 1 << data.draw(st.integers(0, 7))
    flipped = good[:position] + bytes([good[position] ^ bit]) + good[position + 1 :]
    for bad in (noise, good[:position], flipped):
        try:
            again, same = unpack(bad, "bad")
        except CorruptFile:
            continue
        # A flip that the checksum does not cover, such as in the header's white space, changes nothing that is read.
        assert np.array_equal(again["vector"], INITIAL)
        assert same == header


class _Canary:
    def __reduce__(self):
        return (os.mkdir, (os.environ["LEAP_TEST_CANARY"],))


def test_a_pickle_dressed_as_a_checkpoint_is_not_executed(tmp_path, monkeypatch):
    canary = tmp_path / "executed"
    monkeypatch.setenv("LEAP_TEST_CANARY", str(canary))
    server = serve(tmp_path / "run", config())
    server.close()
    for file in (tmp_path / "run" / "checkpoints" / "000000").iterdir():
        file.write_bytes(pickle.dumps(_Canary()))
    with pytest.raises(CorruptFile):
        serve(tmp_path / "run", config())
    assert not canary.exists()
    pickle.loads(pickle.dumps(_Canary()))
    assert canary.exists(), "the canary must be able to sing"

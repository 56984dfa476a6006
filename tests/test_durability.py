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
from hypothesis import given, settings
from hypothesis import strategies as st
from protocol import INITIAL, Clock, config, contribution, finish, grant, ledger, pull, serve, work

from leap_dist import checkpoint
from leap_dist.checkpoint import CorruptFile, pack, unpack
from leap_dist.contribution import Idle


class Killed(BaseException):
    """Stands in for SIGKILL: nothing catches it."""


class Failpoints:
    """Kills the process before or after the n-th call that changes the disk."""

    CALLS = ((os, "fsync"), (os, "replace"), (Path, "unlink"), (Path, "mkdir"), (shutil, "rmtree"))

    def __init__(self, monkeypatch, at: int, after: bool) -> None:
        self.at, self.after, self.count, self.fired = at, after, 0, False
        for owner, name in self.CALLS:
            monkeypatch.setattr(owner, name, self._wrap(getattr(owner, name)))

    def _wrap(self, call):
        def wrapped(*args, **kwargs):
            hit = not self.fired and self.count == self.at
            self.count += 1
            if hit:
                self.fired = True
                if self.after:
                    call(*args, **kwargs)
                raise Killed
            return call(*args, **kwargs)

        return wrapped


def play(run_dir, config_, failpoints=None):
    """One worker that trains to the end; when the server is killed, a new one is started and the worker goes on.

    A push that got no answer is sent again, as a worker does. Returns φ, the ledger, and the finals acknowledged.
    """
    server, acknowledged, unanswered = None, set(), None
    while True:
        try:
            server = server or serve(run_dir, config_)
            if unanswered is None:
                lease = server.lease("w0", "i0")
                if isinstance(lease, Idle):
                    return server.snapshot()[1], ledger(run_dir), acknowledged, server
                unanswered = contribution(lease, pull(lease.task.seed, server.snapshot()[1]), seq=2)
            ack = server.push(unanswered)
            if ack.durable:
                acknowledged.add(int(unanswered.lease.split("-")[0]))
            unanswered = None
        except Killed:
            if server is not None:
                server.close()
            server = None


@pytest.mark.parametrize("mode", ["sync", "buffered", "async"])
@pytest.mark.parametrize("after", [False, True])
def test_a_kill_at_any_write_changes_neither_initialization_nor_ledger(tmp_path, monkeypatch, mode, after):
    run = config(mode=mode, meta_updates=4, meta__batch_size=2, meta__optimizer="adam", server__keep_checkpoints=2)
    phi, lines, acknowledged, server = play(tmp_path / "undisturbed", run)
    server.close()
    assert len(lines) == len(acknowledged) == 8
    at = 0
    while True:
        with monkeypatch.context() as patch:
            failpoints = Failpoints(patch, at, after)
            found_phi, found_lines, found_acknowledged, server = play(tmp_path / str(at), run)
        server.close()
        if not failpoints.fired:
            break
        assert np.array_equal(found_phi, phi), f"call {at}"
        assert found_lines == lines, f"call {at}"
        assert found_acknowledged <= {line["task"] for line in found_lines}
        at += 1
    assert at > 50, "the loop must have visited every write of the run"


@pytest.mark.parametrize("mode", ["sync", "buffered"])
@pytest.mark.parametrize("name", ["init.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["flip", "cut", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_loses_nothing(tmp_path, mode, name, damage):
    run = config(mode=mode, meta_updates=5, meta__batch_size=2)
    phi, lines, _, server = play(tmp_path / "undisturbed", run)
    server.close()

    server = serve(tmp_path / "damaged", run)
    for _ in range(7):  # three meta-updates, and one contribution in the journal
        finish(server, grant(server), server.snapshot()[1])
    server.close()
    file = tmp_path / "damaged" / "checkpoints" / "000003" / name
    data = bytearray(file.read_bytes())
    if damage == "flip":
        data[len(data) // 2] ^= 4
        file.write_bytes(data)
    elif damage == "cut":
        file.write_bytes(data[: len(data) // 2])
    else:
        file.unlink()

    server = serve(tmp_path / "damaged", run)
    assert server.version == 3, "the journal still holds what the damaged checkpoint held"
    assert any("checkpoint 3 cannot be used" in alert for alert in server.alerts)
    work(server)
    assert np.array_equal(server.snapshot()[1], phi)
    assert ledger(tmp_path / "damaged") == lines


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
    with pytest.raises(CorruptFile, match=r"format 99 is newer than 2"):
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
    phi, lines, _, server = play(tmp_path / "undisturbed", run)
    server.close()
    clock = Clock()
    server = serve(tmp_path / "full", run, clock=clock)

    def full(path, data, **_):
        raise OSError(errno.ENOSPC, "No space left on device")

    lease = grant(server)
    final = contribution(lease, pull(lease.task.seed, INITIAL), seq=2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_atomic", full)
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
    assert np.array_equal(server.snapshot()[1], phi)
    assert ledger(tmp_path / "full") == lines


def test_a_ledger_that_cannot_be_written_is_made_up_for_later(tmp_path, monkeypatch):
    run = config(meta_updates=3, meta__batch_size=1)
    _, lines, _, server = play(tmp_path / "undisturbed", run)
    server.close()
    server = serve(tmp_path / "full", run)
    with monkeypatch.context() as patch:

        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        patch.setattr(checkpoint.Ledger, "append", full)
        finish(server, grant(server), server.snapshot()[1])
    assert server.version == 1
    assert not (tmp_path / "full" / "ledger.jsonl").read_text()
    server.close()
    work(serve(tmp_path / "full", run))
    assert ledger(tmp_path / "full") == lines


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

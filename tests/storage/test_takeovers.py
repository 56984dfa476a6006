"""Launches that take a run at a URL over from each other, at every put: nothing acknowledged is lost or doubled."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from faulty_storage import Bucket, launch
from fsspec.implementations.memory import MemoryFileSystem
from protocol import INITIAL, config, contribution, fast_folder, grant, ledger, serve
from takeovers import History

from leap_dist.server.meta_server import MetaServer
from leap_dist.storage import locks, replica
from leap_dist.storage.locks import Claim
from leap_dist.storage.objects import open_storage

SETTINGS = config(mode="buffered", meta__batch_size=2, meta_updates=100, meta__contribution_clip=0)

FOUND = (1, 14, 58, 164)
"""Histories that once lost something."""


@pytest.fixture
def folder() -> Iterator[Path]:
    with fast_folder() as path:
        yield path


@pytest.mark.parametrize("block", range(4))
def test_nothing_is_lost_or_doubled_in_random_histories_of_take_overs(
    folder: Path, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica, "PARALLEL_READS", 1)  # or a history would not depend on its seed alone
    acknowledged = takeovers = 0
    for seed in (*range(block * 3, block * 3 + 3), FOUND[block]):
        (folder / str(seed)).mkdir()
        history = History(folder / str(seed), SETTINGS, seed)
        history.run(40)
        assert history.check() == (0, 0), f"lost and doubled with seed {seed}"
        acknowledged += len(history.acknowledged)
        takeovers += history.launches
    assert acknowledged > 10
    assert takeovers > 30


def test_what_an_owner_acknowledged_counts_although_a_late_lock_names_a_claim_of_the_same_generation(
    folder: Path,
) -> None:
    """The store has no conditional writes: two launches have the same generation, and the lock of the dead one wins."""
    bucket = Bucket()
    bucket.pipe_file = lambda path, value, mode="overwrite", **more: Bucket.pipe_file(bucket, path, value)  # type: ignore[method-assign]
    server = launch(bucket, folder / "a", SETTINGS)
    present = locks.read_claim(bucket.storage)
    assert present is not None
    leases = [grant(server, f"w{number}", f"i{number}") for number in range(5)]
    for lease in leases:
        assert server.push(contribution(lease, INITIAL)).durable
        server.tick()
    late = Claim("process 7 on elsewhere", "0123456789abcdef" * 2, present.generation)
    bucket.storage.put(".lock", json.dumps(late._asdict()).encode())
    server.close()
    after = launch(bucket, folder / "b", SETTINGS)
    lines = (folder / "b" / "ledger.jsonl").read_text().splitlines()
    known = {json.loads(line)["lease"] for line in lines} | {a.lease.id for a in after._state.backlog.waiting}
    assert known == {lease.id for lease in leases}
    after.close()


def _begin(bucket: Bucket, folder: Path) -> None:
    """Let a launch accept one contribution and die."""
    server = launch(bucket, folder, SETTINGS)
    assert server.push(contribution(grant(server), INITIAL)).durable
    server.close()


def _waiting(bucket: Bucket, folder: Path) -> int:
    """Return how many contributions a new launch finds."""
    server = launch(bucket, folder, SETTINGS)
    server.close()
    return len(server._state.backlog.waiting)


def test_a_launch_that_has_lost_the_run_removes_no_checkpoint_that_its_successor_is_about_to_complete(
    folder: Path,
) -> None:
    bucket = Bucket()
    _begin(bucket, folder / "first")
    claim, before = locks.take_over(bucket.storage, watch=0.0)
    (folder / "slow").mkdir()

    def meanwhile(number: int, when: str) -> None:
        kind, name = bucket.requests[number]
        if kind == "put" and name.endswith("heads.safetensors") and when == "before":
            bucket.fault = lambda number, when: None
            replica.pull(bucket.storage, folder / "slow", claim, before)

    bucket.fault = meanwhile
    launch(bucket, folder / "successor", SETTINGS).close()
    assert (folder / "slow/checkpoints").exists()
    assert _waiting(bucket, folder / "last") == 1


def test_a_checkpoint_that_is_completed_late_is_not_removed_by_a_launch_that_found_it_incomplete(folder: Path) -> None:
    bucket = Bucket()
    _begin(bucket, folder / "first")
    late: list[str] = []

    def lose_the_marker(number: int, when: str) -> None:
        kind, name = bucket.requests[number]
        if kind == "put" and name.endswith("state.json") and when == "before":
            late.append(name)
            raise ConnectionError("no answer")

    bucket.fault = lose_the_marker
    claim, before = locks.take_over(bucket.storage, watch=0.0)
    (folder / "second").mkdir()
    replica.pull(bucket.storage, folder / "second", claim, before)
    second = replica.Replica(bucket.storage, claim, folder / "second")
    with pytest.raises(OSError, match="no answer"):
        second._catch_up()
    claim, before = locks.take_over(bucket.storage, watch=0.0)

    def arrive(number: int, when: str) -> None:
        if bucket.requests[number][0] == "list" and when == "after":
            bucket.fault = lambda number, when: None
            bucket.storage.put(late[0], (folder / "second/checkpoints/000000/state.json").read_bytes())
            newer, older = locks.take_over(bucket.storage, watch=0.0)
            (folder / "fourth").mkdir()
            replica.pull(bucket.storage, folder / "fourth", newer, older)  # and dies before it puts anything

    bucket.fault = arrive
    (folder / "third").mkdir()
    replica.pull(bucket.storage, folder / "third", claim, before)
    assert late
    assert (folder / "fourth/checkpoints").exists()
    assert _waiting(bucket, folder / "last") == 1


def test_a_launch_that_ends_after_it_has_lost_the_run_leaves_the_ledger_to_its_successor(folder: Path) -> None:
    bucket = Bucket()
    claim, before = locks.take_over(bucket.storage, watch=0.0)
    (folder / "first").mkdir()
    replica.pull(bucket.storage, folder / "first", claim, before)
    first = serve(folder / "first", SETTINGS, replica=replica.Replica(bucket.storage, claim, folder / "first"))
    _contribute(first, 2)
    first.close()
    second = launch(bucket, folder / "second", SETTINGS, session="t")
    _contribute(second, 2)
    replica.put_whole_ledger(bucket.storage, folder / "first", claim)
    _contribute(second, 2)
    second.close()
    launch(bucket, folder / "third", SETTINGS).close()
    assert [line["task"] for line in ledger(folder / "third")] == list(range(6))
    assert (folder / "third/ledger.jsonl").read_bytes() == (folder / "second/ledger.jsonl").read_bytes()


def _contribute(server: MetaServer, count: int) -> None:
    for _ in range(count):
        assert server.push(contribution(grant(server), INITIAL)).durable


def test_who_writes_the_lock_late_claims_a_higher_generation_than_all_that_was_written_meanwhile(folder: Path) -> None:
    bucket = Bucket()
    servers = []

    def meanwhile(number: int, when: str) -> None:
        if bucket.requests[number] == ("put", ".lock") and when == "before":
            bucket.fault = lambda number, when: None
            servers.append(launch(bucket, folder / "other", SETTINGS))
            assert servers[0].push(contribution(grant(servers[0]), INITIAL)).durable

    bucket.fault = meanwhile
    claim, _ = locks.take_over(bucket.storage, watch=0.0)
    (server,) = servers
    written = [locks.parse_stamp(name) for name in bucket.names() if name.startswith("journal/")]
    assert claim.generation > max(stamp.generation for stamp in written if stamp)
    assert locks.read_claim(bucket.storage) == claim
    assert server.push(contribution(grant(server, "w1", "i1"), INITIAL)).reason == "storage"
    server.close()


def test_a_generation_is_claimed_by_one_launch_only(tmp_path: Path) -> None:
    MemoryFileSystem.store.clear()
    for url in (f"file://{tmp_path}/run", "memory://test-claims/run"):
        storage = open_storage(url)
        storage.create("a/b", b"first")
        with pytest.raises(FileExistsError):
            storage.create("a/b", b"second")
        assert storage.get("a/b") == b"first"
        claims = {locks._claim_generation(storage, Claim("x", "0" * 32, 1)).generation for _ in range(3)}
        assert claims == {1, 2, 3}

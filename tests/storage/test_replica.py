"""A run in object storage: whatever machine is lost, and whatever request, what was acknowledged counts once."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crashes import RUNS, Killed, assert_same_end, play, team
from faulty_storage import Bucket, fail, kill, launch
from fsspec.implementations.memory import MemoryFile
from protocol import INITIAL, Worker, config, contribution, fast_folder, grant, ledger, serve, work

from leap_dist.protocol.messages import Ack, Contribution, Lease
from leap_dist.storage import locks, replica
from leap_dist.storage.locks import Claim, LockLost, RunDirectoryBusy
from leap_dist.storage.replica import MARKER, Replica, pull


def folders(bucket: Bucket, version: int) -> list[str]:
    """The folders of a checkpoint at the URL."""
    found = {name.rpartition("/")[0] for name in bucket.names() if name.startswith(f"checkpoints/{version:06d}")}
    return sorted(found)


def work_on(server: Any, tasks: int) -> None:
    """Train so many tasks, or fewer if the server takes nothing any more."""
    for _ in range(tasks):
        lease = server.lease("w0", "i0")
        if isinstance(lease, Lease):
            server.push(contribution(lease, INITIAL * (1 + lease.task.index), seq=1))
            server.tick()


@pytest.fixture
def folder() -> Iterator[Path]:
    with fast_folder() as path:
        yield path


class Lost:
    """A run whose machine is lost at some requests, with all that is on it; the next launch begins with nothing."""

    def __init__(self, folder: Path, settings: Any, bucket: Bucket) -> None:
        self.folder, self.settings, self.bucket = folder, settings, bucket
        self.launches = 0
        self.acknowledged: dict[tuple[str, int], int] = {}
        """Tasks, by lease and seq."""
        self.sent: dict[tuple[str, int], Contribution] = {}
        folder.mkdir()

    @property
    def working_copy(self) -> Path:
        return self.folder / str(self.launches)

    def play(self) -> Any:
        server: Any = None
        workers: list[Worker] = []
        turn = 0
        while server is None or not server.finished:
            try:
                if server is None:
                    self.launches += 1
                    server = launch(self.bucket, self.working_copy, self.settings, str(self.launches))
                    workers = team(self.settings, f" of {self.launches}")
                worker = workers[turn % len(workers)]
                answer, turn = worker.step(server), turn + 1
                if isinstance(answer, Ack) and answer.durable and worker.pushed is not None and worker.lease:
                    pushed = worker.pushed
                    self.acknowledged[pushed.lease, pushed.seq] = worker.lease.task.index
            except Killed:
                if server is not None:
                    server.close()
                server = None
                shutil.rmtree(self.working_copy)
            finally:
                for one in workers:
                    self.sent |= one.sent
        return server

    def assert_applied_once(self, where: str) -> None:
        """The ledger holds what was acknowledged, once."""
        lines = [json.loads(line) for line in (self.working_copy / "ledger.jsonl").read_text().splitlines()]
        applied = [(line["lease"], line["seq"]) for line in lines]
        assert len(applied) == len(set(applied)), where
        assert self.acknowledged.keys() <= set(applied), where
        finals = sorted(line["task"] for line in lines if line["final"])
        assert finals == list(range(self.settings.total_tasks)), where


@pytest.mark.parametrize(
    ("run", "when"),
    [
        ("sync", "after"),
        ("buffered", "before"),
        pytest.param("sync", "before", marks=pytest.mark.slow),
        pytest.param("buffered", "after", marks=pytest.mark.slow),
        pytest.param("stream-heads", "before", marks=pytest.mark.slow),
        pytest.param("stream-heads", "after", marks=pytest.mark.slow),
    ],
)
def test_a_machine_lost_at_any_request_takes_nothing_along_that_was_acknowledged(
    folder: Path, run: str, when: str
) -> None:
    settings = config(**RUNS[run], server__keep_checkpoints=2, meta__staleness="constant", meta__contribution_clip=0)
    undisturbed, _ = play(folder / "undisturbed", settings)
    at, points = 0, None
    while points is None or at < points:
        bucket = Bucket()
        if points is not None:
            bucket.fault = kill(at, when=when)
        lost = Lost(folder / str(at), settings, bucket)
        server = lost.play()
        if points is None:  # the first round counts
            points = len(bucket.requests)
        else:
            assert lost.launches == 2, at
            at += 1
        lost.assert_applied_once(f"request {at}")
        if run == "sync":
            assert_same_end(server, lost.working_copy, undisturbed, folder / "undisturbed", f"request {at}")
        elif run == "stream-heads":
            assert_sum(lost, server)
        assert_storage_has_it_all(lost, server)
        server.close()
        shutil.rmtree(lost.folder)
    assert points > 40, "the loop must have visited every request of the run"


def assert_sum(lost: Lost, server: Any) -> None:
    """In a stream φ is what the ledger says, added up here again: of each lease the last push, which is cumulative."""
    lines = [json.loads(line) for line in (lost.working_copy / "ledger.jsonl").read_text().splitlines()]
    phi, meta = INITIAL.astype(np.float64), lost.settings.meta
    for lease, seq in {line["lease"]: line["seq"] for line in lines}.items():
        phi -= meta.learning_rate / meta.batch_size * lost.sent[lease, seq].vector[: len(INITIAL)]
    np.testing.assert_allclose(server.snapshot()[1], phi, rtol=1e-5, atol=1e-6)


def assert_storage_has_it_all(lost: Lost, server: Any) -> None:
    """Also when nobody says goodbye: a new launch has the same φ and ledger."""
    lost.bucket.fault = lambda number, when: None
    again = launch(lost.bucket, lost.folder / "again", lost.settings)
    assert np.array_equal(again.snapshot()[1], server.snapshot()[1])
    assert ledger(lost.folder / "again") == ledger(lost.working_copy)
    assert again.finished
    again.close()


def test_two_machines_lost_one_after_the_other(folder: Path) -> None:
    """The second while it takes over what the first has left, or soon after."""
    settings = config(**RUNS["sync"], server__keep_checkpoints=2)
    undisturbed, _ = play(folder / "undisturbed", settings)
    for at in range(4, 90, 5):
        bucket = Bucket()
        bucket.fault = kill(at, at + 2 + at % 17, when="after" if at % 2 else "before")
        lost = Lost(folder / str(at), settings, bucket)
        server = lost.play()
        lost.assert_applied_once(f"request {at}")
        assert_same_end(server, lost.working_copy, undisturbed, folder / "undisturbed", f"request {at}")
        server.close()


@pytest.mark.parametrize(
    ("run", "when"),
    [
        ("sync", "before"),
        ("stream", "after"),
        pytest.param("sync", "after", marks=pytest.mark.slow),
        pytest.param("stream", "before", marks=pytest.mark.slow),
    ],
)
def test_storage_that_does_not_answer_for_a_while_changes_nothing(folder: Path, run: str, when: str) -> None:
    """Whether what was asked for happened or not: nothing is acknowledged that is not there, and it goes on."""
    settings = config(**RUNS[run], server__keep_checkpoints=2)
    undisturbed, acknowledged = play(folder / "undisturbed", settings)
    at, fired = 0, True
    while fired:
        bucket = Bucket()
        server = launch(bucket, folder / str(at), settings)
        first = len(bucket.requests) + at
        bucket.fault = fail(first, first + 2, when)
        server, found = play(folder / str(at), settings, lambda *_, server=server: server)
        fired = len(bucket.requests) > first
        assert found == acknowledged, at
        lines = ledger(folder / str(at))
        assert sorted((line["task"], line["seq"]) for line in lines) == sorted(found), at
        lost = Lost(folder / f"lost {at}", settings, bucket)
        bucket.fault = lambda number, when: None
        after = launch(bucket, lost.folder / "after", settings)
        assert np.array_equal(after.snapshot()[1], server.snapshot()[1]), at
        assert ledger(lost.folder / "after") == lines, at
        if run == "sync":
            assert_same_end(after, lost.folder / "after", undisturbed, folder / "undisturbed", str(at))
        after.close()
        server.close()
        at += 1
    assert at > 30


def test_a_put_that_failed_and_arrives_late_does_not_replace_what_was_acknowledged_since(tmp_path: Path) -> None:
    """The same place in the journal was given to another contribution in the meantime."""
    settings, bucket = config(mode="buffered", meta__batch_size=3), Bucket()
    server = launch(bucket, tmp_path / "a", settings)
    one, other = grant(server, "w0", "i0"), grant(server, "w1", "i1")
    late: dict[str, bytes] = {}

    def lose(number: int, when: str) -> None:
        if bucket.requests[number][0] == "put" and when == "before":
            raise ConnectionError("no answer")

    bucket.fault = lose
    first = contribution(one, INITIAL)
    assert server.push(first).reason == "storage"
    late[bucket.requests[-1][1]] = b"what was lost"
    bucket.fault = lambda number, when: None
    assert server.push(contribution(other, 2 * INITIAL)).durable
    bucket.storage.put(next(iter(late)), late.popitem()[1])
    server.close()
    after = launch(bucket, tmp_path / "b", settings)
    assert after.alerts == server.alerts or not after.alerts
    assert [a.lease.id for a in after._state.backlog.waiting] == [other.id]
    assert server.push(first).reason != ""
    after.close()


def test_the_marker_of_a_checkpoint_is_put_last_and_removed_first(folder: Path) -> None:
    settings, bucket = config(**RUNS["sync"], server__keep_checkpoints=1), Bucket()
    server = launch(bucket, folder / "a", settings)
    work(server)
    server.close()
    for version in range(settings.meta_updates + 1):
        prefix = f"checkpoints/{version:06d}."
        touched = [(kind, Path(path)) for kind, path in bucket.requests if path.startswith(prefix)]
        puts = [path.name for kind, path in touched if kind == "put"]
        assert len(puts) == 4
        assert puts[-1] == MARKER
        assert len({path.parent for _, path in touched}) == 1
        if version < settings.meta_updates:
            kind, path = touched[len(puts)]
            assert (kind, path.name) == ("remove", MARKER)
    assert {name.split("/")[1][:6] for name in bucket.names() if name.startswith("checkpoints/")} == {"000003"}


def test_what_no_checkpoint_needs_any_more_is_removed_there_too(folder: Path) -> None:
    settings, bucket = config(**RUNS["sync"], server__keep_checkpoints=1), Bucket()
    server = launch(bucket, folder / "a", settings)
    work(server)
    assert not list((folder / "a" / "journal").glob("contribution-*"))
    assert not [name for name in bucket.names() if name.startswith("journal/")]
    server.close()


def test_a_checkpoint_without_its_marker_is_none_and_is_cleaned_up(folder: Path) -> None:
    settings, bucket = config(**RUNS["sync"]), Bucket()
    server = launch(bucket, folder / "a", settings)
    work(server)
    server.close()
    (newest,) = folders(bucket, 3)
    bucket.storage.remove([f"{newest}/state.json"])
    after = launch(bucket, folder / "b", settings)
    assert after.version == 3, "from the one before and the journal"
    assert not after.alerts, "no damage, but none at all"
    assert ledger(folder / "b") == ledger(folder / "a")
    after.close()


def test_a_marker_that_arrives_when_the_other_files_of_its_checkpoint_are_gone_makes_no_checkpoint(
    folder: Path,
) -> None:
    settings, bucket = config(**RUNS["sync"]), Bucket()
    bucket.storage.put("checkpoints/000000/state.json", b"late")
    server = launch(bucket, folder / "a", settings)
    assert server.version == 0
    server.close()


def test_a_checkpoint_that_is_put_again_gets_a_folder_of_its_own(folder: Path) -> None:
    """Otherwise the marker of the first attempt would vouch for files of the second."""
    settings, bucket = config(mode="buffered", meta__batch_size=1), Bucket()
    server = launch(bucket, folder / "a", settings)

    def lose_the_answer(number: int, when: str) -> None:
        kind, path = bucket.requests[number]
        if (kind, path[:18], path[-10:]) == ("put", "checkpoints/000001", MARKER) and when == "after":
            bucket.fault = lambda number, when: None
            raise ConnectionError("no answer")

    bucket.fault = lose_the_answer
    assert server.push(contribution(grant(server), INITIAL)).durable
    assert server.version == 0
    (first,) = folders(bucket, 1)
    server.tick()
    assert server.version == 1
    (second,) = folders(bucket, 1)
    assert second > first, "the first is removed"
    server.close()


def test_what_the_loser_of_a_race_for_the_lock_has_put_never_counts(folder: Path) -> None:
    """Both are of the same generation, and the loser wrote last, before it asked who owns the run."""
    bucket = Bucket()
    loser, _ = locks.take_over(bucket.storage, watch=0.0)
    winner = Claim("process 7 on elsewhere", "0123456789abcdef" * 2, loser.generation)
    bucket.storage.put(".lock", json.dumps(winner._asdict()).encode())
    (folder / "a").mkdir()
    good, bad = (Replica(bucket.storage, claim, folder / "a") for claim in (winner, loser))
    good.put_entry(0, b"good")
    good.append_ledger(0, b"good\n")
    bad.append_ledger(0, b"bad\n")
    with pytest.raises(LockLost):
        bad.put_entry(0, b"bad")
    claim, before = locks.take_over(bucket.storage, watch=0.0)
    assert before == winner
    (folder / "b").mkdir()
    pull(bucket.storage, folder / "b", claim, before)
    assert (folder / "b" / "journal" / "contribution-00000000.safetensors").read_bytes() == b"good"
    assert (folder / "b" / "ledger.jsonl").read_bytes() == b"good\n"
    assert len([name for name in bucket.names() if name.startswith("journal/")]) == 1, "the other is removed"


def test_who_has_lost_the_lock_writes_nothing(folder: Path) -> None:
    settings, bucket = config(mode="buffered", meta__batch_size=1), Bucket()
    server = launch(bucket, folder / "a", settings)
    lease, other = grant(server), grant(server, "w1", "i1")
    taken = launch(bucket, folder / "b", settings)
    before = dict(bucket.store)
    ack = server.push(contribution(lease, INITIAL))
    assert (ack.reason, ack.durable) == ("storage", False)
    assert "taken over by process" in server.alerts[-1] or server.alerts == taken.alerts
    extra = bucket.store.keys() - before.keys()
    assert all(name.startswith("/bucket/run/journal/") for name in extra), "of the generation before: it never counts"
    requests = len(bucket.requests)
    assert server.push(contribution(other, INITIAL)).reason == "storage"
    assert len(bucket.requests) == requests, "it does not even ask any more"
    assert not list((folder / "a" / "journal").glob("contribution-*"))
    assert server.version == 0

    work(taken)
    taken.close()
    server.close()
    after = launch(bucket, folder / "c", settings)
    assert ledger(folder / "c") == ledger(folder / "b")
    after.close()


def test_a_late_owner_does_not_get_between_a_checkpoint_and_its_marker(folder: Path) -> None:
    settings, bucket = config(mode="buffered", meta__batch_size=1), Bucket()
    server = launch(bucket, folder / "a", settings)
    lease = grant(server)
    puts: list[int] = []

    def take_over(number: int, when: str) -> None:
        if when == "after" and bucket.requests[number][0] == "put" and not puts:  # the journal's; the check comes next
            puts.append(number)
            bucket.fault = lambda number, when: None
            claim, _ = locks.take_over(bucket.storage, watch=0.0)
            assert claim.generation == 2

    bucket.fault = take_over
    assert server.push(contribution(lease, INITIAL)).reason == "storage"
    assert not any(name.startswith("checkpoints/000001") for name in bucket.names())
    server.close()


def test_a_late_owner_does_not_touch_the_checkpoints_of_the_next(folder: Path) -> None:
    bucket = Bucket()
    late, _ = locks.take_over(bucket.storage, watch=0.0)
    claim, _ = locks.take_over(bucket.storage, watch=0.0)
    files = dict.fromkeys(replica.FILES, b"good")
    Replica(bucket.storage, claim, folder).put_checkpoint(1, files)
    (good,) = folders(bucket, 1)
    with pytest.raises(LockLost):
        Replica(bucket.storage, late, folder).put_checkpoint(1, dict.fromkeys(replica.FILES, b"late"))
    assert bucket.storage.get(f"{good}/state.json") == b"good"
    (folder / "b").mkdir()
    claim, before = locks.take_over(bucket.storage, watch=0.0)
    pull(bucket.storage, folder / "b", claim, before)
    assert (folder / "b/checkpoints/000001/state.json").read_bytes() == b"good"
    Replica(bucket.storage, claim, folder / "b").catch_up()
    (own,) = folders(bucket, 1)
    assert own != good, "what others have put is removed when the launch has put its own"


def test_what_a_late_owner_removes_is_nothing_that_the_next_has_written(folder: Path) -> None:
    """It has listed what is incomplete, is stopped, and removes it after another launch has begun to work."""
    settings, bucket = config(mode="buffered", meta__batch_size=2, meta_updates=4), Bucket()

    def die_before_the_marker(number: int, when: str) -> None:
        kind, path = bucket.requests[number]
        if kind == "put" and path.endswith(MARKER):
            raise Killed

    bucket.fault = die_before_the_marker
    with pytest.raises(Killed):
        launch(bucket, folder / "a", settings)
    taken: list[Any] = []

    def take_over(number: int, when: str) -> None:
        kind, path = bucket.requests[number]
        if kind == "remove" and path.startswith("checkpoints/"):
            bucket.fault = lambda number, when: None
            taken.append(launch(bucket, folder / "c", settings))
            work_on(taken[0], 1)

    bucket.fault = take_over
    with pytest.raises(LockLost):
        launch(bucket, folder / "b", settings)
    (next_one,) = taken
    assert len(next_one._state.backlog.waiting) == 1
    next_one.close()
    after = launch(bucket, folder / "d", settings)
    assert not after.alerts
    assert len(after._state.backlog.waiting) == 1
    after.close()


def test_a_part_of_a_task_shows_that_it_was_drawn_though_its_lease_is_lost_with_the_machine(folder: Path) -> None:
    settings, bucket = config(**{**RUNS["stream"], "meta_updates": 5}), Bucket()
    first = launch(bucket, folder / "a", settings)
    leases = [grant(first, f"w{n}", f"i{n}") for n in range(3)]

    def no_checkpoint(after: int) -> Callable[[int, str], None]:
        def fault(number: int, when: str) -> None:
            path = bucket.requests[number][1]
            if path.startswith("checkpoints/") and path[12:18] > f"{after:06d}":
                raise ConnectionError("no answer")

        return fault

    bucket.fault = no_checkpoint(0)
    for lease in leases[1:]:
        assert first.push(contribution(lease, INITIAL, final=False)).durable
    assert first.version == 0
    first.close()
    bucket.fault = no_checkpoint(1)
    second = launch(bucket, folder / "b", settings)
    assert (second.version, len(second._state.backlog.waiting)) == (1, 1)
    second.close()
    bucket.fault = lambda number, when: None
    third = launch(bucket, folder / "c", settings)
    work(third)
    third.close()
    finals = sorted(line["task"] for line in ledger(folder / "c") if line["final"])
    assert finals == list(range(settings.total_tasks))


def test_a_server_that_is_restarted_goes_on_from_its_working_copy_and_puts_what_is_missing(folder: Path) -> None:
    settings, bucket = config(**RUNS["sync"]), Bucket()
    (folder / "a").mkdir()
    claim, before = locks.take_over(bucket.storage, watch=0.0)
    pull(bucket.storage, folder / "a", claim, before)
    server = serve(folder / "a", settings, replica=Replica(bucket.storage, claim, folder / "a"))
    lease = grant(server)
    bucket.fault = kill(len(bucket.requests), when="before")
    done = contribution(lease, INITIAL)
    with pytest.raises(Killed):
        server.push(done)
    server.close()
    bucket.fault = lambda number, when: None
    assert not any(name.startswith("journal/") for name in bucket.names())
    restarted = serve(folder / "a", settings, replica=Replica(bucket.storage, claim, folder / "a"))
    assert any(name.startswith("journal/contribution-00000000.") for name in bucket.names())
    assert restarted.push(done).reason == "duplicate"
    restarted.close()


def test_lost_records_of_leases_cost_another_turn_of_their_tasks_and_nothing_else(folder: Path) -> None:
    settings, bucket = config(**RUNS["sync"]), Bucket()
    server = launch(bucket, folder / "a", settings)
    lease = grant(server)
    assert list((folder / "a" / "journal").glob("lease-*"))
    assert not any("lease" in name for name in bucket.names())
    server.close()
    after = launch(bucket, folder / "b", settings, "another")
    assert after.push(contribution(lease, INITIAL)).reason == "unknown-lease"
    assert grant(after).task == lease.task
    work(after, "w0")
    assert [line["task"] for line in ledger(folder / "b")] == list(range(settings.total_tasks))
    after.close()


def test_segments_of_the_ledger_are_merged_when_there_are_many(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replica, "MOST_SEGMENTS", 4)
    settings, bucket = config(mode="async", meta_updates=21, meta__batch_size=1), Bucket()
    server = launch(bucket, folder / "a", settings)
    work(server)
    server.close()
    segments = sum(name.startswith("ledger/") for name in bucket.names())
    assert segments <= 1 + 21 // 4 + 3, "the first one, merged ones, and the last ones"
    after = launch(bucket, folder / "b", settings)
    assert ledger(folder / "b") == ledger(folder / "a")
    assert len(ledger(folder / "b")) == 21
    after.close()


@pytest.mark.parametrize("launches", [1, 2])
def test_each_byte_of_the_ledger_is_uploaded_less_than_three_times(
    folder: Path, monkeypatch: pytest.MonkeyPatch, launches: int
) -> None:
    """Over 100,000 contributions, from the first append to the end of the launch."""
    count, line = 100_000, b'{"task": 12345}' + b" " * 200 + b"\n"
    uploaded = 0
    bucket = Bucket()
    storage = bucket.storage
    monkeypatch.setattr(storage, "_call", lambda name, call, size: call(f"/bucket/run/{name}".rstrip("/")))  # no thread
    put = storage._put

    def count_bytes(path: str, data: bytes) -> None:
        nonlocal uploaded
        uploaded += len(data) * ("ledger" in path)
        put(path, data)

    monkeypatch.setattr(storage, "_put", count_bytes)
    for number in range(launches):
        working_copy = folder / str(number)
        working_copy.mkdir()
        claim, before = locks.take_over(storage, watch=0.0)
        pull(storage, working_copy, claim, before)
        ours = Replica(storage, claim, working_copy)
        ours.catch_up()
        with (working_copy / "ledger.jsonl").open("ab") as file:
            for _ in range(count // launches):
                start = file.tell()
                file.write(line)
                file.flush()
                ours.append_ledger(start, line)
        assert sum(name.startswith("ledger/") for name in bucket.names()) < 700
        replica.put_whole_ledger(storage, working_copy, claim)
    written = count * len(line)
    assert uploaded < 3 * written
    (folder / "last").mkdir()
    replica.write_ledger(storage, folder / "last", storage.names(), locks.read_claim(storage))
    assert (folder / "last" / "ledger.jsonl").read_bytes() == line * count


def test_a_run_that_was_copied_into_the_bucket_is_gone_on_with(folder: Path) -> None:
    settings, bucket = config(mode="buffered", meta__batch_size=2), Bucket()
    server = serve(folder / "plain", settings)
    lease = grant(server)
    assert server.push(contribution(lease, INITIAL)).durable
    server.close()
    for path in (folder / "plain").rglob("*"):
        if path.is_file():
            bucket.storage.put(path.relative_to(folder / "plain").as_posix(), path.read_bytes())
    after = launch(bucket, folder / "b", settings)
    assert [a.lease.id for a in after._state.backlog.waiting] == [lease.id]
    after.close()


def test_names_that_lead_elsewhere_are_not_pulled(folder: Path) -> None:
    bucket = Bucket()
    for name in ("../evil", "tensorboard/../../evil", "/etc/evil", "elsewhere/evil", ".hidden", "tensorboard/a*b"):
        bucket.store[f"/bucket/run/{name}"] = MemoryFile(bucket, name, b"evil")
    bucket.storage.put("tensorboard/server/events.out.tfevents.1.host.2.0", b"good")
    assert len(bucket.find("/bucket/run")) == 7
    claim, before = locks.take_over(bucket.storage, watch=0.0)
    (folder / "a").mkdir()
    pull(bucket.storage, folder / "a", claim, before)
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    assert found == ["a/tensorboard/server/events.out.tfevents.1.host.2.0"]


def test_a_lock_is_watched_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket, said = Bucket(), []
    claim, _ = locks.take_over(bucket.storage, watch=0.0)
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.0)
    count = 0

    def alive(number: int, when: str) -> None:
        nonlocal count
        if when == "before" and bucket.requests[number] == ("get", "summary.json") and count < 3:
            count += 1
            bucket.fault = lambda number, when: None
            locks.beat(bucket.storage, claim, count)
            bucket.fault = alive

    bucket.fault = alive
    with pytest.raises(RunDirectoryBusy, match=r"is in use \(process \d+ on "):
        locks.take_over(bucket.storage, watch=0.4, warn=said.append)
    assert len(said) == 1
    locks.check(bucket.storage, claim)
    bucket.fault = lambda number, when: None
    second, before = locks.take_over(bucket.storage, watch=0.1)
    assert (before, second.generation) == (claim, 2)
    with pytest.raises(LockLost, match="taken over by process"):
        locks.check(bucket.storage, claim)
    locks.beat(bucket.storage, second, -1, released=True)
    said.clear()
    third, _ = locks.take_over(bucket.storage, watch=60.0, warn=said.append)
    assert third.generation == 3
    assert not said, "what was given back is taken at once"


def test_two_launches_that_take_over_at_the_same_moment_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket = Bucket()
    monkeypatch.setattr(locks, "SETTLE_SECONDS", 0.0)
    others = []

    def meanwhile(number: int, when: str) -> None:
        if bucket.requests[number] == ("put", ".lock") and when == "after":
            bucket.fault = lambda number, when: None
            others.append(locks.take_over(bucket.storage, watch=0.0)[0])

    bucket.fault = meanwhile
    with pytest.raises(RunDirectoryBusy, match="has just been taken over"):
        locks.take_over(bucket.storage, watch=0.0)
    locks.check(bucket.storage, others[0])
    assert others[0].generation == 2


def test_a_lock_that_somebody_removed_does_not_let_old_attempts_win(folder: Path) -> None:
    settings, bucket = config(mode="buffered", meta__batch_size=2), Bucket()
    for name in ("a", "b"):
        server = launch(bucket, folder / name, settings)
        server.close()
    assert server.push(contribution(grant(server), INITIAL)).durable
    bucket.storage.remove([".lock"])
    claim, before = locks.take_over(bucket.storage, watch=0.0)
    assert (before, claim.generation) == (None, 3)

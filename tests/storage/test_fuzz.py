"""Damaged input at every edge: refused in the documented way, or read as it was written; nothing executed, ever.

Each loader gets as many inputs as `LOADERS` says, from a seeded generator: what fails once fails again. An input that
is taken must give what was saved, bit for bit, or an older valid state with an alert. `Wrong` says that it did not;
any exception that is not documented counts as a traceback at the user.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import io
import json
import logging
import os
import pickle
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from kinds import FEWER, complete
from protocol import INITIAL, Clock, Worker, fast_folder, ledger, serve
from protocol import config as small_config

from leap_dist.cli import commands
from leap_dist.cli import main as command_line
from leap_dist.config import loading as configuration
from leap_dist.config import registry
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver import driver
from leap_dist.protocol.messages import Ack, Contribution
from leap_dist.server.leases import LeaseBook
from leap_dist.storage import manifest, run_directory
from leap_dist.storage.atomic import CorruptFile, pack, unpack
from leap_dist.storage.checkpoint import CheckpointStore
from leap_dist.storage.journal import Journal
from leap_dist.storage.ledger import Ledger
from leap_dist.telemetry import tensorboard
from leap_dist.telemetry.projection import Projection

Rng = np.random.Generator
Case = Callable[[Rng, int], None]
ENOUGH = 20_000
MOST_SECONDS = 20.0  # of processor time for one input; they take milliseconds
MOST_BYTES = 512 * 2**20  # that memory may grow while a loader gets all its inputs


class Wrong(Exception):
    """An input was taken for what it is not, or something was lost or destroyed."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Wrong(what)


# --- damage ---------------------------------------------------------------------------------------------------------


class Canary:
    """A pickle that makes a folder where it is read."""

    def __reduce__(self):
        return (os.mkdir, (os.environ["LEAP_TEST_CANARY"],))


def pick(rng: Rng, items: Any) -> Any:
    return items[int(rng.integers(len(items)))]


def _flip(data: bytes, rng: Rng) -> bytes:
    changed = bytearray(data)
    for _ in range(int(rng.integers(1, 4)) if rng.random() < 0.3 else 1):
        changed[int(rng.integers(len(changed)))] ^= 1 << int(rng.integers(8))
    return bytes(changed)


def _cut(data: bytes, rng: Rng) -> bytes:
    return data[: int(rng.integers(len(data)))]


def _block(data: bytes, rng: Rng) -> tuple[int, int]:
    start = int(rng.integers(len(data)))
    return start, min(len(data), start + int(2 ** rng.uniform(0, 10)))


def _insert(data: bytes, rng: Rng) -> bytes:
    at = int(rng.integers(len(data) + 1))
    return data[:at] + rng.bytes(int(rng.integers(1, 30))) + data[at:]


def _delete(data: bytes, rng: Rng) -> bytes:
    start, stop = _block(data, rng)
    return data[:start] + data[stop:]


def _duplicate(data: bytes, rng: Rng) -> bytes:
    start, stop = _block(data, rng)
    return data[:stop] + data[start:stop] + data[stop:]


def _zeros(data: bytes, rng: Rng) -> bytes:
    start, stop = _block(data, rng)
    return data[:start] + bytes(stop - start) + data[stop:]


def _garbage(data: bytes, rng: Rng) -> bytes:
    return rng.bytes(int(rng.integers(1, 400)))


def _length(data: bytes, rng: Rng) -> bytes:
    """A safetensors file starts with the length of its header."""
    return (
        int(pick(rng, (0, 1, len(data), len(data) - 8, 10**8, 2**31, 2**63, 2**64 - 1))).to_bytes(8, "little")
        + data[8:]
    )


def _digits(data: bytes, rng: Rng) -> bytes:
    """One digit becomes a number that is none of its kind."""
    places = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return data + b"0"
    at = pick(rng, places)
    return (
        data[:at] + pick(rng, (b"1e400", b"NaN", b"-Infinity", b"9" * 400, b"9" * 5000, b"-1", b"0.5")) + data[at + 1 :]
    )


def _deep(data: bytes, rng: Rng) -> bytes:
    return pick(rng, (b"[", b'{"a":', b"{a: ", b"- ")) * int(pick(rng, (40, 1000, 100_000)))


def _line(data: bytes, rng: Rng) -> bytes:
    """A line, or what a comma ends, comes twice."""
    mark = b"\n" if b"\n" in data[:-1] else b","
    parts = data.split(mark)
    at = int(rng.integers(len(parts)))
    return mark.join([*parts[: at + 1], *parts[at:]])


BYTES = (
    _flip,
    _flip,
    _flip,
    _cut,
    _cut,
    _insert,
    _delete,
    _duplicate,
    _zeros,
    _garbage,
    _length,
    _digits,
    _deep,
    _line,
)
WHOLE = (
    b"",
    b"\n",
    b"null",
    b"[]",
    b"{}",
    b"0",
    b"NaN",
    b'"\\ud800"',
    b"\xff\xfe\x00",
    b'{"format": Infinity, "sha256": ""}',
    b'{"format": 1e400, "sha256": 0}',
    b'{"a": 1, "a": 2}',
    b"!!python/object/apply:os.mkdir [%s]",
    b"seed: !!python/object/apply:os.mkdir [%s]",
    b"!!python/name:os.system",
    b"a: &a [*a]",
)


def damage(data: bytes, rng: Rng, others: tuple[bytes, ...] = ()) -> bytes:
    """`data` after something has happened to it; never the same."""
    while True:
        kind = int(rng.integers(len(BYTES) + 3))
        if kind < len(BYTES) and data:
            changed = BYTES[kind](data, rng)
        elif kind == len(BYTES) and others:
            changed = pick(rng, others)
        elif kind == len(BYTES) + 1:
            changed = pickle.dumps(Canary())
        else:
            changed = pick(rng, WHOLE).replace(b"%s", os.environ["LEAP_TEST_CANARY"].encode())
        if changed != data:
            return changed


ODD = (
    None,
    True,
    -1,
    0,
    10**30,
    10**18,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    "../x",
    "\ud800",
    [],
    [[]],
    {},
    {"a": 1},
    [None],
)


def positions(value: Any) -> list[list[Any]]:
    """The path to everything inside plain data."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    found: list[list[Any]] = []
    for name, inner in items:
        found += [[name], *([name, *rest] for rest in positions(inner))]
    return found


def mangle(value: Any, rng: Rng) -> Any:
    """Plain data with one place changed: a wrong type or number, something missing, something more. Never the same."""
    while True:
        changed = copy.deepcopy(value)
        *path, last = pick(rng, positions(changed))
        inner = changed
        for name in path:
            inner = inner[name]
        kind = rng.random()
        if kind < 0.2:
            del inner[last]
        elif kind < 0.3 and isinstance(inner, dict):
            inner[pick(rng, ("extra", "", "../x"))] = pick(rng, ODD)
        elif kind < 0.4 and isinstance(inner, list):
            inner.insert(int(rng.integers(len(inner) + 1)), pick(rng, ODD))
        else:
            inner[last] = copy.deepcopy(pick(rng, ODD))
        if json.dumps(changed) != json.dumps(value):
            return changed


def replaced(path: Path, rng: Rng, elsewhere: Path) -> str:
    """Puts something in place of a file or a folder that is none. The content of a link is good. Says what it did."""
    kind = pick(rng, ("link", "dangling", "folder", "pipe", "missing"))
    elsewhere.mkdir(parents=True, exist_ok=True)
    os.replace(path, elsewhere / path.name)
    if kind == "link":
        path.symlink_to(elsewhere / path.name)
    elif kind == "dangling":
        path.symlink_to(elsewhere / "nothing")
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    return str(kind)


# --- runs -----------------------------------------------------------------------------------------------------------

RUNS: dict[str, dict[str, Any]] = {
    "sync": {"mode": "sync", "meta_updates": 4, "meta__batch_size": 2},
    "buffered": {"mode": "buffered", "meta_updates": 4, "meta__batch_size": 2, "meta__optimizer": "adam"},
    "async": {"mode": "async", "meta_updates": 4, "meta__batch_size": 2},
    "fedasync": {"mode": "fedasync", "meta_learner": "reptile", "meta_updates": 4, "meta__batch_size": 2},
    "stream": {"mode": "stream", "meta_updates": 2, "meta__batch_size": 3, "meta__optimizer": "adam"},
    "buffered-heads": {"mode": "buffered", "meta_updates": 4, "meta__batch_size": 2, "meta_learner": "finetune-multi"},
    "stream-heads": {"mode": "stream", "meta_updates": 2, "meta__batch_size": 3, "meta_learner": "finetune-multi"},
    "stream-int8": {"mode": "stream", "meta_updates": 2, "meta__batch_size": 3, "worker__wire": "int8"},
    "buffered-int16": {"mode": "buffered", "meta_updates": 4, "meta__batch_size": 2, "worker__wire": "int16"},
}
TURNS = (4, 9, 14)


class Run(NamedTuple):
    """A run stopped in its middle: what is on disk, who works, what was acknowledged, and how it would have ended."""

    settings: Config
    files: dict[str, bytes]
    workers: list[Worker]
    turn: int
    acknowledged: dict[str, int]
    """By lease, the highest seq that the server called durable."""
    end: tuple[np.ndarray, list[dict[str, Any]]]


def on_disk(folder: Path) -> dict[str, bytes]:
    """Content of each file by its name; what is not a file is told by its kind."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = b"link " + os.readlink(path).encode()
        elif path.is_file():
            found[name] = path.read_bytes()
        elif path.is_fifo():
            found[name] = b"pipe"
    return found


def lay_out(files: dict[str, bytes], folder: Path) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def go_on(server: Any, workers: list[Worker], turn: int, acknowledged: dict[str, int], turns: int = 300) -> int:
    """Lets workers step in turn and notes what is acknowledged as durable, by lease."""
    for _ in range(turns):
        if server.finished:
            break
        worker = workers[turn % len(workers)]
        answer, turn = worker.step(server), turn + 1
        if isinstance(answer, Ack) and answer.durable:
            acknowledged[worker.pushed.lease] = max(acknowledged.get(worker.pushed.lease, 0), worker.pushed.seq)
    return turn


@pytest.fixture(scope="module")
def runs() -> Iterator[dict[str, list[Run]]]:
    made: dict[str, list[Run]] = {}
    with fast_folder() as folder:
        for name, changes in RUNS.items():
            settings = small_config(**changes)
            for turns in TURNS:
                run_dir, acknowledged = folder / f"{name}-{turns}", {}
                run_dir.mkdir()
                (run_dir / "config.yaml").write_text(configuration.to_yaml(settings))
                pushes = (
                    (lambda task: 2 + task.index % 2)
                    if settings.mode == "stream"
                    else (lambda task: 1 + task.index % 2)
                )
                workers = [Worker(settings, f"w{i}", pushes) for i in range(2 + (settings.mode != "stream"))]
                server = serve(run_dir, settings)
                turn = go_on(server, workers, 0, acknowledged, turns)
                files, now = on_disk(run_dir), copy.deepcopy(workers)
                known = dict(acknowledged)
                go_on(server, workers, turn, acknowledged)
                server.close()
                end = server.snapshot()[1], ledger(run_dir)
                made.setdefault(name, []).append(Run(settings, files, now, turn, known, end))
        yield made


# --- single files ---------------------------------------------------------------------------------------------------


def resign(state: dict[str, Any]) -> dict[str, Any]:
    """Plain data with a checksum that holds."""
    state = {name: value for name, value in state.items() if name != "sha256"}
    return {**state, "sha256": hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()}


def fuzz_packed(folder: Path, runs: dict[str, list[Run]]) -> Case:
    run = runs["stream-heads"][1]
    samples = tuple(data for name, data in run.files.items() if name.endswith(".safetensors"))
    contents = [unpack(data, "good") for data in samples]

    def case(rng: Rng, number: int) -> None:
        data = damage(pick(rng, samples), rng, samples)
        with contextlib.suppress(CorruptFile):
            tensors, header = unpack(data, "bad")
            for other, same in contents:
                same_names = same == header and other.keys() == tensors.keys()
                if same_names and all(np.array_equal(tensors[n], other[n]) for n in tensors):
                    return
            raise Wrong("content that nobody packed")

    return case


def fuzz_packed_header(folder: Path, runs: dict[str, list[Run]]) -> Case:
    """The header of a safetensors file, as JSON, with one place changed."""
    samples = [pack({"vector": INITIAL, "more": INITIAL[:1]}, {"a": [1, {"b": None}]}), pack({}, {})]

    def case(rng: Rng, number: int) -> None:
        data = pick(rng, samples)
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        if rng.random() < 0.5:
            header = mangle(header, rng)
        else:
            entry = json.loads(header["__metadata__"]["leap_dist"])
            header["__metadata__"]["leap_dist"] = json.dumps(mangle(entry, rng))
            if rng.random() < 0.2:
                header["__metadata__"]["leap_dist"] = "[" * 100_000
        text = json.dumps(header).encode()
        with contextlib.suppress(CorruptFile):
            tensors, found = unpack(len(text).to_bytes(8, "little") + text + data[8 + length :], "bad")
            wanted, same = unpack(data, "good")
            require(found == same and tensors.keys() == wanted.keys(), "another header")
            require(all(np.array_equal(tensors[n], wanted[n]) for n in wanted), "other tensors")

    return case


def fuzz_checkpoints(folder: Path, runs: dict[str, list[Run]]) -> Case:
    """One file of one checkpoint, byte by byte or as JSON with a checksum that holds."""
    run = runs["buffered-heads"][2]
    files = {n: d for n, d in run.files.items() if n.startswith("checkpoints/")}
    store = CheckpointStore(lay_out(files, folder) / "checkpoints", 3)
    before = {version: store._load(version) for version in store.versions()}
    newest = max(before)
    here = folder / "checkpoints" / f"{newest:06d}"

    def case(rng: Rng, number: int) -> None:
        name = pick(rng, [n for n in files if Path(n).parent.name == here.name])
        data = damage(files[name], rng, tuple(files.values()))
        if name.endswith("state.json") and rng.random() < 0.3:
            data = json.dumps(mangle(json.loads(files[name]), rng)).encode()
        (folder / name).write_bytes(data)
        with contextlib.suppress(CorruptFile):
            found, warnings = store.load_newest()
            require(found is not None, "no checkpoint, though two are whole")
            require(found.version == newest or warnings, "an older one without a warning")
            same = before[found.version]
            require(found.state == same.state, "another state")
            for mine, other in ((found.init, same.init), (found.heads, same.heads), (found.optimizer, same.optimizer)):
                require(mine.keys() == other.keys(), "other tensors")
                require(all(np.array_equal(mine[n], other[n]) for n in mine), "other tensors")
        for aside in (folder / "checkpoints").glob("*.damaged*"):
            require(not here.exists(), "set aside, and still there")
            os.replace(aside, here)
        (folder / name).write_bytes(files[name])

    return case


def fuzz_journal(folder: Path, runs: dict[str, list[Run]]) -> Case:
    run = runs["stream-heads"][1]
    files = {n: d for n, d in run.files.items() if n.startswith("journal/contribution")}
    journal = Journal(lay_out(files, folder) / "journal")
    contents = {order: journal.read(order) for order in journal.orders()}

    def case(rng: Rng, number: int) -> None:
        order = pick(rng, list(contents))
        name = f"journal/contribution-{order:08d}.safetensors"
        (folder / name).write_bytes(damage(files[name], rng, tuple(files.values())))
        try:
            with contextlib.suppress(CorruptFile):
                arrays, header = journal.read(order)
                wanted, same = contents[order]
                require(header == same and arrays.keys() == wanted.keys(), "another entry")
                require(all(np.array_equal(arrays[n], wanted[n]) for n in wanted), "other arrays")
        finally:
            (folder / name).write_bytes(files[name])

    return case


def fuzz_contributions(folder: Path, runs: dict[str, list[Run]]) -> Case:
    """Header and arrays as they come over the wire, packed or not, with one part changed."""
    files = [d for name in RUNS for n, d in runs[name][1].files.items() if n.startswith("journal/contribution")]
    samples = [(arrays, header["contribution"]) for arrays, header in (unpack(data, "good") for data in files)]
    others = [array for arrays, _ in samples for array in arrays.values()]
    kinds = (np.float32, np.float64, np.int8, np.int16, np.int64, np.uint8, np.bool_, ">i2", "S3", object)

    def case(rng: Rng, number: int) -> None:
        arrays, header = (dict(part) for part in pick(rng, samples))
        name, kind = pick(rng, list(arrays)), rng.random()
        if kind < 0.3:
            header = mangle(header, rng)
        elif kind < 0.5:
            arrays[name] = arrays[name].astype(pick(rng, kinds))
        elif kind < 0.7:
            arrays[name] = pick(rng, (arrays[name][:-1], arrays[name][None], arrays[name].repeat(40), arrays[name][:0]))
        elif kind < 0.8:
            del arrays[name]
        else:
            arrays[pick(rng, ("vector", "start", "codes", "scales", "packed", "x"))] = pick(rng, others)
        with contextlib.suppress(ValueError):
            found = Contribution.from_parts(header, arrays)
            require(found.arrays().keys() == arrays.keys() - ({"start"} if found.packed else set()), "other arrays")
            require(all(found.arrays()[n] is arrays[n] for n in arrays), "other arrays")
            require(found.packed is None or found.vector.dtype == np.float32, "no vector")
            require(found.packed is None or found.vector.shape == found.packed.codes.shape, "another length")

    return case


def fuzz_leases(folder: Path, runs: dict[str, list[Run]]) -> Case:
    files = {n: d for run in runs["buffered-heads"] for n, d in run.files.items() if n.startswith("journal/lease")}
    files = dict(list(files.items())[:3])

    def book(where: Path) -> tuple[LeaseBook, list[str]]:
        made = LeaseBook(Journal(where / "journal"), "s", Clock())
        answer: Any = made.reopen(lambda index: True)
        return made, answer[2] if len(answer) > 2 else []

    good = {held.lease.id: held.lease for held in book(lay_out(files, folder / "good"))[0].all()}
    assert len(good) == 3

    def case(rng: Rng, number: int) -> None:
        where, name = lay_out(files, folder / str(number)), pick(rng, list(files))
        data = json.loads(files[name])
        kind = rng.random()
        if kind < 0.4:
            text = damage(files[name], rng, tuple(files.values()))
        elif kind < 0.7:
            text = json.dumps(mangle(data, rng)).encode()
        else:
            text = json.dumps(resign(mangle(data, rng))).encode()
        (where / name).write_bytes(text)
        if rng.random() < 0.1:
            (where / name).unlink()
            replaced_by = pick(rng, ("../../x", "a/b", "..", "lease-\udcff.json", "lease-.json"))
            with contextlib.suppress(OSError):
                (where / "journal" / f"lease-{replaced_by}.json").write_bytes(text)
        found, warnings = book(where)
        for held in found.all():
            require(held.lease.id in good, "a lease that nobody granted")
            require(held.lease == good[held.lease.id] or kind >= 0.7, "another lease")
        require(len(found) >= 2, "a sound one is lost")
        require(len(found) == 3 or warnings or not (where / name).exists(), "a lease is lost without a warning")
        shutil.rmtree(where)

    return case


def fuzz_ledger(folder: Path, runs: dict[str, list[Run]]) -> Case:
    """Read back, projected to TensorBoard: a damaged line is left out, all others are as they were."""
    text = runs["async"][2].files["ledger.jsonl"]
    lines = [json.loads(line) for line in text.splitlines()]

    def case(rng: Rng, number: int) -> None:
        kind = rng.random()
        if kind < 0.5:
            data = damage(text, rng, (b"\n" * 5, b"[1]\n"))
        else:
            at = int(rng.integers(len(lines)))
            changed = [*lines[:at], mangle(lines[at], rng), *lines[at + 1 :]]
            data = "".join(json.dumps(line) + "\n" for line in changed).encode()
        (folder / "ledger.jsonl").write_bytes(data)
        found, offset = Ledger(folder / "ledger.jsonl").read_page(0)
        require(offset <= len(data), "an offset beyond the file")
        require(kind < 0.5 or len(found) >= len(lines) - 1, "sound lines are lost")
        for event in Projection().events(found):
            require(event.run == "server" or event.run.removeprefix("game/").isidentifier(), f"a folder {event.run!r}")
        report_tasks(found)

    return case


def report_tasks(lines: list[dict[str, Any]]) -> None:
    """What the picture makes of lines, but for the drawing."""
    for line in lines:
        if line["final"]:
            _ = line["game"], line["version_after"], line["path"]["length"] > 0
            registry.for_ledger([line]).task_score(line["curve"])


def fuzz_pictures(folder: Path, runs: dict[str, list[Run]]) -> Case:
    """`plot`, drawing and all."""
    lines = [json.loads(line) for line in runs["async"][2].files["ledger.jsonl"].splitlines()]
    run_directory.prepare(folder / "run", small_config())

    def case(rng: Rng, number: int) -> None:
        changed = [mangle(line, rng) if rng.random() < 0.3 else line for line in lines]
        (folder / "run" / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changed))
        code, output = command("plot", "--run-dir", str(folder / "run"))
        require(code in (0, 2), f"exit code {code}: {output}")

    return case


def fuzz_events(folder: Path, runs: dict[str, list[Run]]) -> Case:
    """TensorBoard's files: a damaged record ends its file, so that only steps are known that were written."""
    lines = [json.loads(line) for line in runs["async"][2].files["ledger.jsonl"].splitlines()][:3]
    board = tensorboard.TensorBoard(folder)
    board._pending += Projection().events(lines)
    board.close()
    files = {path: path.read_bytes() for path in folder.rglob("events.*")}
    whole = tensorboard.TensorBoard(folder)
    last: Counter[str] = Counter()
    for steps in whole._last.values():
        last |= Counter(steps)

    def case(rng: Rng, number: int) -> None:
        path = pick(rng, list(files))
        path.write_bytes(damage(files[path], rng, tuple(files.values())))
        try:
            again = tensorboard.TensorBoard(folder)
            for steps in again._last.values():
                for tag, step in steps.items():
                    require(step <= last[tag], f"step {step} of {tag} was never written")
        finally:
            path.write_bytes(files[path])

    return case


def fuzz_summary(folder: Path, runs: dict[str, list[Run]]) -> Case:
    """`status`, as table and as JSON."""
    lease = {
        "worker": "w0",
        "game": "pong",
        "steps": 3,
        "steps_wanted": 9,
        "seconds": 1.0,
        "curve": [],
        "silent_seconds": 0.1,
    }
    summary = {
        "state": "running", "preset": "smoke", "mode": "sync", "meta_learner": "leap", "updated": 1.0, "tasks": 1,
        "tasks_wanted": 4, "meta_updates": 1, "agent_steps": 5, "steps_per_second": 1.0, "wall_seconds": 2.0,
        "eta_seconds": None, "refused": {"stale": 1}, "contributions_applied": 1, "contributions_waiting": 0,
        "workers_alive": 1, "workers_wanted": 2, "restarts": 0, "quarantined": ["pong"], "alerts": ["a"],
        "leases": [{**lease, "curve": [{"score": 1.0}]}, lease], "workers": [{"name": "w0", "state": "running"}],
    }  # fmt: skip
    text = json.dumps(summary).encode()
    run_directory.prepare(folder, small_config())

    def case(rng: Rng, number: int) -> None:
        data = damage(text, rng) if rng.random() < 0.5 else json.dumps(mangle(summary, rng)).encode()
        (folder / "summary.json").write_bytes(data)
        more = ["--json"] if rng.random() < 0.5 else []
        code, output = command("status", "--run-dir", str(folder), *more)
        require(code in (0, 2), f"exit code {code}: {output}")
        require(run_directory.wall_seconds(folder) >= 0, "time that never was")

    return case


def fuzz_manifest(folder: Path, runs: dict[str, list[Run]]) -> Case:
    """Of versions that are not those of now: a warning for each, or that nothing is known."""
    run_directory.prepare(folder, small_config())
    text = (folder / "manifest.json").read_bytes()
    assert manifest.changed_packages(folder) == []

    def case(rng: Rng, number: int) -> None:
        data = damage(text, rng) if rng.random() < 0.5 else json.dumps(mangle(json.loads(text), rng)).encode()
        (folder / "manifest.json").write_bytes(data)
        found = manifest.changed_packages(folder)
        require(all("\n" not in line and len(line) < 200 for line in found), "more than a line")
        with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
            content = json.loads(data)
            packages = (content.get("sessions") or [content])[-1]["packages"]
            same = json.loads(text)["packages"]
            changed = [n for n in same if n in packages and packages[n] != same[n]]
            require(found or not changed, "other versions without a warning")

    return case


# --- configuration and command line ---------------------------------------------------------------------------------


def command(*arguments: str) -> tuple[int, str]:
    """Exit code and errors of `leap-dist`: one line where it is 2."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "train", lambda *_, **__: pytest.fail("training began"))

        def only_resolved(parsed: Any) -> int:
            commands.training(parsed)
            return 0

        patch.setattr(command_line, "train", only_resolved)
        try:
            code = command_line.main(list(arguments))
        except SystemExit as stopped:
            code = int(stopped.code or 0)
    if code == 2:
        text = err.getvalue()
        lines = [line for line in text.splitlines() if not line.startswith("leap-dist: warning: ")]
        require(len(lines) == 1 and lines[0].startswith("leap-dist: error: "), f"not one line: {text[:300]!r}")
    return code, err.getvalue()


def fuzz_config_on_resume(folder: Path, runs: dict[str, list[Run]]) -> Case:
    """config.yaml of a run: what is learned cannot become something else."""
    run = runs["buffered"][1]
    text = run.files["config.yaml"]
    tree = yaml.safe_load(text)

    def case(rng: Rng, number: int) -> None:
        where = folder / str(number)
        where.mkdir()
        data = damage(text, rng) if rng.random() < 0.6 else yaml.safe_dump(mangle(tree, rng), sort_keys=False).encode()
        (where / "config.yaml").write_bytes(data)
        try:
            loaded = run_directory.load_config(where, {})
        except ConfigError as error:
            require("\n" not in str(error) and len(str(error)) < 1000, "more than a line")
        else:
            if configuration.incompatibilities(run.settings, loaded):
                lay_out({n: d for n, d in run.files.items() if n != "config.yaml"}, where)
                try:
                    serve(where, loaded).close()
                except CorruptFile:
                    pass
                else:
                    raise Wrong("; ".join(configuration.incompatibilities(run.settings, loaded)))
        shutil.rmtree(where)

    return case


def fuzz_config_file(folder: Path, runs: dict[str, list[Run]]) -> Case:
    """A file with settings, and flags over it, through the command line."""
    names = [name for name, _, _ in configuration.fields()]
    words = (
        *("1", "0", "-1", "1e400", "nan", "inf", "0x10", "1_000", "true", "yes", "no", "~", "[]", "{}", "[1, [2]]"),
        *("''", "' '", "9" * 5000, "pong", "pong,freeway", "seed24", "../x", "sync", "stream", "none", "adam", "sgd"),
        *("&a [*a]", "*a", "!!int x", "2026-13-45", "!!binary x", "<<: 3", "\x00", "\x85", "é", "\U0001f600"),
        *("!!python/object/apply:os.getcwd []", "a" * 3000, "-", "--", "'"),
    )  # fmt: skip

    def case(rng: Rng, number: int) -> None:
        lines = []
        for _ in range(int(rng.integers(0, 4))):
            name = pick(rng, names) if rng.random() < 0.8 else pick(rng, words)
            section, _, leaf = name.partition(".")
            value = pick(rng, words)
            lines.append(f"{section}: {{{leaf}: {value}}}" if leaf and rng.random() < 0.5 else f"{name}: {value}")
        (folder / "c.yaml").write_text("\n".join(lines), encoding="utf-8")
        flags: list[str] = []
        for _ in range(int(rng.integers(0, 3))):
            flags += [f"--{pick(rng, names).replace('_', '-')}", pick(rng, words).replace("\x00", "")]
        if rng.random() < 0.2:
            flags.append(pick(rng, words).replace("\x00", ""))
        file = pick(rng, (folder / "c.yaml", folder, folder / "none.yaml")) if rng.random() < 0.1 else folder / "c.yaml"
        code, output = command("train", "--config", str(file), "--run-dir", str(folder / "new"), *flags)
        require(code in (0, 2), f"exit code {code}: {output}")

    return case


def fuzz_resume(folder: Path, runs: dict[str, list[Run]]) -> Case:
    """`train --resume` on a folder in which something else has taken a file's place."""
    run_directory.prepare(folder / "good", small_config())
    files = on_disk(folder / "good")

    def case(rng: Rng, number: int) -> None:
        where = lay_out(files, folder / str(number))
        path = where / pick(rng, ("config.yaml", "manifest.json"))
        kind = replaced(path, rng, folder / "elsewhere") if rng.random() < 0.5 else ""
        if kind == "pipe":  # whoever can do that to a configuration may as well stop the process
            path.unlink()
        if not kind:
            path.write_bytes(damage(files[path.name], rng, tuple(files.values())))
        code, output = command("train", "--resume", "--run-dir", str(where))
        require(code in (0, 2), f"exit code {code}: {output}")
        shutil.rmtree(where)

    return case


# --- the server -----------------------------------------------------------------------------------------------------


def held_only_in(run: Run, name: str) -> str | None:
    """The lease of a journal entry, None of any other file."""
    if not name.startswith("journal/contribution"):
        return None
    return str(unpack(run.files[name], name)[1]["lease"]["id"])


def fuzz_server(folder: Path, runs: dict[str, list[Run]]) -> Case:
    """One file of a run directory, or two, and then the run to its end."""
    names = list(runs)

    def case(rng: Rng, number: int) -> None:
        run = pick(rng, runs[pick(rng, names)])
        where = lay_out(run.files, folder / str(number))
        resumed = [n for n in run.files if n.startswith(("checkpoints/", "journal/", "ledger", "init", ".lock"))]
        chosen = rng.choice(len(resumed), size=1 + int(rng.random() < 0.3), replace=False)
        victims, kinds = [resumed[int(i)] for i in chosen], []
        for name in victims:
            if rng.random() < 0.25 and name.startswith(("checkpoints/", "journal/")):
                target = where / name
                if name.startswith("checkpoints/") and rng.random() < 0.3:
                    target = target.parent  # the whole folder
                if os.path.lexists(target) and os.path.lexists(where / name):
                    kinds.append(replaced(target, rng, folder / f"{number}-elsewhere"))
                    continue
            elif (where / name).parent.is_symlink() or not (where / name).parent.exists():
                continue
            if os.path.lexists((where / name).parent) and not (where / name).is_symlink():
                others = tuple(d for n, d in run.files.items() if Path(n).suffix == Path(name).suffix)
                with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                    (where / name).write_bytes(damage(run.files[name], rng, others))
        check_server(run, where, victims, kinds)
        shutil.rmtree(where)
        shutil.rmtree(folder / f"{number}-elsewhere", ignore_errors=True)

    return case


def check_server(run: Run, where: Path, victims: list[str], kinds: list[str]) -> None:
    before = Counter(on_disk(where).values())
    try:
        server = serve(where, run.settings)
    except CorruptFile as error:
        require(str(error) and len(str(error)) < 2000, "a refusal without a reason")
        after = Counter(on_disk(where).values())
        require(
            not any(d not in after for n, d in run.files.items() if d in before and "lock" not in n),
            "refused, but destroyed",
        )
        try:
            serve(where, run.settings).close()
        except CorruptFile:
            return
        raise Wrong("refused once, taken the second time") from None
    workers, acknowledged = copy.deepcopy(run.workers), dict(run.acknowledged)
    alerts = list(server.alerts)
    go_on(server, workers, run.turn, acknowledged)
    phi = server.snapshot()[1]
    finished, tasks = server.finished, server.status()["tasks"]
    lines = server.ledger(0)[0]
    server.close()
    require(finished, "the run does not end")
    require(np.isfinite(phi).all(), "φ is not finite")
    require(tasks == run.settings.total_tasks, f"{tasks} tasks")
    ledger_hurt = "ledger.jsonl" in victims
    unsaid = {"missing"} & set(kinds)  # the last entry of the journal, or a lease, leaves no trace
    if not alerts and not unsaid:
        require(np.array_equal(phi, run.end[0]), "another φ, and no alert")
        require(ledger_hurt or ledger(where) == run.end[1], "another ledger, and no alert")
    if ledger_hurt:
        good = run.files["ledger.jsonl"]
        with (where / "ledger.jsonl").open("rb") as file:
            require(alerts or file.read(len(good)) == good, "a damaged ledger, and no alert")
        return
    finals = Counter(line["task"] for line in lines if line["final"])
    require(max(finals.values()) == 1, "a task is final twice")
    require(len(finals) == run.settings.total_tasks, "a task is missing")
    lost = {lease for name in victims if (lease := held_only_in(run, name)) is not None}
    last: dict[str, int] = {}
    for line in lines:
        require(line["seq"] > last.get(line["lease"], 0), "a push counts twice")
        last[line["lease"]] = line["seq"]
    for lease, seq in acknowledged.items():
        if last.get(lease, 0) < seq:
            require(lease in lost, f"an acknowledged contribution of {lease} is lost")
            require(int(lease.split("-")[0]) in finals, "its task is not trained again")
    if run.settings.mode == "stream" and not lost:
        prefix = {line["task"] for line in lines}
        require(prefix == set(finals), "a task that had begun does not end")


def fuzz_signed(folder: Path, runs: dict[str, list[Run]]) -> Case:
    """Checkpoints, journal entries and leases that say nonsense under a checksum that holds: a refusal or an alert."""
    names = list(runs)

    def case(rng: Rng, number: int) -> None:
        run = pick(rng, runs[pick(rng, names)])
        where = lay_out(run.files, folder / str(number))
        kind = pick(rng, ("checkpoint", "journal", "lease"))
        if kind == "checkpoint":
            path = max((where / "checkpoints").glob("*")) / "state.json"
            state = json.loads(path.read_bytes())
            state["state"] = mangle(state["state"], rng)
            path.write_text(json.dumps(resign(state)))
        elif kind == "journal":
            path = pick(rng, sorted((where / "journal").glob("contribution-*")) or [None])
            if path is not None:
                arrays, header = unpack(path.read_bytes(), "")
                if rng.random() < 0.7:
                    header = mangle(header, rng)
                else:
                    odd = (
                        INITIAL[:3],
                        INITIAL * np.nan,
                        INITIAL.astype(np.float64),
                        INITIAL.reshape(2, -1),
                        INITIAL[:0],
                    )
                    arrays = {**arrays, "vector": pick(rng, odd)} if rng.random() < 0.8 else {"x": INITIAL}
                path.write_bytes(pack(arrays, header))
        elif leases := sorted((where / "journal").glob("lease-*")):
            path = pick(rng, leases)
            path.write_text(json.dumps(resign(mangle(json.loads(path.read_bytes()), rng))))
        try:
            server = serve(where, run.settings)
        except CorruptFile as error:
            require(str(error) and len(str(error)) < 2000, "a refusal without a reason")
        else:
            # Whoever can sign can also lie; what is left to hold is that nothing breaks.
            go_on(server, copy.deepcopy(run.workers), run.turn, {}, 200)
            require(np.isfinite(server.snapshot()[1]).all(), "φ is not finite")
            json.dumps(server.status())
            server.close()
        shutil.rmtree(where)

    return case


# --- all of them ----------------------------------------------------------------------------------------------------

LOADERS: dict[str, tuple[int, Callable[[Path, dict[str, list[Run]]], Case]]] = {
    "packed": (6000, fuzz_packed),
    "packed-header": (2000, fuzz_packed_header),
    "checkpoints": (2000, fuzz_checkpoints),
    "journal": (3000, fuzz_journal),
    "contributions": (1500, fuzz_contributions),
    "leases": (1500, fuzz_leases),
    "ledger": (1500, fuzz_ledger),
    "pictures": (3, fuzz_pictures),
    "events": (800, fuzz_events),
    "summary": (700, fuzz_summary),
    "manifest": (500, fuzz_manifest),
    "config-on-resume": (300, fuzz_config_on_resume),
    "config-file": (800, fuzz_config_file),
    "resume": (100, fuzz_resume),
    "server": (800, fuzz_server),
    "signed": (400, fuzz_signed),
}
"""Number of inputs that each loader gets; in `make test` a third of them."""


def test_there_are_enough_inputs():
    assert sum(count for count, _ in LOADERS.values()) >= ENOUGH


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LEAP_TEST_CANARY", str(tmp_path / "canary"))
    return tmp_path / "canary"


@pytest.mark.parametrize("loader", LOADERS)
def test_damaged_input_is_refused_as_documented_or_read_as_it_was_written(loader, runs, canary):
    count, build = LOADERS[loader]
    logging.disable(logging.CRITICAL)
    tried, failures, longest = 0, Counter(), 0.0
    examples: dict[str, str] = {}
    with fast_folder() as folder:
        case = build(folder, runs)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        numbers = range(0, count, 1 if complete() else FEWER)
        for number in numbers:
            started = time.process_time()
            try:
                case(np.random.default_rng((hash_of(loader), number)), number)
            except Exception as error:
                name = f"{type(error).__name__}: {error}"[:60]
                failures[name] += 1
                examples.setdefault(name, f"{number}: {error!r}"[:300])
            tried += 1
            longest = max(longest, time.process_time() - started)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) * 1024
    logging.disable(logging.NOTSET)
    print(f"{loader}: {tried} inputs, {sum(failures.values())} failed, {longest:.2f} s at most, {grown >> 20} MiB more")
    assert not failures, f"{sum(failures.values())} of {tried}: {failures.most_common(12)}\n{examples}"
    assert tried == len(numbers) >= count // FEWER
    assert not canary.exists(), "code was executed"
    assert longest < MOST_SECONDS
    assert grown < MOST_BYTES


def hash_of(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "little")


def test_the_canary_can_sing(canary):
    pickle.loads(pickle.dumps(Canary()))
    assert canary.exists()

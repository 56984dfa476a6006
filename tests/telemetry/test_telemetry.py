"""Curves and the live table. Event files are read back with TensorBoard's own accumulator: what it finds is shown."""

from __future__ import annotations

import errno
import io
import json
import logging
import multiprocessing
import os
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from event_files import Line, batches, curves, ledger, line, merge, newest_files, point, shown, summary, write
from protocol import Clock
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow

from leap_dist.envs.games import human_normalized
from leap_dist.telemetry import event_file, projection, tensorboard
from leap_dist.telemetry.event_file import EventFile, masked_crc32c
from leap_dist.telemetry.tensorboard import RETRY_SECONDS, TensorBoard
from leap_dist.telemetry.terminal import LiveTable, render


def lease(worker: str, game: str, **values: Any) -> dict[str, Any]:
    """See leases.describe."""
    return {
        "lease": "000000-abc",
        "worker": worker,
        "game": game,
        "visit": 0,
        "version": 3,
        "steps": 12_000,
        "steps_wanted": 16_000,
        "seconds": 8.0,
        "length": 3.0,
        "curve": [point(4000, 540.0), point(8000, None)],
        "silent_seconds": 4.4,
        **values,
    }


# TensorBoard -----------------------------------------------------------------------------------------------------


def test_values_of_a_meta_update(tmp_path: Path) -> None:
    tasks = [
        line(
            "pong",
            1,
            [point(100, -21.0, 1.0), point(200, -20.0, 1.0), point(300, None, 2.0)],
            norm=1.0,
            staleness=2,
            weight=0.5,
            clip=0.25,
        ),
        line("freeway", 1, [point(300, 8.0, 6.0)], norm=4.0),
        line("air_raid", 1, [point(300, 100.0, 1.0)], norm=1.0),
        line("pong", 1, [], norm=6.0),  # its only curve point was never reported
    ]
    write(tmp_path, [tasks]).close()
    points = shown(tmp_path)
    scores = human_normalized("pong", -20.0), human_normalized("freeway", 8.0)
    assert None not in scores
    expected = {
        "loss": 3.0,
        "score_human_normalized": sum(scores) / 2,  # type: ignore[arg-type]
        "update_norm": 0.25,
        "gradient_norm": 3.0,
        "path_length": 2.0,
        "path_energy": 4.0,
        "loss_term_norm": 1.0,
        "path_term_norm": 3.0,
        "term_cosine": -0.5,
        "staleness": 0.5,
        "staleness_weight": 0.875,
        "clip": 0.8125,
        "agreement": 0.125,
        "score_iqm": sum(scores) / 2,  # type: ignore[arg-type]
        "score_lower_quartile": min(scores) + (max(scores) - min(scores)) / 4,  # type: ignore[type-var, operator]
        "score_upper_quartile": max(scores) - (max(scores) - min(scores)) / 4,  # type: ignore[type-var, operator]
    }
    for name, value in expected.items():
        assert points["server", f"meta/{name}"] == [(1, pytest.approx(value))], name
        assert points["server", f"meta_frames/{name}"] == [(1000, pytest.approx(value))], name


def test_what_phi_is_like_is_a_mean_over_the_tasks_that_say_so(tmp_path: Path) -> None:
    first, second = point(100, None), point(100, None)
    first["means"] |= {"start/dead_units": 0.25, "start/effective_rank": 4.0}
    second["means"] |= {"start/dead_units": 0.75}
    later = point(200, 1.0)
    later["means"] |= {"start/entropy_later": 1.5}
    tasks = [line("pong", 1, [first, later]), line("freeway", 1, [second]), line("air_raid", 1, [])]
    write(tmp_path, [tasks]).close()
    found = shown(tmp_path)
    assert found["server", "meta/features/dead_units"] == [(1, 0.5)]
    assert found["server", "meta_frames/features/effective_rank"] == [(1000, 4.0)]
    assert found["server", "meta/features/entropy_later"] == [(1, 1.5)]
    assert ("server", "meta/features/entropy") not in found


def test_a_task_of_all_games_shows_the_returns_of_each(tmp_path: Path) -> None:
    early, late = point(100, None), point(300, None)
    early["means"] |= {"return/pong": -20.7, "return/../x": 1.0}
    late["means"] |= {"return/pong": 14.6, "return/freeway": 29.6}
    write(tmp_path, [[line("all_games", 1, [early, late])], [line("all_games", 2, [early])]]).close()
    found = shown(tmp_path)
    expected = {
        ("game/pong", "task/return"): {100: -20.7, 300: 14.6, 400: -20.7},
        ("game/pong", "task/human_normalized"): {100: 0, 300: 1, 400: 0},
        ("game/freeway", "task/return"): {300: 29.6},
        ("game/all_games", "task/loss"): {100: 0.5, 300: 0.5, 400: 0.5},
        ("server", "meta/score_human_normalized"): {1: 1, 2: 0},
    }
    for name, values in expected.items():
        assert dict(found[name]) == pytest.approx(values, abs=1e-4), name
    assert not [run for run, _ in found if run.startswith("game/.")]


def test_over_all_games_each_counts_by_its_newest_task_and_the_outer_quarters_do_not(tmp_path: Path) -> None:
    games = ("alien", "amidar", "assault", "asterix", "breakout", "freeway", "pong", "qbert")
    updates = [
        [line(game, 1, [point(300, 10.0 * k)]) for k, game in enumerate(games)],
        [line("pong", 2, [point(300, 21.0)]), line("freeway", 2, [point(300, None)]), line("air_raid", 2, [])],
    ]
    write(tmp_path, updates).close()
    found = shown(tmp_path)
    newest = {game: human_normalized(game, 10.0 * k) for k, game in enumerate(games)}
    for version in (1, 2):
        scores = np.sort([score for score in newest.values() if score is not None])
        assert len(scores) == 8
        expected = {"iqm": scores[2:6].mean(), "lower_quartile": np.percentile(scores, 25)}
        for name, value in {**expected, "upper_quartile": np.percentile(scores, 75)}.items():
            assert found["server", f"meta/score_{name}"][version - 1] == (version, pytest.approx(value))
        newest["pong"] = human_normalized("pong", 21.0)


def test_values_of_tasks_when_games_alternate(tmp_path: Path) -> None:
    updates = [
        [line("pong", 1, [point(100, None, 1.0), point(250, -20.0, 2.0)], steps=300), line("freeway", 1, [], steps=50)],
        [line("freeway", 2, [point(70, 3.0, 4.0)], steps=70), line("pong", 2, [point(300, -19.0, 3.0)], steps=300)],
        [line("pong", 3, [point(10, None, 5.0)], steps=20), line("pong", 3, [point(20, None, 6.0)], steps=20)],
    ]
    write(tmp_path, updates).close()
    points = shown(tmp_path)
    assert points["game/pong", "task/loss"] == [(100, 1.0), (250, 2.0), (600, 3.0), (610, 5.0), (640, 6.0)]
    assert points["game/pong", "task/policy_loss"][0] == (100, 2.0)
    assert points["game/pong", "task/value_loss"][0] == (100, 3.0)
    assert points["game/pong", "task/entropy"][0] == (100, 4.0)
    assert points["game/pong", "task/return"] == [(250, -20.0), (600, -19.0)]
    normalized = [human_normalized("pong", score) for score in (-20.0, -19.0)]
    assert [value for _, value in points["game/pong", "task/human_normalized"]] == pytest.approx(normalized)
    geometry = {"path_length": 2.0, "path_energy": 4.0, "loss_term_norm": 1.0, "path_term_norm": 3.0}
    for name, value in {**geometry, "term_cosine": -0.5, "pull_norm": 1.0}.items():
        assert points["game/pong", f"task/{name}"] == [(step, value) for step in (300, 600, 620, 640)]
    assert points["game/freeway", "task/path_length"] == [(50, 2.0), (120, 2.0)]
    assert points["game/freeway", "task/return"] == [(120, 3.0)]


def test_of_supervised_tasks_the_error_takes_the_place_of_the_return(tmp_path: Path) -> None:
    tasks = [
        line("greek", 1, [batches(100, 0.75, 3.0), batches(300, 0.5, 2.0)]),
        line("n_ko", 1, [batches(300, 0.25, 1.0)]),
        line("ulog", 1, []),
        line("greek", 1, [batches(200, 0.75)], steps=200, final=False),  # not done
    ]
    write(tmp_path, [tasks]).close()
    points = shown(tmp_path)
    for group, step in (("meta", 1), ("meta_frames", 1000)):
        assert points["server", f"{group}/error"] == [(step, 0.4375)]  # of 0.625 and 0.25
        assert points["server", f"{group}/loss"] == [(step, 1.5)]
    assert points["game/greek", "task/error"] == [(100, 0.75), (300, 0.5)]
    assert points["game/greek", "task/loss"] == [(100, 3.0), (300, 2.0)]
    assert points["game/n_ko", "task/error"] == [(300, 0.25)]
    assert not {tag for _, tag in points if "return" in tag or "score" in tag or "human" in tag}


@pytest.mark.parametrize("torn_bytes", [0, 1, 5, 300, 10**9])
@pytest.mark.parametrize("at_once", [True, False])
def test_resumed_curves_are_those_of_an_undisturbed_run(tmp_path: Path, torn_bytes: int, at_once: bool) -> None:
    updates = ledger(8)
    write(tmp_path / "undisturbed", updates).close()
    abandoned = write(tmp_path / "resumed", updates[:5])
    for path in newest_files(tmp_path / "resumed"):
        path.write_bytes(path.read_bytes()[: max(0, path.stat().st_size - torn_bytes)])
    before = {path: path.read_bytes() for path in newest_files(tmp_path / "resumed")}

    board = TensorBoard(tmp_path / "resumed")
    for lines in [merge(updates)] if at_once else [merge(updates[:5]), [], *updates[5:]]:
        board.record(lines, summary(20))
    board.close()

    assert curves(tmp_path / "resumed") == curves(tmp_path / "undisturbed")
    assert all(path.read_bytes() == content for path, content in before.items())
    assert board.failures == abandoned.failures == 0


def test_resuming_twice_writes_nothing_new(tmp_path: Path) -> None:
    updates = ledger(3)
    write(tmp_path, updates).close()
    files = {path: path.stat().st_size for path in tmp_path.rglob("events.*")}
    for _ in range(2):
        board = TensorBoard(tmp_path)
        board.record(merge(updates), summary(2))
        board.close()
    assert {path: path.stat().st_size for path in tmp_path.rglob("events.*")} == files


def test_operations_are_kept_once_a_second_and_further_apart_in_long_runs(tmp_path: Path) -> None:
    board = TensorBoard(tmp_path)
    for seconds in (0.0, 0.5, 1.2, 1.9, 2.0, 50_000.0, 50_049.9, 50_050.0):
        board.record([], summary(seconds, restarts=int(seconds)))
    board.close()
    resumed = TensorBoard(tmp_path)
    for seconds in (10.0, 60_000.0):  # the clock of a resumed run may lag behind what was last written
        resumed.record([], summary(seconds, restarts=int(seconds), refused={"late": 1}))
    resumed.close()
    points = shown(tmp_path)
    kept = [0, 1, 2, 50_000, 50_050, 60_000]
    assert points["server", "ops/restarts"] == [(second, float(second)) for second in kept]
    assert points["server", "ops/refused/late"] == [(60_000, 1.0)]
    assert points["server", "ops/refused/stale"][-1] == (50_050, 5.0)
    assert points["server", "ops/leases_lost"][0] == (0, 4.0)


def test_where_the_workers_time_goes_is_a_mean_over_those_that_have_told(tmp_path: Path) -> None:
    shares = [{"emulator": 0.5, "leap": 0.01, "other": 0.49}, {"emulator": 0.7, "leap": 0.03, "other": 0.27}, {}]
    board = TensorBoard(tmp_path)
    board.record([], summary(1.0, workers=[{"time_share": {}}]))
    board.record([], summary(2.0, workers=[{"time_share": share} for share in shares]))
    board.close()
    points = shown(tmp_path)
    found = {tag: points["server", f"ops/time_share/{tag}"] for tag in ("emulator", "leap", "other")}
    assert found == {
        "emulator": [(2, pytest.approx(0.6))],
        "leap": [(2, pytest.approx(0.02))],
        "other": [(2, pytest.approx(0.38))],
    }


def test_text_is_written_once(tmp_path: Path) -> None:
    for text in ("seed: 1", "seed: 2"):
        board = TensorBoard(tmp_path)
        board.text("config", text)
        board.text("manifest", "{}")
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard" / "server"))
    events.Reload()
    assert set(events.Tags()["tensors"]) == {"config/text_summary", "manifest/text_summary"}
    (config,) = events.Tensors("config/text_summary")
    assert (config.step, config.tensor_proto.string_val[0]) == (0, b"seed: 1")


def test_an_error_is_counted_logged_once_and_made_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    updates = ledger(6)
    write(tmp_path / "undisturbed", updates).close()
    clock = Clock()
    board = write(tmp_path / "full", updates[:2], clock=clock)
    calls = []

    def refuse(self: EventFile, *arguments: Any) -> None:
        calls.append(arguments)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(EventFile, "add", refuse)
        board.record(updates[2], summary(3))
        board.record(updates[3], summary(4))  # too early for another attempt
        assert (board.failures, len(calls)) == (1, 1)
        clock.now += RETRY_SECONDS
        board.text("config", "seed: 1")
        assert (board.failures, len(calls)) == (2, 2)
        board.flush()
        assert (board.failures, len(calls)) == (3, 3)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "No space left" in caplog.text

    board.record(updates[4], summary(5))  # too early again
    clock.now += RETRY_SECONDS
    board.record(updates[5], summary(6))
    assert board.failures == 3
    assert curves(tmp_path / "full") == curves(tmp_path / "undisturbed")
    assert not board._pending  # a week of curves would not fit into memory
    board.close()


@pytest.mark.parametrize("room", [0, 100, 1000, 3000])
def test_a_full_disk_tears_a_record_and_no_curve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    updates = ledger(5)
    write(tmp_path / "undisturbed", updates).close()
    board = TensorBoard(tmp_path / "full")
    left = room
    pwrite = os.pwrite

    def fill(handle: int, content: memoryview, offset: int) -> int:
        nonlocal left
        if not left:
            raise OSError(errno.ENOSPC, "No space left on device")
        written = pwrite(handle, content[:left], offset)
        left -= written
        return written

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", fill)
        for lines in updates[:4]:
            board.record(lines, summary())
    assert board.failures == 1
    assert curves(tmp_path / "full") != curves(tmp_path / "undisturbed")
    board.record(updates[4], summary())
    board.close()
    assert board.failures == 1
    assert curves(tmp_path / "full") == curves(tmp_path / "undisturbed")


def record_with_little_room(run_dir: Path, updates: list[list[Line]]) -> None:
    """Records in a process whose files cannot grow beyond 3,000 bytes for a while."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, resource.RLIM_INFINITY))
    board = TensorBoard(run_dir)
    for lines in updates[:30]:
        board.record(lines, summary())
    assert board.failures == 1
    (alert,) = board.alerts
    assert "curves are kept in memory for now" in alert
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    for lines in updates[30:]:
        board.record(lines, summary())
    board.close()


def test_files_that_cannot_grow_raise_an_alert_and_nothing_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The system refuses the writes; after a while it takes them again. No thread prints a traceback."""
    updates = ledger(40)
    write(tmp_path / "undisturbed", updates).close()
    child = multiprocessing.get_context("fork").Process(
        target=record_with_little_room, args=(tmp_path / "full", updates)
    )
    child.start()
    child.join()
    printed = capfd.readouterr().err
    assert child.exitcode == 0, printed
    assert "Traceback" not in printed, printed
    assert "Exception in thread" not in printed, printed
    assert curves(tmp_path / "full") == curves(tmp_path / "undisturbed")


def test_checksums_of_many_strings_are_those_of_tensorboard() -> None:
    rng = np.random.default_rng(0)
    strings = [rng.bytes(int(length)) for length in [0, 1, 5000, *rng.integers(0, 300, 200)]]
    assert masked_crc32c(strings) == [int(pywrap_tensorflow.masked_crc32c(string)) for string in strings]
    assert masked_crc32c([]) == []


# The position in the ledger


def launch(run_dir: Path, pages: list[list[Line]], size: int | None = None) -> TensorBoard:
    """Writes a run's ledger and records those pages of it that a new launch is given."""
    ends = np.cumsum([0, *(len(encoded(lines)) for lines in pages)]).tolist()
    run_dir.mkdir(exist_ok=True)
    (run_dir / "ledger.jsonl").write_bytes(b"".join(map(encoded, pages))[:size])
    board = TensorBoard(run_dir)
    for lines, start, end in zip(pages, ends, ends[1:], strict=False):
        if start >= board.offset:
            board.record(lines, summary(), (), end)
    return board


def encoded(lines: list[Line]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def test_a_launch_goes_on_where_the_last_one_was(tmp_path: Path) -> None:
    updates = ledger(8)
    write(tmp_path / "undisturbed", updates).close()
    launch(tmp_path / "run", updates[:3]).close()
    board = TensorBoard(tmp_path / "run")
    assert board.offset == sum(len(encoded(lines)) for lines in updates[:3])
    launch(tmp_path / "run", updates[:6]).close()
    launch(tmp_path / "run", updates)  # not closed, as after a crash: the position is behind the files
    launch(tmp_path / "run", updates).close()
    assert curves(tmp_path / "run") == curves(tmp_path / "undisturbed")


def test_what_a_position_covers_is_not_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = ledger(4)
    launch(tmp_path, updates).close()
    found: list[Any] = []

    def read(path: Path, start: int) -> Iterator[Any]:
        found.extend(event_file.read_events(path, start))
        return iter(())

    monkeypatch.setattr(tensorboard, "read_events", read)
    TensorBoard(tmp_path)
    assert not found
    (tmp_path / "tensorboard" / projection.NAME).unlink()
    TensorBoard(tmp_path)
    assert found


@pytest.mark.parametrize(
    "case", ["damaged", "another ledger", "a shorter ledger", "a lost file", "a shorter file", "missing"]
)
def test_a_position_that_does_not_match_is_not_used(tmp_path: Path, case: str) -> None:
    updates = ledger(6)
    write(tmp_path / "undisturbed", updates).close()
    run_dir = tmp_path / "run"
    launch(run_dir, updates[:4]).close()
    stored = run_dir / "tensorboard" / projection.NAME
    files = newest_files(run_dir)
    text = (run_dir / "ledger.jsonl").read_bytes()
    if case == "damaged":
        stored.write_text(stored.read_text()[:-9])
    elif case == "another ledger":
        (run_dir / "ledger.jsonl").write_bytes(text[:-9] + b" " + text[-8:])
    elif case == "a shorter ledger":
        (run_dir / "ledger.jsonl").write_bytes(text[:-1])
    elif case == "a lost file":
        files[0].unlink()
    elif case == "a shorter file":
        files[0].write_bytes(files[0].read_bytes()[:-1])
    else:
        stored.unlink()
    assert TensorBoard(run_dir).offset == 0
    launch(run_dir, updates).close()
    assert curves(run_dir) == curves(tmp_path / "undisturbed")


def test_after_a_long_outage_the_next_launch_writes_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an end to what waits in memory."""
    monkeypatch.setattr(tensorboard, "MOST_PENDING", 20)
    updates = ledger(6)
    write(tmp_path / "undisturbed", updates).close()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "tensorboard").write_text("a file is in the way")
    board = launch(tmp_path / "run", updates)
    assert len(board._pending) <= 20
    (tmp_path / "run" / "tensorboard").unlink()
    board.close()
    launch(tmp_path / "run", updates).close()
    assert curves(tmp_path / "run") == curves(tmp_path / "undisturbed")


def test_a_folder_that_cannot_be_made_stops_nothing(tmp_path: Path) -> None:
    (tmp_path / "tensorboard").write_text("a file is in the way")
    board = write(tmp_path, ledger(2))
    board.text("config", "seed: 1")
    board.close()
    assert board.failures == 2  # the first attempt, and the one that close makes


# The live table --------------------------------------------------------------------------------------------------


def test_the_table_shows_state_totals_alerts_and_workers() -> None:
    workers = [
        {"name": name, "state": state, "pid": None, "memory_bytes": None, "device": device}
        for name, state, device in (("w0", "running", "cuda"), ("w1", "running", "cpu"), ("w2", "restarting", "cuda"))
    ]
    leases = [
        lease("w0", "up_n_down"),
        lease("w9", "pong", curve=[], steps=0, seconds=0.0),  # its worker is gone, and the lease not yet taken back
    ]
    alerts = ["first [red]", "second [/]", "third", "fourth"]
    console = Console(file=io.StringIO(), width=120)
    console.print(render(summary(workers=workers, leases=leases, alerts=alerts, quarantined=["pitfall"])))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    rows = [row.split() for row in text.splitlines()]
    assert rows[-4:] == [
        ["w0", "cuda", "up_n_down", "75%", "1,500", "540.0", "4", "s"],
        ["w1", "cpu", "waiting"],
        ["w2", "cuda", "restarting"],
        ["w9", "pong", "0%", "4", "s"],
    ]
    assert text.startswith("running   preset quick, leap, mode buffered")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    for expected in (
        "tasks 9 of 30, 3 meta-updates, 2 more wait for the next",
        "steps 1,234,567 agent steps, 2,310 per second",
        "time 0:00:10 so far, 1:02:03 left",
        "workers 2 of 3 up, 7 restarts",
        "given up pitfall, w8: failed repeatedly",
        "alert second [/]",
        "alert third",
        "alert fourth",
    ):
        assert expected in lines, expected
    trouble = "11 contributions refused (6 manifest, 5 stale), 2 server restarts, 4 leases lost, 1 duplicate"
    assert f"trouble {trouble} clipped 3 contributions, as meta.contribution_clip asks " in " ".join(lines)
    assert "first" not in text


def test_the_table_says_where_workers_share_gpus_through_mps() -> None:
    def lines(**values: Any) -> list[str]:
        return [" ".join(line.split()) for line in text_of(summary(**values)).splitlines()]

    mps = {"a": "running", "b": "nvidia-cuda-mps-control is not installed", "c": "running"}
    assert "MPS running on 2 nodes, nvidia-cuda-mps-control is not installed on 1 node" in lines(mps=mps)
    assert not [line for line in lines(mps={}) + lines() + lines(mps=mps, state="done") if line.startswith("MPS")]


def text_of(summary: dict[str, Any], width: int = 120, **more: Any) -> str:
    console = Console(file=io.StringIO(), width=width)
    console.print(render(summary, **more))
    return console.file.getvalue()  # type: ignore[attr-defined, no-any-return]


def test_the_table_speaks_of_examples_and_errors_where_tasks_are_supervised() -> None:
    leases = [lease("w0", "greek", curve=[batches(4000, 0.95), batches(8000, 0.123)]), lease("w1", "n_ko", curve=[])]
    text = text_of(summary(measure="error", leases=leases))
    assert [row.split() for row in text.splitlines()][-3:] == [
        ["worker", "device", "data", "set", "done", "examples/s", "last", "error", "silent"],
        ["w0", "greek", "75%", "1,500", "12.3%", "4", "s"],
        ["w1", "n_ko", "75%", "1,500", "4", "s"],
    ]
    assert "1,234,567 examples, 2,310 per second" in text
    for word in ("return", "agent steps", "game"):
        assert word not in text, word


@pytest.mark.parametrize(
    ("values", "words", "last"),
    [
        ({"measure": "error"}, ("1,234,567 examples", "examples/s", "last error"), "12.3%"),
        ({"measure": "return"}, ("1,234,567 agent steps", "steps/s", "last return"), "0.1"),
        ({}, ("1,234,567 agent steps", "steps/s", "last return"), "0.1"),  # a summary of an earlier version
    ],
)
def test_the_table_of_an_evaluation_does_too(values: dict[str, Any], words: tuple[str, ...], last: str) -> None:
    held = lease("w0", "greek", arm="leap", seed=7, curve=[batches(8000, 0.123)])
    text = text_of(summary(kind="evaluation", given_up=[], leases=[held], **values))
    assert "agents    9 of 30\n" in "\n".join(line.rstrip() for line in text.splitlines()) + "\n"
    for word in words:
        assert word in text, word
    assert text.splitlines()[-1].split() == ["w0", "greek,", "leap,", "seed", "7", "75%", "1,500", last, "4", "s"]


@pytest.mark.parametrize("kind", ["training", "evaluation"])
def test_the_table_fits_into_eighty_columns_and_numbers_are_whole(kind: str) -> None:
    leases = [lease(f"w{n}", "a_very_long_name_of_an_alphabet_indeed", arm="leap", seed=7) for n in range(3)]
    told = summary(kind=kind, given_up=[], leases=leases, alerts=["w0 died: " + "and so on, " * 20])
    text = text_of(told, 80, now=told["updated"] + 40, bar=True)
    assert max(map(len, text.splitlines())) <= 80
    assert [row.split()[-5:] for row in text.splitlines()[-3:]] == 3 * [["75%", "1,500", "540.0", "4", "s"]]
    assert "…" in text, "the name is cut, not the numbers"
    assert "reported" in text


@pytest.mark.parametrize("state", ["starting", "stopping", "done", "interrupted", "failed", "died"])
def test_the_table_shows_a_run_that_has_just_begun_or_is_over(state: str) -> None:
    console = Console(file=io.StringIO(), width=120)
    console.print(render(summary(state=state, eta_seconds=None, refused={})))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.startswith(f"{state}  ")
    assert ("left" in text) == (state in ("starting", "stopping"))
    assert "refused" not in text


def test_counts_of_one_are_singular() -> None:
    counts = {"server_restarts": 1, "leases_lost": 1, "duplicates": 2, "clipped": 0, "meta_updates": 1, "restarts": 1}
    text = text_of(summary(refused={"stale": 1}, **counts))
    assert "1 contribution refused (1 stale), 1 server restart, 1 lease lost, 2 duplicates\n" in trimmed(text)
    assert "1 meta-update," in text
    assert "2 of 3 up, 1 restart\n" in trimmed(text)


def test_where_nothing_went_wrong_nothing_is_said_about_it() -> None:
    counts = dict.fromkeys(("server_restarts", "leases_lost", "duplicates", "clipped", "all_zero", "restarts"), 0)
    text = text_of(summary(refused={}, quarantined_workers=[], **counts))
    titles = {line.partition("  ")[0] for line in text.splitlines()}
    assert titles == {"running", "tasks", "steps", "time", "workers"}
    assert "restart" not in text


@pytest.mark.parametrize("state", ["done", "interrupted"])
def test_a_run_that_has_ended_as_it_should_shows_no_workers_and_no_trouble(state: str) -> None:
    """The stop itself ends workers and takes their leases back."""
    worker = {"name": "w0", "state": "done", "pid": None, "memory_bytes": None, "device": "cpu"}
    calm = dict.fromkeys(("server_restarts", "duplicates", "clipped", "all_zero", "restarts"), 0)
    told = summary(state=state, workers=[worker], refused={}, leases_lost=0, quarantined_workers=[], **calm)
    assert "w0" not in text_of(told)
    assert "trouble" not in text_of(told)
    assert "w0" in text_of({**told, "state": "failed"})
    assert ("2 leases lost" in text_of({**told, "leases_lost": 2})) == (state == "done")


def trimmed(text: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def test_the_time_left_goes_on_passing_and_ends_with_the_run() -> None:
    def shown(seconds: float, state: str = "running", **more: int) -> str:
        console = Console(file=io.StringIO(), width=120)
        told = summary(state=state, eta_seconds=60.0, **more)
        console.print(render(told, now=told["updated"] + seconds))
        return trimmed(console.file.getvalue())  # type: ignore[attr-defined]

    assert "0:00:10 so far, 0:01:00 left\n" in shown(0)
    assert "0:00:10 so far, 0:00:15 left\n" in shown(45)
    assert "0:00:10 so far, overdue\n" in shown(3600)
    assert "0:00:10 so far, about to end\n" in shown(3600, tasks=10, tasks_wanted=10)
    assert "1:00:00 ago" in shown(3600)
    assert "ago" not in shown(20)
    for state in ("done", "interrupted", "failed", "died"):
        assert "0:00:10\n" in shown(3600, state)


def test_a_terminal_gets_a_table_that_is_redrawn() -> None:
    console = Console(file=io.StringIO(), width=120, force_terminal=True, force_interactive=True)
    with LiveTable(console) as table:
        table.show(summary(leases=[lease("w0", "pong")]))
        table.show(summary(leases=[lease("w0", "freeway")]))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    first, second = text.index("pong"), text.index("freeway")
    assert "\x1b[1A" in text[first:second]  # the cursor went back up
    assert "\x1b[?25h" in text[second:]  # and is visible again


PLAN = "plan: 1 node, 2 workers, limited by --workers"


@pytest.mark.parametrize("terminal", [True, False])
def test_only_the_start_tells_the_time_that_was_expected(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=200, force_terminal=terminal, force_interactive=terminal)
    whole = f"{PLAN}; about 700 agent steps/s, 0:07:37 to the end"
    with LiveTable(console, seconds=0.0, clock=Clock()) as table:
        for time_left in ("0:07:37", "0:06:00"):
            table.show(summary(leases=[lease("w0", "pong")], plan=whole.replace("0:07:37", time_left)))
        shown = console.file.getvalue()  # type: ignore[attr-defined]
        assert shown.count("to the end") == shown.count("0:07:37 to the end") == 1
        table.show(summary(leases=[lease("w0", "pong")], plan=whole.replace("2 workers", "1 worker")))
    assert "plan: 1 node, 1 worker" in console.file.getvalue()  # type: ignore[attr-defined]
    status = text_of(summary(plan=whole))
    assert PLAN.removeprefix("plan: ") in status
    assert "to the end" not in status
    assert "agent steps/s" not in status


def test_a_file_gets_the_parts_of_the_start_once() -> None:
    out = io.StringIO()
    with LiveTable(Console(file=out, width=40), seconds=0.0, clock=Clock()) as table:
        for _ in range(2):
            table.show(summary(leases=[lease("w0", "pong")], time_to_first_step=9.0))
    line = "first step after 9.0 s: ray 4.0, nodes 0.5, server 1.5, workers 2.0, loading 1.0"
    first, *others = out.getvalue().splitlines()
    assert first == line
    assert line not in others


def test_a_file_gets_lines_now_and_then() -> None:
    clock, out = Clock(), io.StringIO()
    with LiveTable(Console(file=out, width=40), seconds=10.0, clock=clock) as table:

        def lines(seconds: float, **values: Any) -> list[str]:
            out.seek(0)
            out.truncate()
            clock.now += seconds
            table.show(summary(leases=[lease("w0", "pong")], **values))
            return out.getvalue().splitlines()

        (line,) = lines(0)
        assert line == "0:00:10  9+2/30 tasks, 3 meta-updates, 1,234,567 steps, 2,310/s, 1:02:03 left, 11 refused"
        assert "\x1b" not in line
        assert lines(9) == []
        assert len(lines(1)) == 1
        assert lines(9) == []
        assert [text[:20] for text in lines(0, tasks=8, meta_updates=4)] == ["0:00:10  8+2/30 task"]
        assert lines(9, tasks=8, alerts=["one", "two"]) == []
        assert lines(1, tasks=8, alerts=["one", "two"])[1:] == ["  ! one", "  ! two"]
        assert lines(10, tasks=8, alerts=["one", "two", "3", "4", "5", "6"])[1:] == ["  ! 4", "  ! 5", "  ! 6"]
        assert len(lines(10, tasks=8, alerts=["one", "two", "3", "4", "5", "6"])) == 1
        waiting = lines(0, tasks=8, tasks_waiting=3)
        assert [text[:20] for text in waiting] == ["0:00:10  8+3/30 task"], "a task waits for its meta-update"


def start(out: Console) -> None:
    """The start of a run with two workers, one second for each phase."""
    clock = Clock()
    begun = clock.now
    with LiveTable(out, clock=clock) as table:
        table.begin("starting Ray on this machine")
        for second, told in enumerate(
            (
                summary(tasks=0, workers_wanted=2),
                summary(tasks=0, workers_wanted=2),
                summary(tasks=0, leases=[lease("w0", "pong", steps=0)]),
                summary(tasks=0, leases=[lease("w0", "pong", steps=80)]),
                summary(tasks=0, leases=[lease("w0", "pong", steps=0)]),  # the next task begins
            ),
            start=1,
        ):
            clock.now = begun + second
            table.show(told)


def test_every_phase_of_the_start_is_a_line_as_it_begins() -> None:
    out = io.StringIO()
    start(Console(file=out, width=40))
    first, second, third, *lines = out.getvalue().splitlines()
    assert (first, second, third) == (
        "  0.0 s  starting Ray on this machine",
        "  1.0 s  starting 2 workers",
        "  3.0 s  loading games",
    )
    assert len(lines) == 1
    assert lines[0].startswith("0:00:10  0+2/30 tasks"), "a run that trains has begun for good"


def test_on_a_terminal_the_phases_give_way_to_the_table() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, force_interactive=True)
    start(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert text.index("…   starting Ray") < text.index("1.0 s  starting Ray") < text.index("…   loading games")
    assert text.index("loading games") < text.index("0 of 30")
    assert "━" in text, "a progress bar"


def test_a_run_that_waits_for_nodes_or_has_alerts_says_so_before_its_first_step() -> None:
    out = io.StringIO()
    with LiveTable(Console(file=out, width=40)) as table:
        table.show(summary(tasks=0, waiting="waiting for nodes"))
        table.show(summary(tasks=0, alerts=["no room"]))
    assert "waiting for nodes\n" in out.getvalue()
    assert "  ! no room" not in out.getvalue(), "the next line is due in ten seconds"


@pytest.mark.parametrize("state", ["failed", "interrupted", "done"])
def test_the_reason_for_an_end_is_said_at_once(state: str) -> None:
    """The next line would be due in ten seconds, when the program has ended."""
    out = io.StringIO()
    with LiveTable(Console(file=out, width=40), clock=Clock()) as table:
        table.show(summary())
        table.show(summary(state=state, alerts=["the cluster's head node is gone"]))
        table.show(summary(state=state, alerts=["the cluster's head node is gone"]))
    assert out.getvalue().splitlines()[-1] == "  ! the cluster's head node is gone"
    assert out.getvalue().count("head node") == 1


def test_what_a_run_waits_for_is_said_once_and_alerts_are_still_shown() -> None:
    """Neither the end of a task nor ten more seconds repeat it. Another reason is said, as is the same one later."""
    out, now = io.StringIO(), [0.0]
    stopping = "stopping: tasks come to an end"
    with LiveTable(Console(file=out, width=40), clock=lambda: now[0]) as table:
        for tasks, waiting, alerts in (
            (1, stopping, []),
            (2, stopping, []),
            (2, stopping, ["no room"]),
            (2, "waiting for nodes", ["no room"]),
            (2, "", ["no room"]),
            (2, stopping, ["no room"]),
        ):
            table.show(summary(tasks=tasks, waiting=waiting, alerts=alerts))
            now[0] += 11.0
    lines = out.getvalue().splitlines()
    assert [line for line in lines if "/30 tasks" not in line] == [
        stopping,
        "  ! no room",
        "waiting for nodes",
        stopping,
    ]
    assert len(lines) == 5


class _Gone(io.StringIO):
    def write(self, text: str) -> int:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")


def test_an_output_that_is_gone_is_ignored() -> None:
    out = _Gone()
    with pytest.raises(BrokenPipeError):
        print("fails", file=out)
    with LiveTable(Console(file=out)) as table:
        table.begin("starting")
        table.show(summary(leases=[lease("w0", "pong")]))

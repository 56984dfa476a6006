"""Run directories that commit f3e3d92 left behind when it was killed go on as that commit itself would have gone on.

φ and ledger are compared bit for bit, the ledger without the names of leases and workers and without seconds; on a
machine that computes the last bits otherwise than the one that made the run directories, up to those.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from in_process import train
from old_runs import RAY, SERVER, alike, assert_gone_on, copied, expected, go_on, machine, names, result, team
from protocol import serve

from leap_dist.storage import run_directory

MODES = ["async", "buffered", "delayed-nesterov", "fedasync", "stream", "sync"]


def assert_same(found: dict[str, Any], wanted: dict[str, Any], old: dict[str, Any]) -> None:
    """Assert equality, bit for bit on the machine that made the run directory."""
    for name, value in wanted.items():
        if machine() == old["machine"]:
            assert found[name] == value, name
        elif name != "phi_sha256":
            assert alike(found[name], value), f"{name}: {found[name]} instead of {value}"


def test_there_is_a_run_directory_of_every_mode() -> None:
    assert names(RAY) == MODES
    assert set(MODES) <= set(names(SERVER))


@pytest.mark.parametrize("name", names(SERVER))
def test_a_restarted_server_goes_on_with_its_workers_as_if_nobody_had_been_killed(tmp_path: Path, name: str) -> None:
    run_dir, old = copied(SERVER, name, tmp_path), expected(SERVER, name)
    settings = run_directory.load_config(run_dir, {})
    server = serve(run_dir, settings)
    assert not server.alerts
    workers = [one.revive(plain) for one, plain in zip(team(settings), old["workers"], strict=True)]
    go_on(server, workers, old["turn"])
    server.close()
    assert_same(result(server, run_dir), old["server_restarted"], old)


@pytest.mark.parametrize("name", names(SERVER))
def test_another_session_goes_on_as_it_did_when_the_run_was_killed(tmp_path: Path, name: str) -> None:
    """Its workers are new: a task that had begun is trained again, but closed where it was streamed."""
    run_dir, old = copied(SERVER, name, tmp_path), expected(SERVER, name)
    settings = run_directory.load_config(run_dir, {})
    server = serve(run_dir, settings, session="another")
    go_on(server, team(settings, "-of-another"))
    server.close()
    assert_same(result(server, run_dir), old["driver_restarted"], old)


@pytest.mark.emulator
@pytest.mark.parametrize("mode", MODES)
def test_a_run_of_the_service_goes_on_in_a_single_process(tmp_path: Path, mode: str) -> None:
    run_dir = copied(RAY, mode, tmp_path)
    before = (run_dir / "ledger.jsonl").read_bytes()
    server = train(run_directory.load_config(run_dir, {}), run_dir)
    assert (run_dir / "ledger.jsonl").read_bytes().startswith(before)
    assert not server.alerts
    assert_gone_on(run_dir, mode)

"""Runs of the service that commit f3e3d92 left behind are resumed on a real Ray; see tests/storage/test_old_runs.py."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from in_process import train
from old_runs import RAY, assert_gone_on, copied, expected
from service import Launch, same_result

from leap_dist.storage import run_directory

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(480)]


@pytest.mark.parametrize("mode", ["sync", "stream"])
def test_a_run_of_the_service_is_resumed(launch: Callable[..., Launch], tmp_path: Path, mode: str) -> None:
    """And ends with the bits of the same going on in a single process."""
    run_dir = copied(RAY, mode, tmp_path)
    plain = tmp_path / "plain"
    shutil.copytree(run_dir, plain)
    resumed = launch(mode, "--resume")
    assert resumed.end() == 0, resumed.log.read_text()
    old = expected(RAY, mode)
    summary = resumed.summary()
    assert summary["state"] == "done"
    assert {name: summary[name] for name in old["counts"]} == old["counts"]
    assert_gone_on(run_dir, mode)
    train(run_directory.load_config(plain, {}), plain)
    same_result(run_dir, plain)

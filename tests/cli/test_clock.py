"""The wall clock may jump, by hours and in both directions: only what is shown to people hears of it."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
from protocol import INITIAL, MANIFEST, config, contribution, grant, work

from leap_dist.driver.signals import StopSignal
from leap_dist.server.admission import RateLimiter
from leap_dist.server.meta_server import MetaServer
from leap_dist.telemetry.progress import Progress

ROOT = Path(__file__).parents[2]
SHOWN = {
    "progress.py": 1, "manifest.py": 1, "commands.py": 2, "training.py": 1, "evaluating.py": 1, "event_file.py": 3,
    "nodes.py": 1,
}  # fmt: skip
"""Files that read the wall clock: for the times in summary, manifest, table and TensorBoard, for the age of a summary
that is shown, for the names of directories and event files; and for each node that leaves at a time which Ray states.
"""


@pytest.fixture
def jumping(monkeypatch):
    """Each reading of the wall clock is hours away from the one before."""
    readings = iter(range(10_000))
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + 7200.0 * (-1) ** (k := next(readings)) * k)


def test_leases_rates_and_waits_do_not_hear_of_it(jumping, tmp_path):
    server = MetaServer(config(), tmp_path, manifest=MANIFEST, initial=INITIAL)
    progress, intake, stop = Progress(config(), 5.0), RateLimiter(10.0, time.monotonic), StopSignal()
    try:
        lease = grant(server)
        for _ in range(5):
            time.time()
            server.tick()
            assert server.renew(lease.id, "i0", 0).proceed
            assert 0 <= server.status()["leases"][0]["silent_seconds"] < 10
            assert 5.0 <= progress.summary(server.status(), "running", {})["wall_seconds"] < 15
            assert intake.admit()
            stop.wait(0.01)
        assert server.push(contribution(lease, INITIAL)).durable
        work(server)
        assert server.status()["leases_lost"] == 0
        assert server.status()["checkpoint_age"] < 10
    finally:
        server.close()


def test_the_wall_clock_is_read_only_where_it_is_shown():
    found = {}
    for path in [*ROOT.glob("leap_dist/**/*.py"), *ROOT.glob("envs/*.py"), ROOT / "launch.py"]:
        if count := len(re.findall(r"time\.time\(|time\.strftime\(|datetime\.now", path.read_text())):
            found[path.name] = count
    assert found == SHOWN

"""The failpoints themselves: armed by text, fired in turn, noted once."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from leap_dist.testing import delivery_log, failpoints

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def disarmed():
    yield
    failpoints.arm("")


def test_nothing_happens_unless_armed():
    failpoints.failpoint("journal.write")
    assert not failpoints.hits


def test_a_fault_fires_at_the_hits_that_it_names_and_at_no_other():
    failpoints.arm("journal.write=full@2-3,ledger.write=raise")
    failpoints.failpoint("journal.write")
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            failpoints.failpoint("journal.write")
    failpoints.failpoint("journal.write")
    with pytest.raises(RuntimeError, match=r"ledger\.write"):
        failpoints.failpoint("ledger.write")
    failpoints.failpoint("ledger.write")
    assert failpoints.hits == {"journal.write": 4, "ledger.write": 2}


@pytest.mark.parametrize("text", ["journal.writ=kill", "journal.write=boom", "journal.write", "journal.write=kill@x"])
def test_what_cannot_be_armed_is_refused(text):
    with pytest.raises(ValueError, match=re.escape(repr(text))):
        failpoints.arm(text)


def test_every_point_in_the_code_is_known_and_every_known_point_is_in_the_code():
    source = "".join(path.read_text() for path in ROOT.glob("leap_dist/**/*.py"))
    used = set(re.findall(r'failpoint\("([a-z.-]+)"\)', source))
    written = {f"{file}.{write}" for file in failpoints.FILES for write in failpoints.WRITES}
    assert used | written == set(failpoints.POINTS)
    assert all(f', "{file}"' in source for file in failpoints.FILES)


def test_what_fired_once_does_not_fire_in_the_next_process(tmp_path, monkeypatch):
    monkeypatch.setenv("LEAP_FAILPOINTS", "journal.write=kill@2")
    monkeypatch.setenv("LEAP_FAILPOINTS_FIRED", str(tmp_path / "fired"))
    program = (
        "from leap_dist.testing.failpoints import failpoint; failpoint('journal.write'); failpoint('journal.write')"
    )
    codes = [subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=False).returncode for _ in range(2)]
    assert codes == [-signal.SIGKILL, 0]
    assert (tmp_path / "fired").read_text() == "journal.write=kill@2\n"


def test_an_audit_keeps_every_whole_line(tmp_path, monkeypatch):
    delivery_log.record("unheard")
    monkeypatch.setenv("LEAP_AUDIT", str(tmp_path))
    delivery_log.record("durable", lease="a", seq=1)
    delivery_log.record("durable", lease="a", seq=2)
    with next(tmp_path.iterdir()).open("a") as file:
        file.write('{"event": "dura')
    assert [(event["event"], event["seq"]) for event in delivery_log.read(tmp_path)] == [("durable", 1), ("durable", 2)]

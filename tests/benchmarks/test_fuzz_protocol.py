"""The fuzzer of the protocol: a short run of it finds nothing, and it finds what is planted."""

from __future__ import annotations

import pytest

from benchmarks.fuzz_protocol import FAULTS, run, run_many
from leap_dist.server.scheduler import UpdateScheduler
from leap_dist.storage import atomic, replica
from leap_dist.storage.journal import Journal


def test_nothing_is_lost_doubled_or_hung():
    total = run_many(1, 120.0, crashes=30, takeovers=16)
    assert {name: total[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)
    assert total["crashes"] >= 30
    assert total["power failures"] >= 5
    assert total["take-overs"] >= 16
    assert total["contributions acknowledged"] >= 30


@pytest.mark.slow
def test_a_minute_of_other_histories_finds_nothing_either():
    total = run_many(100_000, 60.0)
    assert {name: total[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [3248, 3486, 4276, 4646])
def test_histories_that_once_went_wrong(number):
    assert {name: run(number)[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0)


def nothing(*_: object, **__: object) -> None:
    pass


@pytest.mark.parametrize(
    ("owner", "name", "histories", "fault"),
    [
        (Journal, "write", (3, 21, 39), "lost"),  # by a crash
        (atomic, "sync_directory", (39, 85, 125), "lost"),  # by a power failure
        (replica, "check", (0, 4, 6), "lost"),  # by a take-over
        (UpdateScheduler, "update", (1, 3, 5), "hung"),
    ],
)
def test_what_is_planted_is_found(monkeypatch, owner, name, histories, fault):
    monkeypatch.setattr(owner, name, nothing)
    assert any(run(history)[fault] for history in histories)

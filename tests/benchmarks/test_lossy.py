"""What benchmarks/lossy.py holds against a run: every way to lose or to double something is noticed."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import clients, lossy
from benchmarks.lossy import PUSHES, Outcome, Pushed, path, read_back
from leap_dist.envs import atari_vector
from leap_dist.nn.actor_critic import initialization
from leap_dist.protocol.messages import Ack, Lease
from leap_dist.server.meta_server import MetaServer

SEED = 3
DURABLE = Ack(True, True, "", True, 1)
PUSHED = [Pushed(("a", seq), DURABLE, sent=2, seconds=0.1) for seq in (1, 2, 3)]
NAMES = [one.name for one in PUSHED]


def outcome(**changed: object) -> Outcome:
    """Three contributions of two requests each: of the second ones, two were not heard and one not answered."""
    good = Outcome(PUSHED, executed=4, duplicates=1, refused=0, ledger=NAMES, deviation=0.0, seconds=1.0)
    return good._replace(**changed)  # type: ignore[arg-type]


def test_a_run_in_which_each_counts_once_has_no_problems() -> None:
    assert outcome().problems() == []
    assert (outcome().requests_lost, outcome().replies_lost) == (2, 1)


@pytest.mark.parametrize(
    ("changed", "problem"),
    [
        ({"ledger": NAMES[:2]}, "1 acknowledged contributions were lost"),
        ({"ledger": [*NAMES, NAMES[0]]}, "1 contributions were applied twice"),
        ({"ledger": [*NAMES, ("b", 1)]}, "1 contributions were applied that no client was told of"),
        ({"refused": 1}, "1 contributions were refused"),
        ({"duplicates": 0}, "1 repeated requests were not recognized"),
        ({"deviation": lossy.SCALE}, "φ is off by 0.001"),
        ({"deviation": float("nan")}, "φ is off by nan"),
        ({"executed": 6, "duplicates": 3}, "the messages were not lossy: 0 requests, 3 replies lost"),
        ({"executed": 3, "duplicates": 0}, "the messages were not lossy: 3 requests, 0 replies lost"),
    ],
)
def test_each_thing_that_goes_wrong_is_named(changed: dict[str, object], problem: str) -> None:
    assert outcome(**changed).problems() == [problem]


def test_the_run_directory_is_read_back_and_a_single_push_more_or_less_shows(tmp_path: Path) -> None:
    settings = lossy.config(workers=1)
    manifest, initial = initialization(atari_vector.channels(settings.atari.frames), settings.seed, settings.scope)
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    server = MetaServer(settings, run_dir, manifest=manifest, initial=initial)
    pushed = set()
    for _ in range(2):
        lease = server.lease("w0", "i")
        assert isinstance(lease, Lease)
        for seq, vector in enumerate(path(lease.id, SEED, manifest.size), 1):
            last = clients.contribution(lease, manifest.digest, vector, seq, final=seq == PUSHES)
            for _ in range(2):  # the reply to the first one is lost
                assert server.push(last).durable
            pushed.add((lease.id, seq))
    server.close()
    ledger, deviation = read_back(settings, run_dir, pushed, SEED)
    assert sorted(ledger) == sorted(pushed)
    assert deviation <= lossy.TOLERANCE / 10
    for missing in pushed:
        assert read_back(settings, run_dir, pushed - {missing}, SEED)[1] > lossy.TOLERANCE

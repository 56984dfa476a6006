"""A quarter of the messages lost in each direction, by a real Ray: what benchmarks/lossy.py shows, in small."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from protocol import INITIAL, contribution

from leap_dist.driver import clients
from leap_dist.protocol.messages import Ack, Lease, Task

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(240)
def test_whatever_messages_are_lost_each_contribution_counts_once(environment: dict[str, str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.lossy", "--json", "--contributions", "300", "--clients", "30"]
    run = subprocess.run(
        [*command, "--dir", str(tmp_path)], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = {name: figure["median"] for name, figure in json.loads(run.stdout)["figures"].items()}
    assert found["contributions issued"] == found["acknowledged as durable"] == found["applied"] == 300
    assert found["lost"] == found["applied twice"] == found["refused"] == 0
    # A quarter of all requests does not arrive, and of the others a third is not answered; 600 of them, ± 5 standard
    # deviations.
    for direction in ("requests", "replies"):
        assert 0.16 < found[f"{direction} lost (ActorUnavailableError)"] / found["requests sent"] < 0.34
    assert found["duplicates that the server recognized"] == found["replies lost (ActorUnavailableError)"]


def test_a_push_is_sent_again_where_it_was_not_taken_and_not_where_only_the_next_one_is_to_wait(monkeypatch) -> None:
    """Without Ray: the answers are made up."""
    sent = contribution(Lease("000000-00000000", Task(0, "pong", 0, 1, 100), "w0", "i0", 0, 60.0), INITIAL)
    accepted, full = Ack(True, True, "", True, 0, wait=7.0), Ack(False, False, "storage", True, 0, wait=1.0)
    answers, slept = [accepted, full, full, accepted], []
    client = clients.ServerClient(None)
    monkeypatch.setattr(client, "call", lambda *_: answers.pop(0))
    monkeypatch.setattr(clients.time, "sleep", slept.append)
    assert client.push(sent) == accepted
    assert (len(answers), slept) == (3, [])
    assert client.push(sent) == accepted
    assert (len(answers), slept) == (0, [1.0, 1.0])

"""Files of events, as TensorBoard finds them."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from leap_dist.telemetry import event_file


def test_names_of_files_are_in_the_order_in_which_they_were_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve files within one second, so that the tenth has a longer number."""
    monkeypatch.setattr(event_file.time, "time", lambda: 1e9)
    monkeypatch.setattr(event_file, "_numbers", itertools.count(5))
    names = []
    for _ in range(12):
        file = event_file.EventFile(tmp_path)
        names.append(file.path.name)
        file.close()
    assert names == sorted(names)

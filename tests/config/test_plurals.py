"""Numbers with their nouns."""

from __future__ import annotations

import pytest

from leap_dist.config.plurals import counted


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0 CPUs"), (1, "1 CPU"), (1.0, "1 CPU"), (0.5, "0.5 CPUs"), (4.0, "4 CPUs"), (1_234_567, "1,234,567 CPUs")],
)
def test_only_one_is_singular(number: float, shown: str) -> None:
    assert counted(number, "CPU") == shown

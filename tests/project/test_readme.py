"""The README stays a page that is read to its end."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_readme_is_short_and_its_lines_are():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 120
    assert all(len(line) <= 160 for line in lines if not line.startswith("|"))

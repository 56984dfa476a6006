"""Pages of the ledger: all lines, in order, in whole meta-updates, without holding more than a page."""

from __future__ import annotations

import hashlib
import itertools
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from event_files import ledger, line, merge, point

from leap_dist.storage import ledger as storage
from leap_dist.storage.ledger import PAGE_BYTES, Ledger


def pages_of(path: Path, size: int) -> list[list[dict[str, Any]]]:
    """All pages that a reader gets."""
    kept, offset, found = Ledger(path), 0, []
    while True:
        lines, after = kept.read_page(offset, size)
        if after == offset:
            return found
        found.append(lines)
        offset = after


@pytest.mark.parametrize("size", [1, 1000, 2500, 9000, 10**6])
def test_pages_are_whole_meta_updates_and_together_the_ledger(tmp_path: Path, size: int) -> None:
    updates = ledger(12)
    path = tmp_path / "ledger.jsonl"
    Ledger(path).append(0, merge(updates))
    pages = pages_of(path, size)
    assert merge(pages) == merge(updates)
    for before, after in itertools.pairwise(pages):
        assert before[-1]["version_after"] < after[0]["version_after"]
    if size >= 9000:
        assert all(sum(len(json.dumps(line)) + 1 for line in page) <= size for page in pages)


def test_a_damaged_line_is_left_out_of_its_page_and_no_other(tmp_path: Path) -> None:
    lines = [line("pong", version, [point(100, 1.0)]) for version in range(1, 8)]
    path = tmp_path / "ledger.jsonl"
    Ledger(path).append(0, lines)
    text = path.read_bytes().splitlines(keepends=True)
    text[3] = b"x" * (len(text[3]) - 1) + b"\n"
    path.write_bytes(b"".join(text))
    assert merge(pages_of(path, 2 * len(text[0]))) == lines[:3] + lines[4:]


def test_a_large_ledger_is_read_in_little_memory(tmp_path: Path) -> None:
    """One page at a time, of 60 MB."""
    path = tmp_path / "ledger.jsonl"
    text = json.dumps(line("pong", 1, [point(step, 1.0) for step in range(100)]))
    with path.open("w") as file:
        for version in range(1, 4001):
            file.write(text.replace('"version_after": 1,', f'"version_after": {version},') + "\n")
    assert path.stat().st_size > 40 * PAGE_BYTES
    tracemalloc.start()
    lines, offset = Ledger(path).read_page(0)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert 0 < offset <= PAGE_BYTES
    assert lines[0]["version_after"] == 1
    assert peak < 20 * PAGE_BYTES


def test_all_lines_come_whatever_the_number_of_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ledger.jsonl"
    assert list(Ledger(path).lines()) == []
    lines = merge(ledger(40))
    Ledger(path).append(0, lines)
    with path.open("a") as file:
        file.write('{"a line that was not finished')
    monkeypatch.setattr(Ledger.read_page, "__defaults__", (path.stat().st_size // 10,))
    assert list(Ledger(path).lines()) == lines


@pytest.mark.parametrize("at_once", [0, 10**6], ids=["in a thread", "at once"])
def test_a_ledger_is_verified_while_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: int) -> None:
    monkeypatch.setattr(storage, "VERIFIED_AT_ONCE", at_once)
    updates = ledger(6)
    path = tmp_path / "ledger.jsonl"
    first = Ledger(path)
    first.append(0, merge(updates[:3]))
    size, checksum = first.size, first.sha256
    found: list[str] = []

    again = Ledger(path)
    again.verify(size, checksum, lambda: found.append("damaged"))
    again.append(size, merge(updates[3:]))
    assert again.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    again.append(size, merge(updates[3:5]))
    assert again.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert not found

    for damaged in (path.read_bytes().replace(b"pong", b"gong", 1), path.read_bytes()[: size - 1]):
        path.write_bytes(damaged)
        again = Ledger(path)
        again.verify(size, checksum, lambda: found.append("damaged"))
        assert again.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
        assert found == ["damaged"]
        found.clear()

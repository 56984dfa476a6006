"""Determine from a finished run's files whether any contribution was lost or counted twice.

The check does not use the server's own rules. It compares what workers were promised (`leap_dist.testing.delivery_log`)
with what counts: the ledger, and the journal entries that are not in the newest checkpoint. `judge` and the arithmetic
below it are pure.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load

from leap_dist.testing import delivery_log

Line = Mapping[str, Any]


@dataclass(frozen=True)
class Evidence:
    """Files that a run left behind, parsed."""

    ledger: Sequence[Line]
    waiting: Sequence[Line]
    """Contributions that are accepted but not applied (lease, seq, final, steps and task), oldest first."""
    promises: Sequence[Line]
    """Lines of the workers' audit."""
    version: int
    """Version of the newest checkpoint."""
    applied: int
    """Number of applied contributions according to the newest checkpoint."""
    applied_steps: int
    """Number of applied agent steps according to the newest checkpoint."""
    unfinished: frozenset[str] = frozenset()
    """Leases that were open at the end."""
    problems: Sequence[str] = ()
    """Defects of the files themselves."""


@dataclass
class Verdict:
    """Fate of all contributions. The run is sound if `lost`, `doubled` and `problems` are empty."""

    issued: int
    """Number of contributions sent to be counted: final ones or, in mode stream, all."""
    acknowledged: int
    """Number of issued contributions whose worker was told that they are durable."""
    applied: int
    waiting: int
    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def sound(self) -> bool:
        """Whether nothing was lost, counted twice or inconsistent."""
        return not (self.lost or self.doubled or self.problems)


def read(run_dir: Path, audit_dir: Path) -> Evidence:
    """Read the run directory of a stopped run. Raise OSError if there is no checkpoint."""
    problems: list[str] = []
    newest = max((path for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit()), key=lambda p: p.name)
    state = json.loads((newest / "state.json").read_bytes())
    for name, digest in state["files"].items():
        data = (newest / name).read_bytes()
        if hashlib.sha256(data).hexdigest() != digest:
            problems.append(f"checkpoint {newest.name}: {name} does not have its checksum")
        elif not all(np.isfinite(tensor).all() for tensor in load(data).values()):
            problems.append(f"checkpoint {newest.name}: {name} is not finite")
    inner = state["state"]
    waiting = []
    for path in sorted((run_dir / "journal").glob("contribution-*.safetensors")):
        if int(path.stem.rpartition("-")[2]) >= inner["covered"][-1]:
            waiting.append(_journal_entry(path))
    ledger = run_dir / "ledger.jsonl"
    return Evidence(
        ledger=[json.loads(line) for line in ledger.read_text().splitlines()] if ledger.exists() else [],
        waiting=waiting,
        promises=delivery_log.read(audit_dir),
        version=state["version"],
        applied=inner["applied"],
        applied_steps=inner["applied_steps"],
        unfinished=frozenset(p.stem.removeprefix("lease-") for p in (run_dir / "journal").glob("lease-*.json")),
        problems=problems,
    )


def _journal_entry(path: Path) -> Line:
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    entry = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["leap_dist"])
    header = json.loads(entry["header"])
    contribution = header["contribution"]
    return {
        "lease": contribution["lease"],
        "seq": contribution["seq"],
        "final": contribution["final"],
        "steps": contribution["steps"],
        "task": header["lease"]["task"]["index"],
    }


def judge(evidence: Evidence, *, stream: bool) -> Verdict:
    """Compare promises with what counts. `stream` means that every push counts, not only a lease's last one."""
    pushed = {(p["lease"], p["seq"]) for p in evidence.promises if p["event"] == "pushed"}
    issued = {(p["lease"], p["seq"]) for p in evidence.promises if p["event"] == "pushed" and (p["final"] or stream)}
    promised = {(p["lease"], p["seq"]) for p in evidence.promises if p["event"] == "durable"}
    counted = [*evidence.ledger, *evidence.waiting]
    found = {(line["lease"], line["seq"]) for line in counted}
    newest = {lease: max(seq for _, seq in pairs) for lease, pairs in groupby(sorted(found), key=itemgetter(0))}
    # A contribution includes everything its lease sent before; in a stream, each must count by itself.
    lost = sorted(pair for pair in promised - found if stream or newest.get(pair[0], 0) < pair[1])
    verdict = Verdict(len(issued), len(promised), len(evidence.ledger), len(evidence.waiting))
    verdict.lost = [f"{lease} seq {seq} was acknowledged as durable" for lease, seq in lost]
    verdict.doubled = _doubled(counted, stream=stream)
    verdict.problems = [
        *evidence.problems,
        *(f"{lease} seq {seq} counts, but no worker sent it" for lease, seq in sorted(found - pushed)),
        *_inconsistencies(evidence),
    ]
    return verdict


def _doubled(counted: Sequence[Line], *, stream: bool) -> list[str]:
    # A stream closes a lost lease by repeating its last push as the final one, which adds nothing.
    keys = Counter((line["lease"], line["seq"], line["final"]) if stream else (line["lease"],) for line in counted)
    finals = Counter(line["task"] for line in counted if line["final"])
    return [f"{key[0]} counts {count} times" for key, count in keys.items() if count > 1] + [
        f"task {task} ended {count} times" for task, count in finals.items() if count > 1
    ]


def _inconsistencies(evidence: Evidence) -> list[str]:
    """Return the contradictions within and between the ledger and the checkpoint."""
    problems = []
    version = 0
    for number, line in enumerate(evidence.ledger, 1):
        version = max(version, line["version_after"]) if line["version_before"] in (version, version - 1) else -1
        if version < 0 or line["version_after"] != line["version_before"] + 1:
            problems.append(f"ledger line {number}: version {line['version_before']} to {line['version_after']}")
            version = line["version_after"]
        numbers = (line["weight"], line["norm"], line["update_norm"])
        if not all(math.isfinite(one) for one in numbers):
            problems.append(f"ledger line {number} is not finite")
    steps = 0
    batches: dict[int, list[Line]] = defaultdict(list)
    for line in evidence.ledger:
        batches[line["version_after"]].append(line)
    for after, lines in batches.items():
        steps += sum(line["new_steps"] for line in lines)
        if any(line["total_steps"] != steps for line in lines):
            problems.append(f"meta-update {after}: total_steps {lines[-1]['total_steps']}, but {steps} were played")
    for name, said, seen in (
        ("version", evidence.version, version),
        ("contributions", evidence.applied, len(evidence.ledger)),
        ("agent steps", evidence.applied_steps, steps),
    ):
        if said != seen:
            problems.append(f"{name}: {said} in the newest checkpoint, {seen} in the ledger")
    return problems


class Steps(NamedTuple):
    """Agent steps that the server was told of, by outcome."""

    counted: int
    """Steps in contributions that are applied or waiting."""
    redone: int
    """Wasted steps: in no contribution and under a closed lease, so that their task is trained again."""
    unfinished: int
    """Steps under leases that were still open at the end."""


def account(heard: Mapping[str, int], evidence: Evidence) -> Steps:
    """Classify the agent steps. `heard` is the highest number of steps observed for each lease during the run."""
    counts: dict[str, int] = {}
    for line in (*evidence.ledger, *evidence.waiting):
        counts[line["lease"]] = max(line["steps"], counts.get(line["lease"], 0))
    over = {lease: max(0, steps - counts.get(lease, 0)) for lease, steps in heard.items()}
    unfinished = sum(steps for lease, steps in over.items() if lease in evidence.unfinished)
    return Steps(sum(counts.values()), sum(over.values()) - unfinished, unfinished)


def percentile(values: Sequence[float], share: float) -> float:
    """Return a percentile with linear interpolation; `share` is between 0 and 1. Raise IndexError for no values."""
    return float(np.quantile(values, share))


class Sample(NamedTuple):
    """Resident memory of a process at one time."""

    seconds: float
    process: int
    bytes: int


WARM_UP = 60.0
"""Initial seconds of a process's life in which its memory may grow."""
SHORTEST = 300.0
"""Minimum seconds of observation, after the warm-up, for a meaningful slope."""


def memory_slopes(samples: Sequence[Sample]) -> list[float]:
    """Return the least-squares memory slope in megabytes per hour of every process observed long enough."""
    lives: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        lives[sample.process].append(sample)
    slopes = []
    for life in lives.values():
        grown = [sample for sample in life if sample.seconds >= life[0].seconds + WARM_UP]
        if grown and grown[-1].seconds - grown[0].seconds >= SHORTEST:
            line = np.polyfit([s.seconds / 3600 for s in grown], [s.bytes / 1e6 for s in grown], 1)
            slopes.append(float(line[0]))
    return slopes

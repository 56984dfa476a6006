"""The report of a training run under fault injection: recovery times by kind, the table, and what went wrong."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks import verdict
from benchmarks.soak import Fault, Soak

RECOVERY = {
    "worker": "kill → the same slot plays a new lease in a new process",
    "pause": "SIGSTOP → the same slot plays a new lease, in whatever process",
    "server": "kill → first status of the next server process",
    "node": "kill → all its slots play new leases in new processes, wherever",
    "driver": "kill → a worker of the resumed run plays",
    "disk": "space is back → first contribution that is acknowledged as durable",
}
"""Start and end of the recovery time by kind of fault. The driver's reports limit its resolution to 0.5 s."""


def by_kind(faults: Sequence[Fault], kinds: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the number of trials, the number survived and the recovery times, by kind of fault."""
    found = {}
    for kind in kinds:
        own = [fault for fault in faults if fault.kind == kind]
        seconds = [fault.seconds for fault in own if fault.seconds is not None]
        alone = [fault.seconds for fault in own if fault.seconds is not None and not _disturbed(fault, faults)]
        found[kind] = {
            "trials": len(own),
            "survived": len(seconds),
            "p50": verdict.percentile(seconds, 0.5) if seconds else None,
            "p95": verdict.percentile(seconds, 0.95) if seconds else None,
            "longest": max(seconds, default=None),
            "alone": len(alone),
            "p50_alone": verdict.percentile(alone, 0.5) if alone else None,
            "is": RECOVERY[kind],
        }
    return found


def _disturbed(fault: Fault, faults: Sequence[Fault]) -> bool:
    """Return whether another fault was unresolved during this fault's recovery."""
    end = fault.recovered or math.inf
    return any(
        other is not fault and other.struck < end and fault.struck < (other.recovered or math.inf) for other in faults
    )


def text(report: dict[str, Any]) -> str:
    """Format the report as a table."""
    machine, judged = report["hardware"], report["contributions"]
    lines = [
        "Training under fault injection",
        f"  {report['command']}",
        f"  {machine['processor']}, {machine['cores']} cores, {machine['memory_gib']:.0f} GiB; Python "
        f"{machine['python']}, torch {machine['torch']}",
        "  " + ", ".join(f"{key} {value}" for key, value in report["settings"].items()),
        "",
        f"  {'fault':<10}{'trials':>8}{'survived':>10}{'p50':>8}{'p95':>8}{'longest':>9}{'alone':>7}{'p50':>7}  "
        "seconds to recover:",
    ]
    for kind, one in report["faults"].items():
        figures = "".join(
            f"{'-' if one[key] is None else format(one[key], shape):>{width}}"
            for key, width, shape in (
                ("p50", 8, ".1f"),
                ("p95", 8, ".1f"),
                ("longest", 9, ".1f"),
                ("alone", 7, "d"),
                ("p50_alone", 7, ".1f"),
            )
        )
        lines.append(f"  {kind:<10}{one['trials']:>8}{one['survived']:>10}{figures}  {one['is']}")
    lines.append("  (alone: recoveries during which no other fault was active)")
    steps, speed = report["steps"], report["speed"]
    lines += [
        "",
        f"  contributions: {judged['issued']:,} issued, {judged['acknowledged']:,} acknowledged as durable, "
        f"{judged['applied']:,} applied, {judged['waiting']} waiting",
        f"                 {judged['duplicates']:,} duplicates, refused {judged['refused'] or 'none'} "
        "(as the server counts, at least)",
        f"                 sent over a network that lost {report['messages_lost']['requests']} requests and "
        f"{report['messages_lost']['replies']} replies",
        f"                 {len(judged['lost'])} LOST, {len(judged['doubled'])} APPLIED TWICE",
        f"  agent steps:   {steps['counted']:,} count, {steps['redone']:,} redone, {steps['unfinished']:,} unfinished "
        f"at the end: {steps['goodput']:.1%} of what was reported to the server counts",
        f"  speed:         {speed['undisturbed']:,.0f} steps/s undisturbed, {speed['disturbed']:,.0f} disturbed, of "
        f"which {speed['useful']:,.0f} count: {speed['goodput']:.1%} of undisturbed",
        "  memory:        "
        + "; ".join(
            f"{name} "
            + (", ".join(f"{slope:+.1f} MB/h" for slope in slopes) or "no slope, no process lived long enough")
            for name, slopes in report["memory_slopes"].items()
        ),
        f"  stop:          exit code {report['exit_code']} after one SIGINT; {report['refused_resumes']} resumes were "
        "refused because the old server or the disk was not done yet",
        *(f"  note: {note}" for note in report["notes"]),
        *(f"  FAILED: {failure}" for failure in report["failures"]),
    ]
    return "\n".join(lines)


def failures(judged: verdict.Verdict, soak: Soak, code: int | None) -> list[str]:
    """Return a list of everything that went wrong."""
    found = [
        *(f"lost: {one}" for one in judged.lost),
        *(f"applied twice: {one}" for one in judged.doubled),
        *judged.problems,
        *(f"{fault.kind}: {fault.failure}" for fault in soak.faults if fault.failure),
        *soak.crashes,
    ]
    if code != 130:
        found.append(f"one SIGINT should end the run with exit code 130, not {code}")
    if not judged.acknowledged:
        found.append("no contribution was acknowledged, so the run proves nothing")
    return found

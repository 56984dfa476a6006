"""The soak without its cluster: the plan, what counts as recovered, and the verdict on hand-made and on real files."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from protocol import Worker, config, drive, serve
from safetensors.numpy import save

from benchmarks import verdict
from benchmarks.chaos import main
from benchmarks.soak import KINDS, Fault, plan
from benchmarks.soak_report import by_kind
from benchmarks.verdict import Evidence, Sample, account, judge, memory_slopes, percentile
from leap_dist.testing import delivery_log

# --- the plan ------------------------------------------------------------------------------------------------------


def test_the_plan_is_a_pure_function_of_its_arguments():
    assert plan(7, 5, 15, KINDS) == plan(7, 5, 15, KINDS)
    assert plan(7, 5, 15, KINDS) != plan(8, 5, 15, KINDS)
    assert [(round(fault.seconds, 3), fault.kind) for fault in plan(2, 2, 15, KINDS)] == [
        (46.865, "worker"),
        (48.306, "server"),
        (75.379, "disk"),
        (100.208, "server"),
        (104.555, "pause"),
        (118.556, "driver"),
    ], "the same on every machine and in every version"


def test_faults_come_as_often_as_asked_for_and_all_kinds_come():
    faults = plan(0, 600, 15, KINDS)
    assert len(faults) == pytest.approx(600 * 60 / 15, rel=0.1)
    gaps = np.diff([fault.seconds for fault in faults])
    assert gaps.min() > 0
    assert gaps.std() == pytest.approx(gaps.mean(), rel=0.1), "exponential gaps have the mean for standard deviation"
    assert faults[-1].seconds < 600 * 60
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {fault.kind for fault in plan(0, 60, 15, ("node",))} == {"node"}
    assert plan(0, 60, 15, ()) == []


def test_an_unknown_kind_is_refused_by_name(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--kinds", "worker,sever"])
    error = capsys.readouterr().err
    assert "--kinds: 'sever' is not one of worker, pause, server, node, driver, disk, messages" in error


# --- what counts as recovered --------------------------------------------------------------------------------------


def summary(**more):
    return {
        "state": "running",
        "updated": 101.0,
        "server_pid": 2,
        "workers": [{"name": "w0", "pid": 11}, {"name": "w1", "pid": 21}],
        "leases": [{"worker": "w0", "lease": "new0", "steps": 5}, {"worker": "w1", "lease": "new1", "steps": 5}],
    } | more


def fault(kind, **more):
    known = {"pids": {"w0": 10, "w1": 20}, "leases": {"old0", "old1"}, "server_pid": 1, "begins": 100.0}
    return Fault(kind, **{"struck": 100.0, "wall": 100.0} | known | more)


@pytest.mark.parametrize("kind", ["worker", "pause", "node", "driver", "server"])
def test_a_fault_is_over_when_the_run_says_so_itself_after_it(kind):
    one = fault(kind, slots={"w0"})
    assert one.over(summary(), 0)
    assert not one.over(summary(updated=100.0), 0), "that is from before"
    assert not one.over(summary(state="stopping"), 0)
    assert not one.over({}, 0)
    assert not fault(kind, slots={"w0"}, begins=None).over(summary(), 0), "it still lasts"


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("worker", {"workers": [{"name": "w0", "pid": 10}, {"name": "w1", "pid": 21}]}),
        ("worker", {"workers": [{"name": "w0", "pid": None}, {"name": "w1", "pid": 21}]}),
        ("worker", {"leases": [{"worker": "w0", "lease": "old0", "steps": 5}]}),
        ("worker", {"leases": [{"worker": "w0", "lease": "new0", "steps": 0}]}),
        ("worker", {"leases": [{"worker": "w1", "lease": "new1", "steps": 5}]}),
        ("driver", {"leases": [{"worker": "w0", "lease": "old0", "steps": 5}]}),
        ("driver", {"leases": []}),
        ("server", {"server_pid": 1}),
    ],
)
def test_what_is_still_as_before_is_no_recovery(kind, more):
    assert fault(kind, slots={"w0"}).over(summary(), 0)
    assert not fault(kind, slots={"w0"}).over(summary(**more), 0)


def test_a_node_is_made_up_for_when_all_its_workers_play():
    one_left = summary(leases=[{"worker": "w0", "lease": "new0", "steps": 5}])
    assert fault("node", slots={"w0", "w1"}).over(summary(), 0)
    assert not fault("node", slots={"w0", "w1"}).over(one_left, 0)


def test_a_disk_is_back_when_something_became_durable():
    assert not fault("disk", durable=3).over(summary(), 3)
    assert fault("disk", durable=3).over(summary(), 4)


def test_trials_survived_and_times_are_counted_by_kind():
    faults = [
        fault("server", struck=start, begins=start, recovered=start + seconds)
        for start, seconds in ((0.0, 1), (10.0, 3), (12.0, 2), (20.0, 5))
    ]
    found = by_kind([*faults, fault("server", failure="not recovered"), fault("node")], ("server", "node", "disk"))
    assert [(one["trials"], one["survived"]) for one in found.values()] == [(5, 4), (1, 0), (0, 0)]
    assert (found["server"]["p50"], found["server"]["longest"]) == (2.5, 5.0)
    assert found["server"]["p95"] == pytest.approx(4.7)
    assert (found["server"]["alone"], found["server"]["p50_alone"]) == (2, 3.0), "the second fell into the first"
    assert found["disk"]["p50"] is found["node"]["longest"] is None


# --- the verdict, on hand-made evidence ----------------------------------------------------------------------------


def line(number, *, seq=2, version=None, task=None, final=True):
    """Line of the ledger; each is a meta-update of its own unless `version` says otherwise."""
    before = number if version is None else version
    return {
        "lease": f"lease{number}",
        "seq": seq,
        "final": final,
        "task": number if task is None else task,
        "steps": 100,
        "new_steps": 100,
        "total_steps": 100 * (before + 1),
        "version_before": before,
        "version_after": before + 1,
        "weight": 1.0,
        "norm": 2.0,
        "update_norm": 0.5,
    }


def promise(number, *, seq=2, event="durable", final=True):
    return {"event": event, "lease": f"lease{number}", "seq": seq, "final": final}


def heard(numbers):
    return [promise(number, event=event) for number in numbers for event in ("pushed", "durable")]


SOUND = Evidence(
    ledger=[line(0), line(1), line(2)],
    waiting=[line(3)],
    promises=heard(range(4)),
    version=3,
    applied=3,
    applied_steps=300,
)


def test_a_sound_run_is_found_sound():
    found = judge(SOUND, stream=False)
    assert found.sound
    assert (found.issued, found.acknowledged, found.applied, found.waiting) == (4, 4, 3, 1)


def test_a_promise_need_not_be_heard_for_a_contribution_to_count():
    unheard = replace(SOUND, promises=[p for p in SOUND.promises if p["lease"] != "lease1" or p["event"] == "pushed"])
    assert judge(unheard, stream=False).sound
    assert judge(unheard, stream=False).acknowledged == 3


def test_a_promise_that_counts_nowhere_is_lost():
    found = judge(replace(SOUND, waiting=[]), stream=False)
    assert found.lost == ["lease3 seq 2 was acknowledged as durable"]
    assert not found.sound


def test_a_promise_of_which_only_a_shorter_prefix_counts_is_lost():
    more = [*SOUND.promises, promise(3, seq=1, event="pushed", final=False)]
    found = judge(replace(SOUND, waiting=[line(3, seq=1)], promises=more), stream=False)
    assert found.lost == ["lease3 seq 2 was acknowledged as durable"]


def test_a_promise_that_a_longer_prefix_holds_is_kept_except_in_a_stream():
    more = replace(SOUND, promises=[*SOUND.promises, *(promise(3, seq=1, event=e) for e in ("pushed", "durable"))])
    assert judge(more, stream=False).sound
    assert judge(more, stream=True).lost == ["lease3 seq 1 was acknowledged as durable"]


@pytest.mark.parametrize("where", ["ledger", "waiting", "both"])
def test_a_contribution_that_counts_twice_is_found(where):
    again = line(1, version=3)
    evidence = {
        "ledger": replace(SOUND, ledger=[*SOUND.ledger, again]),
        "waiting": replace(SOUND, waiting=[line(3), line(3)]),
        "both": replace(SOUND, waiting=[line(3), line(0)]),
    }[where]
    found = judge(evidence, stream=False)
    name = {"ledger": 1, "waiting": 3, "both": 0}[where]
    assert found.doubled == [f"lease{name} counts 2 times", f"task {name} ended 2 times"]


def test_two_leases_that_end_the_same_task_are_found():
    found = judge(replace(SOUND, waiting=[line(3, task=0)]), stream=False)
    assert found.doubled == ["task 0 ended 2 times"]


def test_in_a_stream_each_push_counts_once_and_a_lost_lease_may_be_closed_by_its_last():
    pushes = [line(0, seq=1, final=False), line(0, seq=2, version=1, final=False), line(0, seq=2, version=2)]
    promises = [promise(0, seq=seq, event=event, final=False) for seq in (1, 2) for event in ("pushed", "durable")]
    stream = replace(SOUND, ledger=pushes, waiting=[], promises=promises)
    found = judge(stream, stream=True)
    assert found.sound, found
    assert (found.issued, found.acknowledged) == (2, 2)
    twice = replace(stream, ledger=[*pushes, line(0, seq=1, version=3, final=False)], version=4, applied=4)
    assert judge(twice, stream=True).doubled == ["lease0 counts 2 times"]
    lost = replace(stream, ledger=pushes[:1], version=1, applied=1, applied_steps=100)
    assert judge(lost, stream=True).lost == ["lease0 seq 2 was acknowledged as durable"]


@pytest.mark.parametrize(
    ("ledger", "problem"),
    [
        ([line(0), line(2), line(1)], "ledger line 2: version 2 to 3"),
        ([line(0), line(1), {**line(2), "version_after": 4}], "ledger line 3: version 2 to 4"),
        ([line(1), line(2)], "ledger line 1: version 1 to 2"),
        ([line(0), line(1), {**line(2), "total_steps": 301}], "meta-update 3: total_steps 301, but 300 were played"),
        ([line(0), {**line(1), "update_norm": math.nan}, line(2)], "ledger line 2 is not finite"),
        ([line(0), line(1)], "contributions: 3 in the newest checkpoint, 2 in the ledger"),
        ([line(0), {**line(1), "lease": "other"}, line(2)], "other seq 2 counts, but no worker sent it"),
    ],
)
def test_a_ledger_that_contradicts_itself_is_found(ledger, problem):
    assert problem in judge(replace(SOUND, ledger=ledger), stream=False).problems


def test_several_contributions_of_one_meta_update_are_no_contradiction():
    batch = [line(0), {**line(1, version=0), "total_steps": 200}]
    batch[0]["total_steps"] = 200
    evidence = replace(SOUND, ledger=[*batch, {**line(2, version=1), "total_steps": 300}], version=2)
    assert judge(evidence, stream=False).sound


def test_steps_count_or_are_redone_or_unfinished():
    evidence = replace(SOUND, unfinished=frozenset({"open"}))
    # Of lease 1 a summary was never seen, of lease 0 only an early one; `gone` was taken back.
    found = account({"lease0": 40, "lease3": 100, "gone": 70, "open": 30}, evidence)
    assert found == (400, 70, 30)


# --- the verdict, on real files ------------------------------------------------------------------------------------


class Audited(Worker):
    """A worker that notes what it was told, as a real one does."""

    def step(self, server):
        sent = self.todo[0] if self.todo else None
        name = {"lease": sent.lease, "seq": sent.seq, "final": sent.final} if sent else {}
        if sent:
            delivery_log.record("pushed", **name)
        answer = super().step(server)
        if sent and answer.durable:
            delivery_log.record("durable", **name)
        return answer


@pytest.fixture
def noted(tmp_path, monkeypatch) -> Path:
    folder = tmp_path / "audit"
    folder.mkdir()
    monkeypatch.setenv("LEAP_AUDIT", str(folder))
    return folder


@pytest.mark.parametrize("mode", ["buffered", "stream"])
def test_a_real_run_whose_server_restarts_is_sound_and_one_removed_entry_is_missed(tmp_path, noted, mode):
    settings = config(mode=mode, meta_updates=5, meta__batch_size=3, server__keep_checkpoints=2)
    workers = [Audited(settings, f"w{k}", lambda task: 3) for k in range(2)]
    server = serve(tmp_path / "run", settings)
    for _ in range(5):
        drive(server, workers, 7)
        server.close()
        server = serve(tmp_path / "run", settings)
    server.close()
    evidence = verdict.read(tmp_path / "run", noted)
    found = judge(evidence, stream=mode == "stream")
    assert found.sound, found
    assert found.acknowledged == found.applied + found.waiting >= 8
    assert len(evidence.unfinished) == 1, "a task that was just begun"
    if mode == "stream":
        return
    assert found.waiting, "the run stopped in the middle of a batch"
    newest = max((tmp_path / "run" / "journal").glob("contribution-*"))
    newest.unlink()
    lost = judge(verdict.read(tmp_path / "run", noted), stream=False).lost
    assert lost == [f"{evidence.waiting[-1]['lease']} seq 3 was acknowledged as durable"]


def test_a_damaged_or_infinite_initialization_is_found(tmp_path, noted):
    server = serve(tmp_path / "run", config())
    server.close()
    file = tmp_path / "run" / "checkpoints" / "000000" / "init.safetensors"
    assert verdict.read(tmp_path / "run", noted).problems == []
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert verdict.read(tmp_path / "run", noted).problems == [
        "checkpoint 000000: init.safetensors does not have its checksum"
    ]
    data = save({"weight": np.array([1.0, np.nan], np.float32)})
    file.write_bytes(data)
    state = file.with_name("state.json")
    written = json.loads(state.read_text())
    written["files"]["init.safetensors"] = hashlib.sha256(data).hexdigest()
    state.write_text(json.dumps(written))
    assert verdict.read(tmp_path / "run", noted).problems == ["checkpoint 000000: init.safetensors is not finite"]


# --- arithmetic ----------------------------------------------------------------------------------------------------


def test_percentiles_lie_between_neighbours_in_proportion():
    assert percentile([3, 1, 2], 0.5) == 2
    assert percentile([0, 10], 0.95) == pytest.approx(9.5)
    assert percentile([4], 0.95) == 4


def test_memory_slopes_come_from_one_process_each_once_it_has_warmed_up():
    def life(process, start, seconds, slope):
        """Grows by 50 MB within the first minute, and then by `slope` MB an hour."""
        times = [start + 5.0 * k for k in range(int(seconds // 5) + 1)]
        return [
            Sample(t, process, int(1e6 * (100 + 50 * min(1, (t - start) / 60) + slope * (t - start) / 3600)))
            for t in times
        ]

    samples = [*life(1, 0, 400, 12), *life(2, 400, 300, 1000), *life(3, 700, 900, -6)]
    assert memory_slopes(samples) == [pytest.approx(12, abs=0.1), pytest.approx(-6, abs=0.1)]
    assert memory_slopes(samples[:20]) == []
    assert memory_slopes([]) == []

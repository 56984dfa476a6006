"""Where the time goes: the arithmetic of shares, and a real profiler's trace of a real learner."""

from __future__ import annotations

import gzip
import json

import pytest
from a2c_learners import ALONE, playing
from protocol import Clock

from leap_dist.nn.profiling import PARTS, NoProfiler, Profiler, Stopwatch, breakdown, shares


def test_parts_add_up_and_what_no_part_covers_is_other():
    clock = Clock()
    stopwatch = Stopwatch(clock)
    for part, seconds in (("acting", 2.0), ("emulator", 5.0), ("acting", 1.0)):
        with stopwatch(part):
            clock.now += seconds
    clock.now += 2.0
    reading = stopwatch.seconds()
    assert reading == {**dict.fromkeys(PARTS, 0.0), "acting": 3.0, "emulator": 5.0, "total": 10.0}
    assert shares(reading) == {**dict.fromkeys(PARTS, 0.0), "acting": 0.3, "emulator": 0.5, "other": pytest.approx(0.2)}
    with stopwatch("update"):
        clock.now += 10.0
    later = shares(stopwatch.seconds(), reading)
    assert later == {**dict.fromkeys(PARTS, 0.0), "update": 1.0, "other": 0.0}, "since the earlier reading"
    assert shares(reading, reading) == {}


def test_a_part_that_raises_counts_as_well():
    clock = Clock()
    stopwatch = Stopwatch(clock)

    def update() -> None:
        with stopwatch("update"):
            clock.now += 3.0
            raise ValueError

    with pytest.raises(ValueError):
        update()
    assert stopwatch.seconds()["update"] == 3.0


def test_the_breakdown_names_every_part_the_largest_first():
    lines = breakdown({**dict.fromkeys(PARTS, 0.0), "emulator": 60.0, "acting": 30.0, "total": 100.0}).splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["emulator", "acting", "other"]
    assert lines[0].split()[1:4] == ["60.0", "s", "60.0%"]
    assert {line.split()[0] for line in lines} == {*PARTS, "other"}


def test_a_learner_says_what_its_time_goes_to():
    with playing(agent=ALONE) as learner:
        for _ in range(3):
            learner.backward()
            learner.step()
        reading = learner.stopwatch.seconds()
    assert all(reading[part] > 0 for part in ("emulator", "acting", "update"))
    assert sum(reading[part] for part in PARTS) <= reading["total"]


def test_a_profile_shows_the_parts_of_some_updates_in_the_midst_of_training():
    with playing(agent=ALONE) as learner:
        profiler, recordings = Profiler(learner.stopwatch, skip=2, updates=3), []
        for update in range(8):
            learner.backward()
            learner.step()
            profiler.step()
            handed = profiler.take_recording()
            assert (handed is not None) == (update == 5), "once, when it is done"
            recordings += [handed] if handed else []
    [(trace, operators)] = recordings
    events = json.loads(gzip.decompress(trace))["traceEvents"]
    names = [event.get("name") for event in events if event.get("cat") == "user_annotation"]
    # Each update: five steps of the emulator; the two halves of the update.
    assert names.count("emulator") == 3 * 5
    assert names.count("update") == 3 * 2
    assert any(event.get("name") == "aten::convolution_backward" for event in events)
    assert "aten::convolution_backward" in operators


def test_where_nobody_asked_for_a_profile_there_is_none():
    profiler = NoProfiler()
    profiler.step()
    assert profiler.take_recording() is None

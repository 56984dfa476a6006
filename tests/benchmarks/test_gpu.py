"""benchmarks.gpu on the CPU twin of a GPU: that it runs, and that what it compares would be found to differ."""

from __future__ import annotations

import argparse
import multiprocessing
import queue
import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from graph_twin import TapeGraph

from benchmarks import gpu
from benchmarks.harness import Report
from leap_dist.config.settings import AgentSettings, AtariSettings
from leap_dist.tasks.atari import a2c

AGENT, ATARI = AgentSettings(envs=2, unroll=3), AtariSettings(frames="rgb1")


@pytest.fixture(autouse=True)
def twin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that asks for a GPU gets the CPU with tape graphs."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(gpu, "prepare", lambda *_: None)
    monkeypatch.setattr(gpu, "WARM_UP", 4)
    kinds = {"cuda": TapeGraph, "cpu": None}
    made: list[str] = []

    def resolve(name: str) -> str:
        made.append(name)
        return "cpu"

    monkeypatch.setattr(a2c, "resolve_device", resolve)
    monkeypatch.setattr(a2c, "graph_for", lambda _: kinds[made[-1]])


def report() -> Report:
    return Report("", {})


def test_the_comparison_with_the_cpu():
    found = report()
    gpu.compare_with_cpu("pong", AGENT, ATARI, found)
    (_, gradients), (_, losses) = found.figures.values()
    assert len(gradients) == 10
    assert max(gradients) < 1e-5
    assert max(losses) < 1e-6


def test_the_comparison_would_notice(monkeypatch):
    """Actions that the CPU is not given: another loss, another gradient."""
    real = torch.from_numpy
    monkeypatch.setattr(torch, "from_numpy", lambda array: real(0 * array if array.dtype == "int64" else array))
    found = report()
    gpu.compare_with_cpu("pong", AGENT, ATARI, found)
    assert max(found.figures["GPU against CPU: ‖∇f − ∇f‖/‖∇f‖"][1]) > 1e-3


@pytest.mark.slow
def test_latency_is_measured_with_and_without_graphs():
    found = report()
    before = TapeGraph.launches
    gpu.latency("pong", AGENT, ATARI, 1, found)
    assert TapeGraph.launches > before
    assert set(found.figures) == {"update of 6 transitions, eager", "update of 6 transitions, graphs",
                                  "Leap, energy"}  # fmt: skip
    assert all(value > 0 for _, values in found.figures.values() for value in values)


@pytest.mark.parametrize("arm", ["emulator", "loop"])
def test_a_workers_rate(arm):
    class Together:
        def wait(self) -> None:
            pass

    results: queue.Queue[tuple[float, float]] = queue.Queue()
    gpu.work(0, arm, "fast", "pong", 0.5, 1.0, Together(), results)
    rate, share = results.get_nowait()
    assert rate > 0
    assert (0 < share < 0.5) == (arm == "loop")


def the_first_fails(index: int, arm: str, *others: Any) -> None:
    """Stands in for `gpu.work`."""
    if index == 0:
        raise MemoryError("no memory on the GPU")
    start = others[4]
    start.wait()


def test_where_one_process_fails_the_others_are_not_waited_for(monkeypatch, capfd):
    monkeypatch.setattr(gpu, "work", the_first_fails)
    given = argparse.Namespace(preset="fast", game="pong", seconds=1.0)
    with pytest.raises(RuntimeError, match=r"^loop: 1 of 2 processes failed, and 0 are done$"):
        gpu.at_once("loop", 2, given)
    assert "no memory on the GPU" in capfd.readouterr().err
    deadline = time.monotonic() + 30
    while multiprocessing.active_children() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert multiprocessing.active_children() == []


def test_the_presets_of_the_project_are_what_is_measured():
    assert gpu.of_preset("paper") == (AgentSettings(), AtariSettings())
    agent, settings = gpu.of_preset("fast")
    assert agent == replace(AgentSettings(), envs=16, learning_rate=7e-4, epsilon=1e-5, epsilon_form="outside",
                            value_cost=0.25, reward_clip="sign")  # fmt: skip
    assert settings.frames == "gray4"


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self: argparse.Namespace())
    assert gpu.main() == 2
    assert capsys.readouterr().err == "benchmarks.gpu: torch finds no GPU here\n"

"""Devices and precisions, and the path that GPUs take, on its CPU twin."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from a2c_learners import AGENT, ATARI, WORKER, parameters, playing
from graph_twin import TapeGraph

from leap_dist.config.settings import AgentSettings
from leap_dist.leap.pull_forward import PullForward
from leap_dist.nn import device
from leap_dist.nn.actor_critic import ActorCritic, Encoder
from leap_dist.nn.device import CapturedGraph, CudaGraph, graph_for, prepare, resolve_device, resolve_precision
from leap_dist.tasks.atari import a2c, rollout


def test_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert [resolve_device(name) for name in ("auto", "cpu")] == ["cpu", "cpu"]
    with pytest.raises(RuntimeError, match="finds no GPU"):
        resolve_device("cuda")
    with pytest.raises(RuntimeError, match="finds no GPU"), playing(worker=replace(WORKER, device="cuda")):
        pass
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [resolve_device(name) for name in ("auto", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]


def test_precisions(monkeypatch):
    assert resolve_precision("float32", "cpu") == torch.float32
    assert resolve_precision("bfloat16", "cpu") == torch.bfloat16
    for native, expected in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda native=native: native)
        assert resolve_precision("auto", "cpu") == expected


def test_a_gpu_that_only_emulates_bfloat16_computes_in_float32(monkeypatch):
    """T4 and V100: torch supports it there too, but several times slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert resolve_precision("auto", "cuda") == torch.float32
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert resolve_precision("auto", "cuda") == torch.bfloat16


def test_only_gpus_have_graphs():
    assert graph_for(torch.device("cpu")) is None
    assert graph_for(torch.device("cuda")) is CudaGraph


@pytest.mark.parametrize(("share", "expected"), [(0.25, [0.25]), (1.0, []), (2.0, []), (0.0, [])])
def test_a_worker_takes_no_more_than_its_share_of_a_gpu(monkeypatch, share, expected):
    fractions: list[float] = []
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", fractions.append)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    prepare("cpu", 1, 0.25)
    assert fractions == []
    prepare("cuda", 1, share)
    assert fractions == expected


def test_freed_memory_stays_with_the_process_where_the_c_library_can_be_told_so(monkeypatch):
    told: dict[int, int] = {}
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=told.__setitem__))
    prepare("cpu", 1, 0.0)
    assert told == {-3: 2**25, -1: 2**27}  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD
    monkeypatch.setattr(device.ctypes, "CDLL", lambda _: SimpleNamespace())  # musl
    prepare("cpu", 1, 0.0)


def test_a_captured_function_gives_new_tensors_from_what_its_inputs_hold_now():
    source, kept = torch.zeros(3), torch.zeros(3)
    calls = 0

    def function() -> list[torch.Tensor]:
        nonlocal calls
        calls += 1
        kept.copy_(2 * source)
        return [source + 1]

    captured = CapturedGraph(function, TapeGraph)
    results = []
    for i in range(6):
        source.fill_(float(i))
        results.append(captured()[0])
        assert kept.tolist() == [2.0 * i] * 3
    assert [r[0].item() for r in results] == [1, 2, 3, 4, 5, 6], "each call's results stay as they were"
    assert calls == CapturedGraph.WARM_UP + 1, "from then on no Python runs"


def test_without_graphs_a_captured_function_is_called():
    calls: list[int] = []

    def function() -> list[torch.Tensor]:
        calls.append(1)
        return []

    captured = CapturedGraph(function, None)
    for _ in range(5):
        captured()
    assert len(calls) == 5


@pytest.mark.parametrize("unroll", [5, rollout.LONGEST_CAPTURED + 1])
def test_with_graphs_training_is_the_same_bit_for_bit(monkeypatch, unroll):
    """Truncations, lost lives, Leap's accumulator and the optimizer included; an unroll too long for graphs as well."""
    agent, results = replace(AGENT, unroll=unroll), []
    for graph in (None, TapeGraph):
        monkeypatch.setattr(a2c, "graph_for", lambda _, graph=graph: graph)
        TapeGraph.launches = 0
        with playing("breakout", agent=agent, settings=ATARI) as learner:
            pull = PullForward(learner.shared.values(), metric="length")
            losses = []
            for _ in range(12 if unroll == 5 else 2):
                losses.append(learner.backward())
                pull.observe(losses[-1])
                learner.step()
            losses.append(learner.evaluate())
            results.append((torch.stack(losses).numpy(), parameters(learner), pull.gradient().numpy()))
        # T acting steps and the bootstrap of each, and the gradient of each but the one that only measures.
        launched = 13 * 6 + 12 - 7 * CapturedGraph.WARM_UP if graph and unroll == 5 else 0
        assert TapeGraph.launches == launched
    assert len(set(results[0][0].tolist())) > 1
    for plain, with_graphs in zip(*results, strict=True):
        assert np.array_equal(plain, with_graphs)


def test_the_twin_notices_what_a_gpu_would_not_see():
    """The controls: a tensor that is replaced instead of written into, a number that is read back, a drawn one."""
    holder = {"source": torch.zeros(2)}
    captured = CapturedGraph(lambda: [holder["source"] + 1], TapeGraph)
    for _ in range(CapturedGraph.WARM_UP + 1):
        captured()
    holder["source"] = torch.ones(2)
    assert captured()[0].tolist() == [1.0, 1.0], "still of the old memory"

    for function, complaint in (
        (lambda: [torch.ones(2) * holder["source"].sum().item()], "wait for the device"),
        (lambda: [torch.rand(2)], "draws random numbers"),
    ):
        captured = CapturedGraph(function, TapeGraph)
        for _ in range(CapturedGraph.WARM_UP):
            captured()
        with pytest.raises(AssertionError, match=complaint):
            captured()


def test_the_device_module_is_what_a2c_uses():
    assert a2c.graph_for is device.graph_for


@pytest.mark.parametrize(
    ("unroll", "graph"), [(3, None), (rollout.LONGEST_CAPTURED + 1, None), (rollout.LONGEST_CAPTURED + 1, TapeGraph)]
)
def test_without_graphs_nothing_of_an_unroll_stays_on_the_host(unroll, graph):
    """On the device "meta", which holds no numbers but refuses tensors of another device, as a GPU does."""
    agent = AgentSettings(envs=2, unroll=unroll)
    model = ActorCritic(Encoder(4), 6).to("meta")
    generator = torch.Generator()
    unrolled = rollout.Rollout(model, agent, actions=6, dtype=torch.bfloat16, generator=generator, graph=graph)
    frames = np.zeros((2, 4, 84, 84), np.uint8)
    unrolled.set_frames(frames)
    for step in range(unroll):
        unrolled._act[step]()  # `act` would read the actions back, and there are none
        unrolled.set_frames(frames)
    parts, gradients = unrolled.gradients()
    assert {tensor.device.type for tensor in (parts, *gradients, unrolled.loss())} == {"meta"}


def test_what_cannot_be_captured_runs_step_by_step(caplog):
    class Refused(TapeGraph):
        def record(self, function):
            raise RuntimeError("operation not permitted when stream is capturing")

    source = torch.zeros(2)
    captured = CapturedGraph(lambda: [source + 1], Refused)
    results = []
    for i in range(CapturedGraph.WARM_UP + 3):
        source.fill_(float(i))
        results.append(captured()[0].tolist())
    assert results == [[i + 1.0] * 2 for i in range(CapturedGraph.WARM_UP + 3)]
    assert [record.message for record in caplog.records] == [
        "work on the GPU runs step by step, because it cannot be captured as a graph: operation not permitted when "
        "stream is capturing"
    ]

"""Compare several workers on one GPU with the emulator alone on the same CPUs. Runs without Ray.

    python -m benchmarks.gpu                          1, 2, 4 and 8 workers, the paper's settings
    python -m benchmarks.gpu --workers 1 4 --preset fast --game breakout --seconds 30
    python -m benchmarks.gpu --check                  only compares the GPU's results with the CPU's

Needs a GPU, and torch, ale-py, gymnasium and NumPy. Every worker is a process with one CPU thread, as in the service.
It runs the emulator, acts and updates on the GPU, and accumulates Leap's gradient. All workers start together, and the
rate counts from the moment when all have finished their warm-up. Rates are agent steps per second (four ALE frames
each).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import queue
import statistics
import sys
import time
from dataclasses import replace
from multiprocessing.synchronize import Barrier
from typing import Any

import numpy as np
import torch

from benchmarks.harness import Report, parser, progress
from leap_dist.config.presets import PRESETS
from leap_dist.config.settings import AgentSettings, AtariSettings, WorkerSettings
from leap_dist.envs import atari_vector
from leap_dist.leap.pull_forward import PullForward
from leap_dist.nn.actor_critic import initialization
from leap_dist.nn.device import prepare
from leap_dist.nn.flat_vector import flatten
from leap_dist.tasks.atari import a2c
from leap_dist.tasks.atari.a2c import A2C

START_SECONDS = 300
"""Time limit for the start of all processes that compute at once."""
WARM_UP = 20
"""Number of initial updates that are not measured: they choose algorithms and record graphs."""


def main() -> int:
    """Run the benchmark, print the report and return the exit code."""
    command = parser(__doc__, repeats=3)
    command.add_argument("--preset", default="paper", choices=[name for name in PRESETS if name != "smoke"])
    command.add_argument("--game", default="pong")
    command.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    command.add_argument("--seconds", type=float, default=20.0, help="duration of each arm and repetition")
    command.add_argument("--check", action="store_true", help="only compare the GPU's results with the CPU's")
    given = command.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.gpu: torch finds no GPU here", file=sys.stderr)
        return 2
    agent, settings = of_preset(given.preset)
    report = Report(
        "Workers on one GPU",
        {"gpu": torch.cuda.get_device_name(), "preset": given.preset, "game": given.game, "envs": agent.envs,
         "unroll": agent.unroll, "seconds": given.seconds},
    )  # fmt: skip
    compare_with_cpu(given.game, agent, settings, report)
    if not given.check:
        latency(given.game, agent, settings, given.repeats, report)
        for count in given.workers:
            scale(count, given, report)
    report.show(given.json)
    return 0


def of_preset(name: str) -> tuple[AgentSettings, AtariSettings]:
    """Return a preset's settings, without checking what else the configuration needs."""
    chosen: dict[str, dict[str, Any]] = {"agent": {}, "atari": {}}
    for field, value in PRESETS[name].items():
        section, _, setting = field.rpartition(".")
        if section in chosen:
            chosen[section][setting] = value
    return AgentSettings(**chosen["agent"]), AtariSettings(**chosen["atari"])


def learner_of(
    game: str, agent: AgentSettings, settings: AtariSettings, device: str, precision: str = "auto", seed: int = 1
) -> A2C:
    """Return a learner at the start of a task."""
    vector = initialization(atari_vector.channels(settings.frames), 0)[1]
    worker = WorkerSettings(device=device, precision=precision)  # type: ignore[arg-type]
    return A2C(game, vector, seed=seed, agent=agent, settings=settings, worker=worker)


def compare_with_cpu(game: str, agent: AgentSettings, settings: AtariSettings, report: Report) -> None:
    """Compare the losses and gradients of the same unrolls on GPU and CPU.

    Both see the same frames and actions, so the results agree up to rounding. The arithmetic is float32 without TF32.
    The later unrolls run as graphs.
    """
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    small = replace(agent, envs=4)
    gpu, cpu = (learner_of(game, small, settings, device, "float32") for device in ("cuda", "cpu"))
    differences, loss_differences = [], []
    for _ in range(10):
        steps: list[tuple[np.ndarray, atari_vector.Step]] = []
        real = gpu._env.step
        start, cpu._lives = gpu._rollout._frames.cpu().numpy().copy(), gpu._lives.copy()

        def recording(actions: np.ndarray, real: Any = real, steps: Any = steps) -> atari_vector.Step:
            steps.append((actions, real(actions)))
            return steps[-1][1]

        gpu._env.step = recording  # type: ignore[method-assign]
        loss = gpu.backward()
        gpu._env.step = real  # type: ignore[method-assign]

        played, acted = iter(steps), iter(steps)
        cpu._rollout.set_frames(start)
        cpu._env.step = lambda _, played=played: next(played)[1]  # type: ignore[method-assign]
        choose = cpu._rollout._choose

        def forced(step: int, choose: Any = choose, acted: Any = acted) -> Any:
            result = choose(step)
            cpu._rollout._actions[step] = torch.from_numpy(next(acted)[0])
            return result

        cpu._rollout._act = [lambda step=t, forced=forced: forced(step) for t in range(agent.unroll)]  # type: ignore[misc]
        expected_loss = cpu.backward()
        found, expected = (flatten(p.grad for p in one._model.parameters()).cpu() for one in (gpu, cpu))
        differences.append(((found - expected).norm() / expected.norm()).item())
        loss_differences.append(abs(loss.item() - expected_loss.item()))
        gpu.step()
        cpu.step()
    report.add("GPU against CPU: ‖∇f − ∇f‖/‖∇f‖", "relative", differences)
    report.add("GPU against CPU: |f − f|", "loss", loss_differences)
    gpu.close()
    cpu.close()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def latency(game: str, agent: AgentSettings, settings: AtariSettings, repeats: int, report: Report) -> None:
    """Measure the synchronous latency in milliseconds of one update, with and without graphs, and Leap's share."""
    prepare("cuda", 1, 0)
    arms: dict[str, A2C] = {}
    with_graphs = a2c.graph_for
    for name in ("eager", "graphs"):
        a2c.graph_for = with_graphs if name == "graphs" else lambda device: None  # type: ignore[assignment]
        arms[name] = learner_of(game, agent, settings, "cuda")
    a2c.graph_for = with_graphs
    pulls = {name: PullForward(learner.shared.values()) for name, learner in arms.items()}
    update: dict[str, list[float]] = {name: [] for name in arms}
    share: list[float] = []
    for _ in range(WARM_UP):
        for name, learner in arms.items():
            pulls[name].observe(learner.backward())
            learner.step()
    for _ in range(repeats):
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        leap: list[float] = []
        for _ in range(100):
            for name, learner in arms.items():
                learner._play()
                torch.cuda.synchronize()
                started = time.perf_counter()
                parts, gradients = learner._rollout.gradients()
                for parameter, gradient in zip(learner._model.parameters(), gradients, strict=True):
                    parameter.grad = gradient
                torch.cuda.synchronize()
                computed = time.perf_counter()
                pulls[name].observe(parts[0])
                torch.cuda.synchronize()
                observed = time.perf_counter()
                learner.step()
                torch.cuda.synchronize()
                seconds[name].append(time.perf_counter() - observed + computed - started)
                if name == "graphs":
                    leap.append(observed - computed)
        for name, values in seconds.items():
            update[name].append(1e3 * statistics.median(values))
        share.append(1e3 * statistics.median(leap))
    transitions = agent.envs * agent.unroll
    for name, values in update.items():
        report.add(f"update of {transitions} transitions, {name}", "ms", values)
    report.ratio("update with graphs / 0.5 ms", update["graphs"], [0.5] * repeats, target=1.0, at_most=True)
    report.add("Leap, energy", "ms per update", share)
    for learner in arms.values():
        learner.close()


def scale(count: int, given: Any, report: Report) -> None:
    """Compare `count` simultaneous workers with as many emulators without a learner."""
    rates: dict[str, list[float]] = {"emulator": [], "loop": []}
    shares: list[float] = []
    for repetition in range(given.repeats):
        for arm in [*rates][:: -1 if repetition % 2 else 1]:
            rate, leap = at_once(arm, count, given)
            rates[arm].append(rate)
            if arm == "loop":
                shares.append(leap)
            progress(f"{count} × {arm}: {rate:,.0f} agent steps/s")
    for arm, values in rates.items():
        report.add(f"{count} workers: {arm}", "agent steps/s", values)
    report.ratio(f"{count} workers: loop / emulator", rates["loop"], rates["emulator"], target=0.8)
    report.ratio(f"{count} workers: Leap's share", shares, [1.0] * given.repeats, target=0.01, at_most=True)


def at_once(arm: str, count: int, given: Any) -> tuple[float, float]:
    """Return the total agent steps/s of `count` processes and Leap's mean share of their time.

    Raises RuntimeError if one of them fails or they take too long; none is left running.
    """
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(count, timeout=START_SECONDS), context.Queue()
    arguments = (arm, given.preset, given.game, given.seconds, 1 / count, start, results)
    processes = [context.Process(target=work, args=(index, *arguments), daemon=True) for index in range(count)]
    found: list[tuple[float, float]] = []
    deadline = time.monotonic() + given.seconds + START_SECONDS
    try:
        for process in processes:
            process.start()
        while len(found) < count:
            failed = [process for process in processes if process.exitcode]
            if failed or time.monotonic() > deadline:
                raise RuntimeError(f"{arm}: {len(failed)} of {count} processes failed, and {len(found)} are done")
            with contextlib.suppress(queue.Empty):
                found.append(results.get(timeout=0.2))
        for process in processes:
            process.join()
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
    return sum(rate for rate, _ in found), statistics.mean(share for _, share in found)


def work(
    index: int, arm: str, preset: str, game: str, seconds: float, gpu_share: float, start: Barrier, results: Any
) -> None:
    """Run one process, which puts (agent steps/s, Leap's share) into the queue `results`."""
    prepare("cuda" if arm == "loop" else "cpu", 1, gpu_share)
    agent, settings = of_preset(preset)
    steps, in_leap = 0, 0.0
    if arm == "emulator":
        env = atari_vector.make(game, agent.envs, frames=settings.frames)
        env.reset(seed=index)
        drawn = np.random.default_rng(index).integers(0, len(env.actions), (512, agent.envs))
        start.wait()
        began = time.perf_counter()
        while (now := time.perf_counter()) - began < seconds:
            env.step(drawn[steps // agent.envs % 512])
            steps += agent.envs
    else:
        learner = learner_of(game, agent, settings, "cuda", seed=index)
        pull = PullForward(learner.shared.values())

        def update() -> None:
            nonlocal in_leap
            loss = learner.backward()
            observing = time.perf_counter()
            pull.observe(loss)
            in_leap += time.perf_counter() - observing
            learner.step()

        for _ in range(WARM_UP):
            update()
        torch.cuda.synchronize()
        start.wait()
        in_leap, began = 0.0, time.perf_counter()
        while (now := time.perf_counter()) - began < seconds:
            update()
            steps += learner.steps_per_update
        torch.cuda.synchronize()
        now = time.perf_counter()
    results.put((steps / (now - began), in_leap / (now - began)))


if __name__ == "__main__":
    sys.exit(main())

"""Compare the speed of an evaluation's runs with that of a bare training loop.

    python -m benchmarks.evaluation
    python -m benchmarks.evaluation --preset paper --games pong breakout --repeats 9

Both arms run whole tasks in this process, on one thread, in turn and with the same seed. `evaluation` runs a worker's
code for a lease, `training` runs the learner in a bare loop.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from benchmarks.harness import Report, interleaved, parser
from leap_dist.config.loading import resolve
from leap_dist.config.settings import Config
from leap_dist.envs import atari_vector
from leap_dist.nn.actor_critic import initialization
from leap_dist.nn.device import prepare
from leap_dist.protocol.messages import Ack, Contribution, Lease, Task
from leap_dist.worker.run_task import run_task
from leap_dist.worker.start import Start, make_learner


class _Taker:
    """Server stand-in that accepts every call at once."""

    def renew(self, *_: Any) -> Ack:
        return Ack(True, False, "", True, 0)

    def push(self, contribution: Contribution) -> Ack:
        return self.renew()

    def snapshot(self) -> Any:
        raise AssertionError("an evaluation does not follow φ")


def main() -> None:
    """Run the benchmark and print the report."""
    command = parser(__doc__, repeats=25)
    command.add_argument("--preset", default="quick")
    command.add_argument("--games", nargs="+", default=[])
    command.add_argument("--steps", type=int, default=4_000, help="agent steps per task")
    given = command.parse_args()
    settings = {"games": given.games, "task_steps": given.steps, "worker.device": "cpu", "meta_learner": "none"}
    config = resolve(given.preset, {name: value for name, value in settings.items() if value})
    prepare("cpu", 1, 0)
    report = Report("Evaluation beside bare training", {"preset": config.preset, "steps": config.task_steps})
    for game in config.games:
        measure(game, config, given.repeats, report)
    report.show(given.json)


def measure(game: str, config: Config, repeats: int, report: Report) -> None:
    """Measure both arms on one game."""
    _, vector = initialization(atari_vector.channels(config.atari.frames), 0)
    lease = Lease("000000-00000000", Task(0, game, 0, 1, config.task_steps), "w0", "i0", 0, 60.0)
    start = Start(vector, scope="encoder", evaluation=True)

    def training() -> None:
        learner = make_learner(config, lease, start)
        for _ in range(config.rollouts_per_task):
            learner.backward()
            learner.step()
        learner.close()

    def rate(task: Callable[[], object]) -> float:
        started = time.perf_counter()
        task()
        return config.task_steps / (time.perf_counter() - started)

    samples = interleaved(
        {
            "training": lambda: rate(training),
            "evaluation": lambda: rate(lambda: run_task(lease, start, config, _Taker())),
        },
        repeats,
        warmup=True,
    )
    for name, values in samples.items():
        report.add(f"{game}: {name}", "agent steps/s", values)
    report.ratio(f"{game}: evaluation / training", samples["evaluation"], samples["training"], target=0.98)


if __name__ == "__main__":
    main()

"""Measure the seconds from the last step of a task to the first step of the next, on the same worker.

    python -m benchmarks.task_gap
    python -m benchmarks.task_gap --games pong breakout --tasks 8 --preset paper

A server in a Ray actor grants the tasks, and one worker in this process trains them, with the service's own code. The
gap includes the final push, made durable before it is acknowledged, the next lease, its snapshot, the new learner, and
the choice of the first action. The server makes a meta-update after every `--batch-size` tasks.

A game is cold when the process runs it for the first time: ale-py then spends about 0.1 s on each emulator's color
tables, which later tasks of that game do not need.
"""

from __future__ import annotations

import tempfile
import time
import uuid
from pathlib import Path

import numpy as np
import ray

from benchmarks import clients
from benchmarks.harness import Report, parser
from leap_dist.config.loading import resolve
from leap_dist.config.settings import Config
from leap_dist.driver.actors import WorkerActor
from leap_dist.driver.clients import ServerClient
from leap_dist.envs import atari_vector
from leap_dist.nn.device import prepare
from leap_dist.protocol.messages import Idle


class Tape:
    """Recorder of environment steps: the first and last time of every task."""

    def __init__(self) -> None:
        self.tasks: list[tuple[str, float, float]] = []
        """Triples (game, start of the first step, end of the last step), one per task."""
        self._game = ""
        self._step = atari_vector.Atari.step
        tape = self

        def step(env: atari_vector.Atari, actions: np.ndarray) -> atari_vector.Step:
            started = time.perf_counter()
            result = tape._step(env, actions)
            tape._note(started)
            return result

        atari_vector.Atari.step = step  # type: ignore[method-assign]

    def begin(self, game: str) -> None:
        """Announce that the next task is of `game`."""
        self._game = game

    def _note(self, started: float) -> None:
        now = time.perf_counter()
        if self._game:
            self.tasks.append((self._game, started, now))
            self._game = ""
        else:
            game, first, _ = self.tasks[-1]
            self.tasks[-1] = (game, first, now)


def main() -> None:
    """Run the benchmark and print the report."""
    command = parser(__doc__, repeats=3)
    command.add_argument("--preset", default="fast")
    command.add_argument("--games", nargs="+", default=["pong", "breakout", "asterix"])
    command.add_argument("--tasks", type=int, default=6, help="tasks per game and repetition")
    command.add_argument("--task-steps", type=int, default=2_000)
    command.add_argument("--batch-size", type=int, default=4)
    given = command.parse_args()
    config = resolve(
        given.preset,
        {
            "games": given.games,
            "task_steps": given.task_steps,
            "meta.batch_size": given.batch_size,
            "meta_updates": len(given.games) * given.tasks * given.repeats // given.batch_size + 1,
            "workers": 1,
            "worker.device": "cpu",
        },
    )
    with clients.local_ray(), tempfile.TemporaryDirectory() as folder:
        tape = play(config, Path(folder) / "run", len(given.games) * given.tasks * given.repeats)
    cold, warm = gaps(tape)
    report = Report(
        "Seconds from a task's last step to the next task's first, one worker",
        {"preset": given.preset, "envs": config.agent.envs, "games": " ".join(given.games),
         "task-steps": given.task_steps, "batch-size": given.batch_size},
    )  # fmt: skip
    report.add("warm: a game played before", "s", warm)
    report.add("cold: its first task in the process", "s", cold)
    report.ratio("warm / 0.3 s", warm, [0.3] * len(warm), target=1.0, at_most=True)
    report.show(given.json)


def play(config: Config, run_dir: Path, tasks: int) -> Tape:
    """Train `tasks` tasks one after the other and return the recorded steps."""
    tape = Tape()
    prepare("cpu", 1, 0)
    server = clients.server_of(config, run_dir)
    worker = WorkerActor("w0", uuid.uuid4().hex, config, False)
    worker._client = ServerClient(server)
    for _ in range(tasks):
        answer = worker._client.call("lease", "w0", worker._incarnation)
        assert not isinstance(answer, Idle)
        tape.begin(answer[0].task.game)
        worker._work(answer)
    ray.kill(server)
    return tape


def gaps(tape: Tape) -> tuple[list[float], list[float]]:
    """Return (cold, warm) seconds between tasks. The first task has no gap."""
    seen, cold, warm = {tape.tasks[0][0]}, [], []
    for (_, _, ended), (game, began, _) in zip(tape.tasks, tape.tasks[1:], strict=False):
        (warm if game in seen else cold).append(began - ended)
        seen.add(game)
    return cold, warm


if __name__ == "__main__":
    main()

"""Several leases at once in one worker, whose tasks are trained in lockstep (setting `worker.stack`).

Each lease has its own learner, meta-learner, contributions and renewals, as in `run_task`; only the gradients are
computed together if that is faster. Task and lease, protocol and ledger are those of a worker with a single lease.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from leap_dist.config.settings import Config
from leap_dist.leap.learner import Learner
from leap_dist.nn.profiling import NoProfiler, Profiler, Stopwatch
from leap_dist.protocol.messages import Ack, Lease
from leap_dist.tasks.atari.video import NoVideo, VideoRecorder
from leap_dist.tasks.images import lockstep
from leap_dist.worker.heartbeat import Heartbeat
from leap_dist.worker.preemption import PreemptionNotice
from leap_dist.worker.run_task import Server, TaskRun, run_task
from leap_dist.worker.start import Start, make_learner


def run_leases(
    granted: Sequence[tuple[Lease, Start]],
    config: Config,
    server: Server,
    failed: Callable[[Lease, Exception], None],
    stopwatch: Stopwatch,
    profiler: Profiler | NoProfiler,
    video: VideoRecorder | NoVideo,
    notice: PreemptionNotice,
) -> None:
    """Train one task for each lease: a single one by `run_task`, several by `run_stack`."""
    if len(granted) > 1:
        run_stack(granted, config, server, failed, stopwatch=stopwatch, profiler=profiler, notice=notice)
        return
    ((lease, start),) = granted
    try:
        run_task(lease, start, config, server, stopwatch=stopwatch, profiler=profiler, video=video, notice=notice)
    except Exception as error:
        failed(lease, error)


def run_stack(
    granted: Sequence[tuple[Lease, Start]],
    config: Config,
    server: Server,
    failed: Callable[[Lease, Exception], None],
    *,
    clock: Callable[[], float] = time.monotonic,
    stopwatch: Stopwatch | None = None,
    profiler: Profiler | NoProfiler | None = None,
    notice: PreemptionNotice | None = None,
    together: Callable[[Sequence[Learner]], None] = lockstep.prepare,
) -> dict[str, Ack | None]:
    """Train one task for each lease, and return what `run_task` returns for it, by the id of the lease.

    A task that raises is passed to `failed` and left out; the others continue. `together` is called with the learners
    whose next gradient is due; an exception that it raises is passed to `failed` for each of them.
    """
    stopwatch, observers = stopwatch or Stopwatch(), (profiler or NoProfiler(), NoVideo())
    acks: dict[str, Ack | None] = {}
    running: dict[str, tuple[Lease, Learner, TaskRun, Iterator[None]]] = {}

    def end(lease: Lease, error: Exception | None = None) -> None:
        running.pop(lease.id)[1].close()
        if error is not None:
            failed(lease, error)

    beat = Heartbeat([lease for lease, _ in granted], server, config.worker.heartbeat_seconds, clock)
    try:
        for lease, start in granted:
            try:
                with stopwatch("starting"):
                    learner = make_learner(config, lease, start, stopwatch, beat)
                    beat()
                task = TaskRun(
                    lease, start, learner, config, server, clock, stopwatch, *observers, notice or PreemptionNotice()
                )
            except Exception as error:
                failed(lease, error)
            else:
                running[lease.id] = lease, learner, task, task.updates()
        while running:
            for lease, _, task, updates in list(running.values()):
                try:
                    next(updates)
                except StopIteration:
                    acks[lease.id] = task.ack
                    end(lease)
                except Exception as error:
                    end(lease, error)
            try:
                with stopwatch("update"):
                    together([learner for _, learner, *_ in running.values()])
            except Exception as error:
                for lease, *_ in list(running.values()):
                    end(lease, error)
    finally:
        for _, learner, *_ in running.values():
            learner.close()
    return acks

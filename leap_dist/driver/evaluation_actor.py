"""The Ray actor that wraps EvaluationServer. The workers are the same as in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ray

from leap_dist.config.settings import Config
from leap_dist.driver.actor_messages import NO_VECTOR, Grant
from leap_dist.driver.actors import ServerProcess
from leap_dist.evaluation import initializations
from leap_dist.evaluation.runs import Run
from leap_dist.evaluation.server import EvaluationServer
from leap_dist.protocol.messages import Ack, Lease
from leap_dist.worker.start import Start


class EvaluationActor(ServerProcess):
    """An EvaluationServer in a Ray actor."""

    def _make(self, config: Config, runs: list[Run], out: Path, session: str) -> EvaluationServer:
        chosen = {run.arm.label: run.arm for run in runs}
        return EvaluationServer(config, runs, initializations.vectors(list(chosen.values())), out, session=session)

    def _grant(self, lease: Lease) -> Grant:
        vector, scope, rate = self._server.start(lease)
        state = self._server.state_of(lease)
        start = Start(NO_VECTOR, scope=scope, evaluation=True, learning_rate=rate, state=state)
        return Grant(lease, ray.put(vector), start)

    def save_state(self, lease_id: str, incarnation: str, state: bytes, steps: int) -> Ack:
        """Keep the state of a running agent; see EvaluationServer.save_state."""
        return self._with_stop(self._server.save_state(lease_id, incarnation, state, steps))


EVALUATION: Any = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)(EvaluationActor)

"""Check every node before it gets workers: when it joins, and again from time to time while it is left out."""

from __future__ import annotations

import secrets
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from leap_dist.config import files
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver import node_report
from leap_dist.driver.errors import ClusterError
from leap_dist.driver.node_report import Answer, Question, Verdict
from leap_dist.driver.nodes import Node, Nodes
from leap_dist.driver.placement import Need, candidates, others_may_come
from leap_dist.driver.signals import StopSignal

ANSWER_SECONDS = 60.0  # the first process on a node takes a while to start
AGAIN_SECONDS = 60.0
"""Time after which a node that was left out is asked again."""
OF_INPUT = ("run-dir:", "data_dir:")
"""Prefixes of messages that are about the user's input rather than a node."""


class NoChecks:
    """Null object that passes every node, for a run on this machine alone without a GPU that torch may fail to use."""

    alerts: list[str] = []  # noqa: RUF012  (it stays empty)

    def follow(self, nodes: Mapping[str, Node]) -> None:
        """Do nothing."""

    def passed(self, nodes: Mapping[str, Node]) -> dict[str, Node]:
        """Return all nodes."""
        return dict(nodes)

    def doubt(self, name: str, *, occupied: bool) -> None:
        """Do nothing."""

    def is_doubted(self, name: str) -> bool:
        """Return False."""
        return False

    def wait(self, nodes: Mapping[str, Node], stop: StopSignal, *, others_may_come: bool) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class NodeChecks(NoChecks):
    """Asks each node about itself when it joins, and decides whether it gets workers.

    Args:
        config: the run's configuration.
        folder: an existing directory that all nodes must share, or None.
    """

    def __init__(self, config: Config, folder: Path | None) -> None:
        self._folder = folder
        self._device = config.worker.device
        self._games = config.games if config.tasks == "atari" else ()
        self._data_dir = config.data_dir if config.is_supervised else ""
        self._content = secrets.token_hex(16)
        self._probe: Path | None = None
        self._asked: dict[str, tuple[Any, float]] = {}  # reference to the answer, and when it was asked, by node
        self._verdicts: dict[str, tuple[Verdict, float]] = {}  # with the time, by node
        self._doubted: dict[str, bool] = {}  # whether workers occupy the node's GPUs, by node
        self._said: set[str] = set()
        self.alerts = []
        """Messages that the user has not been shown yet."""

    def follow(self, nodes: Mapping[str, Node]) -> None:
        """Ask nodes that are new or were left out a while ago, and take the answers that have arrived. Never blocks.

        Raises ConfigError if the probe file cannot be written.
        """
        now = time.monotonic()
        self._asked = {name: asked for name, asked in self._asked.items() if name in nodes}
        self._verdicts = {name: verdict for name, verdict in self._verdicts.items() if name in nodes}
        self._doubted = {name: occupied for name, occupied in self._doubted.items() if name in nodes}
        for name, node in nodes.items():
            verdict, decided = self._verdicts.get(name, (None, -AGAIN_SECONDS))
            due = verdict is None or (_is_to_be_asked_again(verdict, node) and now - decided >= AGAIN_SECONDS)
            if (due or name in self._doubted) and name not in self._asked:
                self._asked[name] = (self._ask(name, node), now)
        for name, (reference, asked) in list(self._asked.items()):
            if ray.wait([reference], timeout=0)[0]:
                del self._asked[name]
                self._take(name, nodes[name], reference)
            elif now - asked > ANSWER_SECONDS:
                del self._asked[name]
                ray.cancel(reference, force=True)
                self._decide(name, Verdict(None, [_silent(nodes[name], f"for {ANSWER_SECONDS:.0f} s")]))
        if not self._asked:
            self._remove_probe()

    def passed(self, nodes: Mapping[str, Node]) -> dict[str, Node]:
        """Return the nodes that may get workers, with the resources that workers can use."""
        verdicts = {name: self._verdicts[name][0].node for name in nodes if name in self._verdicts}
        return {name: node for name, node in verdicts.items() if node is not None}

    def doubt(self, name: str, *, occupied: bool) -> None:
        """Ask a node that has passed again, because workers keep failing there. Until then, it should get no others.

        `occupied` says whether workers of this run hold memory of its GPUs, so that their free memory says nothing.
        """
        verdict = self._verdicts[name][0] if name in self._verdicts else None
        if verdict is None or verdict.node is None or name in self._asked:
            return
        self._doubted[name] = occupied
        self.alerts.append(f"workers keep failing on node {verdict.node.host}, which is checked again")

    def is_doubted(self, name: str) -> bool:
        """Return whether a node that had passed is being asked again."""
        return name in self._doubted

    def wait(self, nodes: Mapping[str, Node], stop: StopSignal, *, others_may_come: bool) -> None:
        """Wait until every node has been judged.

        Raises ConfigError or ClusterError, with the first node's message, if none passed and `others_may_come`
        is not set; Stopped.
        """
        try:
            self.follow(nodes)
            while not all(name in self._verdicts for name in nodes):
                stop.wait(0.1)
                stop.check()
                self.follow(nodes)
        except BaseException:
            self.close()
            raise
        if nodes and not self.passed(nodes) and not others_may_come:
            line = next(iter(self._verdicts.values()))[0].lines[0]
            raise (ConfigError if line.startswith(OF_INPUT) else ClusterError)(line)

    def _ask(self, name: str, node: Node) -> Any:
        gpus = self._device != "cpu" and node.resources.get("GPU", 0) > 0
        question = Question(self._probe_path(), self._data_dir, self._games, node_report.GPU_SCRIPT if gpus else "")
        remote: Any = ray.remote(num_cpus=0, max_retries=0)(_shipped(node_report.report))
        here = NodeAffinitySchedulingStrategy(name, soft=False)
        return remote.options(scheduling_strategy=here).remote(tuple(question), node_report.PACKAGES)

    def _take(self, name: str, node: Node, reference: Any) -> None:
        try:
            answer = Answer(*ray.get(reference))
        except RayError as error:
            self._decide(name, Verdict(None, [_silent(node, f"({type(error).__name__})")]))
            return
        before = self._verdicts[name][0].node if self._doubted.get(name) else None
        verdict = node_report.judge(
            node,
            answer,
            gpu_bytes=None if before is None else before.gpu_bytes,
            content=self._content,
            folder=self._folder,
            data_dir=self._data_dir,
            device=self._device,
        )
        self._decide(name, verdict)

    def _decide(self, name: str, verdict: Verdict) -> None:
        self._verdicts[name] = verdict, time.monotonic()
        lines = verdict.lines if verdict.node is not None else [f"{verdict.lines[0]}. The node is left out"]
        was_doubted = self._doubted.pop(name, None) is not None
        self.alerts += [line for line in lines if was_doubted or line not in self._said]
        self._said.update(lines)

    def _probe_path(self) -> str:
        """Return the path of the probe file, and create it if it does not exist; "" if nothing is to be shared."""
        if self._folder is None:
            return ""
        if self._probe is None:
            path = self._folder / f".probe-{self._content[:8]}"
            try:
                with files.create_new(path) as file:
                    file.write(self._content.encode())
            except OSError as error:
                raise ConfigError(
                    f"run-dir: {self._folder} cannot be written ({error.strerror}); choose another"
                ) from None
            self._probe = path
        return str(self._probe)

    def _remove_probe(self) -> None:
        if self._probe is not None:
            self._probe.unlink(missing_ok=True)
            self._probe = None

    def close(self) -> None:
        """Remove the probe file."""
        self._remove_probe()


def _shipped(function: Any) -> Any:
    """Return a copy of a function that Ray ships by value, so that a node needs none of our code to run it."""
    copy = types.FunctionType(function.__code__, {"__builtins__": __builtins__}, function.__name__)
    copy.__module__ = "__main__"
    return copy


def _is_to_be_asked_again(verdict: Verdict, node: Node) -> bool:
    """Return whether a node has to be asked again, because it or its GPUs were left out."""
    return verdict.node is None or verdict.node.resources.get("GPU") != node.resources.get("GPU")


def _silent(node: Node, how: str) -> str:
    return f"address: node {node.host} has not answered {how}; see Ray's logs there"


def check_nodes(
    config: Config, nodes: Nodes, folder: Path | None, stop: StopSignal, announce: Callable[[str], None]
) -> tuple[NoChecks, list[Node]]:
    """Check the nodes that have room for workers. Returns the checks, and the nodes that may get workers.

    `folder` is a directory that the nodes of a cluster must share, or None. Raises ConfigError or ClusterError if no
    node can be used and no other may come; Stopped.
    """
    there = candidates(Need.of(config), nodes.view.staying)
    checks = checks_for(config, there, folder)
    if isinstance(checks, NodeChecks):
        announce("checking the nodes")
    checks.wait(there, stop, others_may_come=others_may_come(config))
    return checks, list((checks.passed(there) if there else nodes.view.staying).values())


def checks_for(config: Config, nodes: Mapping[str, Node], folder: Path | None) -> NoChecks:
    """Return the checks that a run needs: none if it runs on this machine alone, unless that has a GPU to be used.

    `folder` is a directory that the nodes of a cluster must share, or None.
    """
    if config.address != "local":
        return NodeChecks(config, folder)
    may_use_gpu = config.worker.device != "cpu" and any(node.resources.get("GPU") for node in nodes.values())
    return NodeChecks(config, None) if may_use_gpu else NoChecks()

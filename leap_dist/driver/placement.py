"""How many workers fit on the current nodes, and on those that an autoscaler may add."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import ray
import yaml
from ray.autoscaler.sdk import request_resources

from leap_dist.config import labels
from leap_dist.config.loading import ConfigError
from leap_dist.config.settings import Config
from leap_dist.driver import memory
from leap_dist.driver.nodes import Node

log = logging.getLogger(__name__)

UNLIMITED = sys.maxsize


class Need(NamedTuple):
    """Resources and labels that one worker requires of its node."""

    cpus: float
    gpus: float
    labels: dict[str, str]
    """Conditions in Ray's syntax; see leap_dist.config.labels."""

    @classmethod
    def of(cls, config: Config) -> Need:
        """Return what a worker with this configuration requires."""
        return cls(config.worker.cpus, config.worker.gpus, labels.parse(config.worker.labels))

    def fits(self, resources: Mapping[str, float], node_labels: Mapping[str, str] | None) -> int:
        """Return how many workers fit on a node. Pass None for labels that are not known; they are assumed to match."""
        if node_labels is not None and not labels.match(self.labels, node_labels):
            return 0
        cpus = resources.get("CPU", 0) / self.cpus
        return int((min(cpus, resources.get("GPU", 0) / self.gpus) if self.gpus else cpus) + 1e-9)

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs, {self.gpus:g} GPUs{' and ' + _shown(self.labels) if self.labels else ''}"


class Group(NamedTuple):
    """A group of equal nodes that an autoscaler may add."""

    resources: dict[str, float]
    labels: dict[str, str] | None
    """Labels of the nodes, or None where they are not known."""
    max_count: int


def autoscaler_groups(address: str) -> list[Group] | None:
    """Return what the autoscaler of the cluster at `address` may add, or None where none is known.

    Some platforms register their groups with Ray; `ray up` leaves its configuration in the head's home directory.
    """
    if address == "local":  # even if this machine is the head node of a cluster made by `ray up`
        return None
    return _registered_groups() or _ray_up_groups(Path.home() / "ray_bootstrap_config.yaml")


def max_workers(need: Need, groups: Sequence[Group]) -> int:
    """Return how many workers would fit on all the nodes that may be added."""
    return min(UNLIMITED, sum(group.max_count * need.fits(group.resources, group.labels) for group in groups))


def total_with_autoscaler(name: str, nodes: Sequence[Node], address: str) -> float:
    """Return the total of one resource over the current nodes and the nodes that the autoscaler may add."""
    return sum(node.resources.get(name, 0.0) for node in nodes) + sum(
        group.max_count * group.resources.get(name, 0.0) for group in autoscaler_groups(address) or ()
    )


def gpus_per_worker(config: Config, total_gpus: float) -> float:
    """Return the GPUs to reserve for a worker: as configured, or else an even share of the total, which may be 0.

    With `wait_for_nodes`, GPUs that are missing may come with later nodes.

    Raises ConfigError where the configuration asks for GPUs and there are too few.
    """
    wanted = config.worker
    if wanted.device == "cpu" or (wanted.device == "auto" and not wanted.gpus and not total_gpus):
        return 0.0
    if total_gpus < max(wanted.gpus, 1e-9):
        if config.wait_for_nodes and config.address != "local":
            return wanted.gpus or 1.0
        field = "worker.gpus" if wanted.gpus else "worker.device"
        value = f"{wanted.gpus:g}" if wanted.gpus else wanted.device
        raise ConfigError(f"{field}: {value} asked for, but there are {total_gpus:g} GPUs; use --worker.device cpu")
    return wanted.gpus or min(1.0, total_gpus / config.workers)


def fit_resources(config: Config, nodes: Sequence[Node]) -> tuple[Config, list[str]]:
    """Return the configuration with what its workers get on these nodes, and alerts where that is less than asked for.

    Raises ConfigError where there are too few GPUs.
    """
    config, alerts = memory.fit(config)
    gpus = gpus_per_worker(config, total_with_autoscaler("GPU", nodes, config.address))
    return replace(config, worker=replace(config.worker, device="cuda" if gpus else "cpu", gpus=gpus)), alerts


def ask_autoscaler(need: Need, workers: int) -> None:
    """Ask the autoscaler, if there is one, for room for `workers` workers. The request holds until the next one."""
    bundle = {"CPU": need.cpus, **({"GPU": need.gpus} if need.gpus else {})}
    try:
        request_resources(bundles=[bundle] * workers, bundle_label_selectors=[need.labels] * workers or None)
    except Exception as error:  # Ray has retried already; nodes that join anyway are used all the same
        log.warning("the autoscaler could not be asked for nodes: %s", error)


def explain_lack(need: Need, least: int, fit: int, nodes: Sequence[Node], autoscaled: bool) -> str:
    """Return an error message for when only `fit` of at least `least` workers can run, with what to do about it."""
    wait = "" if autoscaled else ", or give --wait-for-nodes where nodes will join"
    where = f"on the {len(nodes)} nodes there are{' and those that the autoscaler may bring' if autoscaled else ''}"
    if fit:
        return f"min_workers: {least} asked for, but {fit} fit {where}; use --min-workers {fit}{wait}"
    if not any(labels.match(need.labels, node.labels) for node in nodes) and not autoscaled:
        wanted = need.labels.keys()
        there = sorted({f"{name}={value}" for node in nodes for name, value in node.labels.items() if name in wanted})
        return (
            f"worker.labels: {_shown(need.labels)} asked for, but the nodes have "
            f"{', '.join(there)[:200] or 'no such label'}; choose one of those{wait}"
        )
    largest = {name: max((node.resources.get(name, 0) for node in nodes), default=0) for name in ("CPU", "GPU")}
    field = "worker.gpus" if need.gpus > largest["GPU"] else "worker.cpus"
    have = f"up to {largest['CPU']:g} CPUs and {largest['GPU']:g} GPUs"
    return f"{field}: no room for a worker with {need} {where}, which have {have}; ask for less{wait}"


def _shown(conditions: Mapping[str, str]) -> str:
    return ", ".join(
        f"{name}!={value[1:]}" if value.startswith("!") else f"{name}={value}" for name, value in conditions.items()
    )


def _registered_groups() -> list[Group] | None:
    try:
        config = ray._private.state.state.get_cluster_config()
    except Exception:  # the interface is not public and may change
        return None
    if config is None:
        return None
    return [
        Group(dict(group.resources), None, UNLIMITED if group.max_count < 0 else group.max_count)
        for group in config.node_group_configs
    ] or None


def _ray_up_groups(path: Path) -> list[Group] | None:
    try:
        types = yaml.safe_load(path.read_text())["available_node_types"]
        return [_parse_group(group) for group in types.values()] or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None


def _parse_group(group: Mapping[str, Any]) -> Group:
    resources = {str(name): float(amount) for name, amount in (group.get("resources") or {}).items()}
    node_labels = {str(name): str(value) for name, value in (group.get("labels") or {}).items()}
    return Group(resources, node_labels, int(group.get("max_workers", 0)))

"""How many workers fit: on the nodes that are there, and on those that an autoscaler may bring."""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ray
import yaml
from ray.autoscaler.sdk import request_resources

from leap_dist.config import labels
from leap_dist.config.settings import Config
from leap_dist.driver.nodes import Node

log = logging.getLogger(__name__)

WITHOUT_LIMIT = sys.maxsize


class Need(NamedTuple):
    """What a worker needs of its node."""

    cpus: float
    gpus: float
    labels: dict[str, str]
    """Conditions in Ray's form; see leap_dist.config.labels."""

    @classmethod
    def of(cls, config: Config) -> Need:
        """The configuration's."""
        return cls(config.worker.cpus, config.worker.gpus, labels.parse(config.worker.labels))

    def fits(self, resources: Mapping[str, float], of: Mapping[str, str] | None) -> int:
        """How many workers fit on a node with these resources and labels; None: its labels are not known."""
        if of is not None and not labels.match(self.labels, of):
            return 0
        cpus = resources.get("CPU", 0) / self.cpus
        return int((min(cpus, resources.get("GPU", 0) / self.gpus) if self.gpus else cpus) + 1e-9)

    def __str__(self) -> str:
        return f"{self.cpus:g} CPUs, {self.gpus:g} GPUs{' and ' + _shown(self.labels) if self.labels else ''}"


class Group(NamedTuple):
    """Nodes of one kind that an autoscaler may bring."""

    resources: dict[str, float]
    labels: dict[str, str] | None
    """None where they are not known."""
    most: int


def autoscaler_groups(address: str) -> list[Group] | None:
    """What the autoscaler of the cluster at `address` may bring; None where nothing is known of one.

    Some platforms tell Ray; `ray up` leaves its configuration in the head's home directory.
    """
    if address == "local":  # also on the head of a cluster that ray up has made
        return None
    return _told() or _launched(Path.home() / "ray_bootstrap_config.yaml")


def most_that_fit(need: Need, bring: Sequence[Group]) -> int:
    """How many workers would fit on all the nodes that may be brought."""
    return min(WITHOUT_LIMIT, sum(group.most * need.fits(group.resources, group.labels) for group in bring))


def total_with_autoscaler(name: str, nodes: Sequence[Node], address: str) -> float:
    """Of a resource, on the nodes there are and those that may come."""
    return sum(node.resources.get(name, 0.0) for node in nodes) + sum(
        group.most * group.resources.get(name, 0.0) for group in autoscaler_groups(address) or ()
    )


def ask_autoscaler(need: Need, workers: int) -> None:
    """Asks the autoscaler, where there is one, for room for so many workers: until asked for something else."""
    bundle = {"CPU": need.cpus, **({"GPU": need.gpus} if need.gpus else {})}
    try:
        request_resources(bundles=[bundle] * workers, bundle_label_selectors=[need.labels] * workers or None)
    except Exception as error:  # Ray's own retries are over: nodes that come anyway are used all the same
        log.warning("the autoscaler could not be asked for nodes: %s", error)


def no_room(need: Need, least: int, fit: int, nodes: Sequence[Node], autoscaled: bool) -> str:
    """Why `least` workers cannot be had, of which `fit` can, and what to do about it."""
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


def _told() -> list[Group] | None:
    try:
        config = ray._private.state.state.get_cluster_config()
    except Exception:  # not a public interface
        return None
    if config is None:
        return None
    return [
        Group(dict(group.resources), None, WITHOUT_LIMIT if group.max_count < 0 else group.max_count)
        for group in config.node_group_configs
    ] or None


def _launched(path: Path) -> list[Group] | None:
    try:
        types = yaml.safe_load(path.read_text())["available_node_types"]
        return [_group(kind) for kind in types.values()] or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None


def _group(kind: Mapping[str, Any]) -> Group:
    resources = {str(name): float(amount) for name, amount in (kind.get("resources") or {}).items()}
    named = {str(name): str(value) for name, value in (kind.get("labels") or {}).items()}
    return Group(resources, named, int(kind.get("max_workers", 0)))

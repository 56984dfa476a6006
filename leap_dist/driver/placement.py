"""Placement of workers: how many fit on the current nodes, and on those that an autoscaler may add."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import ray
import yaml

from leap_dist.config import labels
from leap_dist.config.loading import ConfigError
from leap_dist.config.plurals import counted
from leap_dist.config.settings import Config
from leap_dist.config.validation import SMALLEST_SHARE
from leap_dist.driver import memory
from leap_dist.driver.nodes import Node

UNLIMITED = sys.maxsize
GROUP_LABEL = "ray.io/node-group"
"""Label in which Ray says which of the autoscaler's groups a node belongs to."""
MPS_CLIENTS = 48
"""Number of processes that NVIDIA's MPS admits to one GPU, up to CUDA 13.0."""
MPS_LIMIT, TASK_LIMIT = "MPS clients", "tasks"
"""Limits of a node on which no more workers may share a GPU, or more would never have a task."""
MANY_PROCESSORS = 8
"""If the node of the server and the driver has at least this many processors, it reserves one for them."""


class Room(NamedTuple):
    """How many workers a node has room for, and what each of them gets there."""

    workers: int
    device: Literal["cpu", "cuda"]
    """Device on which they compute."""
    gpus: float
    """GPUs that Ray reserves for each."""
    limit: str
    """The resource that limits the number of workers."""


class Need(NamedTuple):
    """Resources and labels that one worker requires of its node."""

    cpus: float
    gpus: float | None
    """GPUs on a node that has some; None for the largest share that leaves no processor of the node idle."""
    labels: dict[str, str]
    """Conditions in Ray's syntax; see leap_dist.config.labels."""
    device: str = "cuda"
    """Where workers compute if they get a GPU. With "auto", nodes without one take workers too, on processors."""
    fills: bool = False
    """Whether a node gets as many workers as fit into its memory, rather than a number that the user asked for."""
    most: int = UNLIMITED
    """Number of workers that there will be at most. If they all fit on one node, they share all of its GPUs."""
    most_per_gpu: int = UNLIMITED
    """Number of processes that may share a GPU."""

    @classmethod
    def of(cls, config: Config, most_workers: int = UNLIMITED) -> Need:
        """Return what a worker with this configuration requires. More than `most_workers` would never have a task."""
        worker = config.worker
        gpus = worker.gpus or (0.0 if worker.device == "cpu" else None)
        fills = config.workers == "auto"
        most = config.workers if config.workers != "auto" else max(most_workers, config.min_workers)
        per_gpu = MPS_CLIENTS if worker.mps == "auto" else UNLIMITED
        return cls(worker.cpus, gpus, labels.parse(worker.labels), worker.device, fills, most, per_gpu)

    def fits(self, resources: Mapping[str, float], node_labels: Mapping[str, str] | None) -> int:
        """Return how many workers fit on a node. Pass None for labels that are not known; they are assumed to match."""
        return self.room(resources, node_labels).workers

    def on(self, node: Node, *, hosts_server: bool = False) -> Room:
        """Return how many workers a node of the cluster has room for; see `room`.

        If only bundles of it are reserved for this program, a worker must fit into one of them. If some of these have
        GPUs for workers, the others are not used.
        """
        parts = node.bundles or (node.resources,)
        rooms = [
            self.room(part, node.labels, gpu_bytes=node.gpu_bytes, hosts_server=hosts_server and number == 0)
            for number, part in enumerate(parts)
        ]
        used = [room for room in rooms if room.workers] or rooms[:1]
        used = [room for room in used if room.device == "cuda"] or used
        workers = sum(room.workers for room in used)
        return used[0]._replace(workers=workers, gpus=min(room.gpus for room in used))

    def room(
        self,
        resources: Mapping[str, float],
        node_labels: Mapping[str, str] | None,
        *,
        gpu_bytes: float = math.inf,
        hosts_server: bool = False,
    ) -> Room:
        """Return how many workers a node has room for.

        Args:
            resources: what the node has in all, in Ray's names and units.
            node_labels: its labels, or None if they are not known; they are then assumed to match.
            gpu_bytes: free memory of each of its GPUs.
            hosts_server: whether the server and the driver run there. They use a few hundredths of a processor, so
                workers may use all processors of a small node; a large node reserves one for server and driver.
        """
        if node_labels is not None and not labels.match(self.labels, node_labels):
            return Room(0, "cpu", 0.0, "labels")
        on_cpu, cpu_limit = self._on_processors(resources, memory.WORKER_BYTES, hosts_server=hosts_server)
        if self.gpus == 0:
            return Room(on_cpu, "cpu", 0.0, cpu_limit)
        most, limit = self._on_processors(resources, memory.CUDA_WORKER_BYTES, hosts_server=hosts_server)
        on_gpus, gpus, gpu_limit = self._on_gpus(_devices(resources.get("GPU", 0.0)), most, gpu_bytes)
        if self.device == "auto" and on_gpus == 0:
            return Room(on_cpu, "cpu", 0.0, cpu_limit)
        limit = gpu_limit if on_gpus < most else limit
        return Room(max(0, min(most, on_gpus)), "cpu" if self.device == "cpu" else "cuda", gpus, limit)

    def _on_processors(
        self, resources: Mapping[str, float], worker_bytes: int, *, hosts_server: bool
    ) -> tuple[int, str]:
        """Return how many workers a node's processors and memory suffice for, and which of both limits them."""
        processors = resources.get("CPU", 0.0)
        kept = 1.0 if self.fills and hosts_server and processors >= MANY_PROCESSORS else 0.0
        bounds = [(max(0, _whole((processors - kept) / self.cpus)), "processors")]
        if self.fills:
            by_memory = _whole(resources.get("memory", math.inf) / worker_bytes)
            bounds.append((max(1, by_memory), "memory"))  # at least one is tried
        return min(bounds)

    def _on_gpus(self, devices: Sequence[float], most: int, gpu_bytes: float) -> tuple[int, float, str]:
        """Return how many workers fit on the GPUs, the GPUs that each gets, and what limits the number of workers.

        Ray takes a share from one device, never from two, so each device, or part of one that is reserved for this
        program, holds a whole number of workers.
        """
        if not devices:
            return 0, self.gpus or 0.0, "GPUs"
        if self.gpus is None:
            # Ray fills one device before it takes the next, so the share must be as large as the workers that will
            # really run on this node allow. Whether others run elsewhere does not matter: nodes come and go.
            least = min(devices)
            each, limit = min(
                (-(-min(most, self.most) // len(devices)), TASK_LIMIT),
                (_whole(least * gpu_bytes / memory.WORKER_GPU_BYTES), "GPU memory"),
                (self.most_per_gpu, MPS_LIMIT),
            )
            each = max(1, each)
            holds = [min(each * _whole(device / least), max(each, self.most_per_gpu)) for device in devices]
            return sum(holds), share_of(each, least), limit
        if self.gpus > 1:
            return _whole(_whole(sum(devices)) / self.gpus), self.gpus, "worker.gpus"
        holds = [min(_whole(device / self.gpus), self.most_per_gpu) for device in devices]
        limit = MPS_LIMIT if self.most_per_gpu in holds else "worker.gpus"
        return sum(holds), self.gpus, limit

    def __str__(self) -> str:
        where = f" on nodes with {_shown(self.labels)}" if self.labels else ""
        return f"{counted(self.cpus, 'CPU')} and {counted(self.gpus or 0, 'GPU')}{where}"


def share_of(workers: int, part: float = 1.0) -> float:
    """Return the share of a GPU for each of `workers` workers, rounded down to the steps in which Ray counts.

    They share the given part of the GPU.
    """
    steps = round(1 / SMALLEST_SHARE)
    return math.floor(round(part * steps) / workers) / steps


def candidates(need: Need, nodes: Mapping[str, Node]) -> dict[str, Node]:
    """Return the nodes that have room for workers, whether or not they are fit for them."""
    return {name: node for name, node in nodes.items() if need.on(node).workers}


def waits_for_nodes(config: Config) -> bool:
    """Return whether to wait for nodes that nobody has announced. None can join a cluster on this machine alone."""
    return config.wait_for_nodes and can_be_joined(config)


def can_be_joined(config: Config) -> bool:
    """Return whether nodes may join the cluster: it is not one on this machine alone."""
    return config.address != "local"


def others_may_come(config: Config) -> bool:
    """Return whether further nodes may join the cluster."""
    return waits_for_nodes(config) or autoscaler_groups(config.address) is not None


def _devices(gpus: float) -> list[float]:
    """Return the whole GPUs of a node or bundle, and the part of another one if there is such a part."""
    whole = _whole(gpus)
    part = round(gpus - whole, 4)
    return [1.0] * whole + ([part] if part > 0 else [])


def _whole(number: float) -> int:
    return UNLIMITED if math.isinf(number) else int(number + 1e-9)


class Group(NamedTuple):
    """A group of equal nodes that an autoscaler may add."""

    resources: dict[str, float]
    labels: dict[str, str] | None
    """Labels of the nodes, or None if they are not known."""
    max_count: int
    name: str = ""
    """The autoscaler's name for the group, which its nodes have in the label GROUP_LABEL."""


def autoscaler_groups(address: str) -> list[Group] | None:
    """Return what the autoscaler of the cluster at `address` may add, or None if none is known.

    Some platforms register their groups with Ray; `ray up` leaves its configuration in the head's home directory.
    """
    if address == "local":  # even if this machine is the head node of a cluster made by `ray up`
        return None
    return _registered_groups() or _ray_up_groups(Path.home() / "ray_bootstrap_config.yaml")


def max_workers(need: Need, groups: Sequence[Group]) -> int:
    """Return how many workers would fit on all the nodes that may be added."""
    return min(UNLIMITED, sum(group.max_count * need.fits(group.resources, group.labels) for group in groups))


def total_with_autoscaler(name: str, nodes: Sequence[Node], address: str) -> float:
    """Return the total of one resource over the current nodes and the nodes that the autoscaler may add.

    The nodes of a group count as its maximum, whether or not they are up.
    """
    groups = autoscaler_groups(address) or ()
    names = group_names(groups)
    others = [node for node in nodes if node.labels.get(GROUP_LABEL) not in names]
    return sum(node.resources.get(name, 0.0) for node in others) + sum(
        group.max_count * group.resources.get(name, 0.0) for group in groups
    )


def group_names(groups: Sequence[Group]) -> set[str]:
    """Return the names of the groups that have one, which are the values of GROUP_LABEL on their nodes."""
    return {group.name for group in groups if group.name}


def gpus_per_worker(config: Config, total_gpus: float) -> float:
    """Return the GPUs to reserve for a worker: as configured, or else an even share of the total.

    0 means that there are none, or that each node's own number of processors decides. With `wait_for_nodes`, GPUs that
    are missing may come with later nodes.

    Raises ConfigError if the configuration asks for GPUs and there are too few.
    """
    wanted = config.worker
    if wanted.device == "cpu" or (wanted.device == "auto" and not wanted.gpus and not total_gpus):
        return 0.0
    if total_gpus < max(wanted.gpus, 1e-9):
        if waits_for_nodes(config):
            return wanted.gpus or 1.0
        field = "worker.gpus" if wanted.gpus else "worker.device"
        value = f"{wanted.gpus:g}" if wanted.gpus else wanted.device
        raise ConfigError(
            f"{field}: {value} requested, but the cluster has {counted(total_gpus, 'GPU')}; use --worker.device cpu"
        )
    if wanted.gpus or config.workers == "auto":
        return wanted.gpus
    return share_of(math.ceil(config.workers / total_gpus))


def fit_resources(config: Config, nodes: Sequence[Node], *, one_kind: bool = False) -> tuple[Config, list[str]]:
    """Return the configuration with what its workers get on these nodes, and alerts where that is less than asked for.

    Nodes with GPUs and nodes without both get workers unless the configuration names a device. With `one_kind`, all
    workers compute on the same kind of device, so that the bits of a task's result do not depend on where it runs. If
    no node can hold a worker yet, the kind stays "auto", and `of_one_kind` decides it later.

    A share of a GPU that nobody asked for is not smaller than the memory that a worker needs there.

    Raises ConfigError if there are too few GPUs.
    """
    total, device = total_with_autoscaler("GPU", nodes, config.address), config.worker.device
    config, alerts = memory.fit(config, on_gpus=bool(total) and device != "cpu")
    gpus = gpus_per_worker(config, total)
    if gpus and not config.worker.gpus:
        free = min((node.gpu_bytes for node in nodes if node.resources.get("GPU")), default=math.inf)
        most = max(1, _whole(free / memory.WORKER_GPU_BYTES))
        if share_of(most) > gpus:
            gpus = share_of(most)
            alerts.append(
                f"at most {counted(most, 'worker')} share a GPU: each takes about {memory.WORKER_GPU_BYTES / 2**30:g} "
                f"GB of its memory, and {free / 2**30:.1f} GB are free; give --worker.gpus to decide it yourself"
            )
    if device == "auto" and one_kind and (total or any(Need.of(config).on(node).workers for node in nodes)):
        device = "cuda" if total else "cpu"
    return replace(config, worker=replace(config.worker, device=device, gpus=gpus)), alerts


def of_one_kind(need: Need, nodes: Mapping[str, Node]) -> Need:
    """Return the need restricted to GPUs if one of these nodes offers some to workers, or to processors if none does.

    It stays as it is if no node can hold a worker.
    """
    kinds = {room.device for room in map(need.on, nodes.values()) if room.workers}
    if not kinds:
        return need
    return need._replace(device="cuda") if "cuda" in kinds else need._replace(device="cpu", gpus=0.0)


def bundles(
    need: Need, wanted: int, rooms: Sequence[Room], groups: Sequence[Group]
) -> tuple[list[dict[str, float]], list[dict[str, str]]]:
    """Return the resources, and the labels, of `wanted` workers, as an autoscaler takes them: one entry for each.

    The rooms of the current nodes come before those that groups of nodes may add. A worker that fits nowhere gets the
    minimum that one worker needs.
    """
    found: list[Room] = [*rooms]
    found += [
        room for group in groups for room in [need.room(group.resources, group.labels)] * min(group.max_count, wanted)
    ]
    found.sort(key=lambda room: room.device != "cuda")  # GPUs first
    resources: list[dict[str, float]] = []
    for room in found:
        gpus = {"GPU": room.gpus} if room.gpus else {}
        resources += [{"CPU": need.cpus, **gpus}] * min(room.workers, wanted - len(resources))
    rest = {"GPU": need.gpus or 1.0} if need.device == "cuda" and need.gpus != 0 else {}
    resources += [{"CPU": need.cpus, **rest}] * (wanted - len(resources))
    return resources, [need.labels] * wanted


def explain_lack(
    need: Need, least: int, fit: int, nodes: Sequence[Node], autoscaled: bool, *, can_join: bool = True
) -> str:
    """Return an error message for the case that only `fit` of `least` workers can run, with what to do about it.

    `autoscaled` says whether an autoscaler may add nodes, `can_join` whether other nodes may join.
    """
    wait = ", or give --wait-for-nodes if nodes will join" if can_join and not autoscaled else ""
    current = "the current node" if len(nodes) == 1 else f"the {len(nodes)} current nodes"
    where = f"on {current}{' and those that the autoscaler may add' if autoscaled else ''}"
    if fit:
        return f"min_workers: {least} requested, but only {fit} fit {where}; use --min-workers {fit}{wait}"
    if not nodes and not autoscaled:
        return f"address: no node of the cluster is alive; start Ray again, and give the same command{wait}"
    if not any(labels.match(need.labels, node.labels) for node in nodes) and not autoscaled:
        wanted = need.labels.keys()
        there = sorted({f"{name}={value}" for node in nodes for name, value in node.labels.items() if name in wanted})
        return (
            f"worker.labels: no node matches {_shown(need.labels)}; the nodes have "
            f"{', '.join(there)[:200] or 'no such label'}; choose other labels{wait}"
        )
    largest = {name: max((node.resources.get(name, 0) for node in nodes), default=0) for name in ("CPU", "GPU")}
    field = "worker.gpus" if (need.gpus or 0) > largest["GPU"] else "worker.cpus"
    have = f"at most {counted(largest['CPU'], 'CPU')} and {counted(largest['GPU'], 'GPU')} each"
    return f"{field}: a worker that takes {need} does not fit {where}, with {have}; ask for less{wait}"


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
        Group(dict(group.resources), None, UNLIMITED if group.max_count < 0 else group.max_count, group.name)
        for group in config.node_group_configs
    ] or None


def _ray_up_groups(path: Path) -> list[Group] | None:
    try:
        types = yaml.safe_load(path.read_text())["available_node_types"]
        return [_parse_group(str(name), group) for name, group in types.items()] or None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError):
        return None


def _parse_group(name: str, group: Mapping[str, Any]) -> Group:
    resources = {str(name): float(amount) for name, amount in (group.get("resources") or {}).items()}
    node_labels = {str(name): str(value) for name, value in (group.get("labels") or {}).items()}
    return Group(resources, node_labels, int(group.get("max_workers", 0)), name)

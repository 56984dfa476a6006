"""The request of a run to an autoscaler, which consists of the resources of its workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from leap_dist.config.settings import Config
from leap_dist.driver.nodes import Node
from leap_dist.driver.placement import GROUP_LABEL, UNLIMITED, Group, Need, Room, bundles, group_names, max_workers
from leap_dist.driver.resource_requests import Request


def worker_request(
    config: Config,
    need: Need,
    most_workers: int,
    nodes: Mapping[str, Node],
    rooms: Mapping[str, Room],
    groups: Sequence[Group] | None,
) -> Request:
    """Return what the wanted workers need; with "auto", those that fit on all nodes that there may be.

    It is never more than fits if that is known, because Ray ignores a request of which one bundle does not fit. The
    nodes of a group count as its maximum, whether or not they are up. If the number of nodes is not limited or not
    known, as on Kubernetes, "auto" asks for as many workers as a batch has tasks, and RequestBook cuts a request
    that is refused.

    Args:
        config: the run's configuration.
        need: what one worker requires.
        most_workers: number of workers beyond which some would never have a task.
        nodes: the current nodes.
        rooms: the room on those of them that may get workers.
        groups: what the autoscaler may add, or None if that is not known.
    """
    names = group_names(groups or ())
    others = [room for name, room in rooms.items() if nodes[name].labels.get(GROUP_LABEL) not in names]
    limited = [group for group in groups or () if group.max_count < UNLIMITED]
    most = sum(room.workers for room in others) + max_workers(need, limited)
    is_known = groups is not None and len(limited) == len(groups)
    if config.workers != "auto":
        wanted = config.workers
    else:
        wanted = max(config.min_workers, most, 0 if is_known else config.meta.batch_size)
        wanted = min(wanted, max(most_workers, config.min_workers))
    if is_known:
        wanted = min(wanted, most)
    return Request(*bundles(need, wanted, others, groups or ()))

"""The resources reserved for this program if it runs in a placement group, as a trial of Ray Tune does."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import ray
from ray.util.placement_group import PlacementGroup, get_current_placement_group, placement_group_table
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy


class Reservation:
    """The placement group of this program. Its workers must run there: all other resources belong to other programs.

    Args:
        group: the placement group, or None if the program is in none.
        own: resources of the group that the program itself occupies.
        node: Ray's ID of the node that the program runs on.
    """

    def __init__(self, group: PlacementGroup | None, own: Mapping[str, float], node: str) -> None:
        self._group = group
        self._own = own
        self._node = node

    @classmethod
    def of_this_program(cls) -> Reservation:
        """Return what is reserved for this program. A group that has room only for the program itself is ignored."""
        context = ray.get_runtime_context()
        group = get_current_placement_group()
        found = cls(group, context.get_assigned_resources() if group else {}, context.get_node_id())
        bundles = itertools.chain(*found.bundles().values())
        return found if any(bundle.get("CPU", 0.0) > 0.0 for bundle in bundles) else cls(None, {}, "")

    def bundles(self) -> dict[str, list[dict[str, float]]]:
        """Return the group's bundles on each node, by Ray's ID, without what the program itself occupies.

        Ray does not say which bundle the program is in. It is taken to be the first one that is large enough.
        """
        if self._group is None:
            return {}
        table: Mapping[str, Any] = placement_group_table(self._group)
        found: dict[str, list[dict[str, float]]] = {}
        for number, node in table["bundles_to_node_id"].items():
            found.setdefault(node, []).append(dict(table["bundles"][number]))
        own = {name: amount for name, amount in self._own.items() if amount}
        for bundle in found.get(self._node, ()):
            if own and all(bundle.get(name, 0.0) >= amount for name, amount in own.items()):
                bundle.update({name: bundle[name] - amount for name, amount in own.items()})
                break
        return found

    def limit(self, nodes: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
        """Return the nodes on which the program may have workers, each with only the resources reserved for it.

        Takes and returns nodes as `ray.nodes()` describes them, by Ray's ID, and adds the bundles as "Bundles".
        """
        if self._group is None:
            return dict(nodes)
        bundles = self.bundles()
        return {
            name: {**node, "Resources": _total(bundles[name]), "Bundles": bundles[name]}
            for name, node in nodes.items()
            if name in bundles
        }

    def strategy(self, node: str) -> NodeAffinitySchedulingStrategy | PlacementGroupSchedulingStrategy:
        """Return the scheduling strategy of a worker for this node. In a group, Ray chooses among the group's nodes."""
        if self._group is None:
            return NodeAffinitySchedulingStrategy(node, soft=False)
        return PlacementGroupSchedulingStrategy(self._group, placement_group_capture_child_tasks=False)


def _total(bundles: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the sum of the resources of bundles."""
    total: Counter[str] = Counter()
    for bundle in bundles:
        total.update(bundle)
    return dict(total)

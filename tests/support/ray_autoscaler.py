"""Ray's own scheduler of its second autoscaler, on a cluster that exists only in a test."""

from __future__ import annotations

from ray.autoscaler.v2.instance_manager.config import NodeTypeConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingReply, SchedulingRequest
from ray.autoscaler.v2.schema import AutoscalerInstance
from ray.autoscaler.v2.utils import ResourceRequestUtil
from ray.core.generated.autoscaler_pb2 import ClusterResourceConstraint, NodeState, NodeStatus
from ray.core.generated.common_pb2 import LabelSelectorOperator
from ray.core.generated.instance_manager_pb2 import Instance, NodeKind

from leap_dist.driver.placement import Group
from leap_dist.driver.resource_requests import Request

IN = LabelSelectorOperator.Value("LABEL_OPERATOR_IN")


class RayAutoscaler:
    """Takes requests as the head of a cluster does, and starts the nodes that Ray's scheduler decides on.

    Args:
        groups: the groups of nodes that it may add, with their names.
        live: number of nodes of each group that are up.
        most_nodes: maximum number of nodes besides the head.
    """

    def __init__(self, groups: list[Group], live: dict[str, int] | None = None, most_nodes: int = 16) -> None:
        self.groups = {group.name: group for group in groups}
        self.live = {"head": 1, **(live or {})}
        self.most_nodes = most_nodes
        self.requests: list[Request] = []

    def ask(self, request: Request) -> None:
        """Take the request, which replaces the one before."""
        self.requests.append(request)

    def accepts(self) -> bool | None:
        """Decide on the newest request, and start its nodes."""
        reply = self._schedule(self.requests[-1])
        for launched in reply.to_launch:
            self.live[launched.instance_type] = self.live.get(launched.instance_type, 0) + launched.count
        return not reply.infeasible_cluster_resource_constraints

    def _schedule(self, request: Request) -> SchedulingReply:
        demands = [
            ResourceRequestUtil.make(bundle, [], [[(name, IN, [value]) for name, value in selector.items()]])
            for bundle, selector in zip(request.bundles, request.selectors, strict=True)
        ]
        constraint = ClusterResourceConstraint(resource_requests=ResourceRequestUtil.group_by_count(demands))
        return ResourceDemandScheduler().schedule(
            SchedulingRequest(
                node_type_configs={
                    name: NodeTypeConfig(
                        name=name, min_worker_nodes=0, max_worker_nodes=group.max_count, resources=group.resources,
                        labels=group.labels or {}, launch_config_hash="same",
                    )
                    for name, group in self.groups.items()
                },
                max_num_nodes=self.most_nodes + 1,
                disable_launch_config_check=True,
                cluster_resource_constraints=[constraint] if demands else [],
                current_instances=[
                    self._instance(name, number) for name, count in self.live.items() for number in range(count)
                ],
            )
        )  # fmt: skip

    def _instance(self, name: str, number: int) -> AutoscalerInstance:
        group, node = self.groups[name], f"{name}-{number}"
        return AutoscalerInstance(
            cloud_instance_id=node,
            im_instance=Instance(
                instance_id=node, instance_type=name, status=Instance.RAY_RUNNING, node_id=node,
                launch_config_hash="same", node_kind=NodeKind.HEAD if name == "head" else NodeKind.WORKER,
            ),
            ray_node=NodeState(
                node_id=node.encode(), status=NodeStatus.RUNNING, total_resources=group.resources,
                available_resources=group.resources, labels=group.labels or {},
            ),
        )  # fmt: skip

"""Ray Serve request router that sends a request to the replica that holds its model."""

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica


class ResidencyRouter(RequestRouter):
    """Sends a request to the replica that its handle names as its multiplexed model id.

    A request that names none is a load: it goes to the least recently loaded replica.  If the
    named replica is gone, another one gets the request and answers ModelNotResident.  Runs in the
    process of the handle.  Source: Ray Serve 2.60, `RequestRouter.choose_replicas`.
    """

    def initialize_state(self, **kwargs: object) -> None:
        """Start without any load."""
        del kwargs
        self._loads = 0
        self._given: dict[ReplicaID, int] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return one rank with one replica; no rank if there is no replica."""
        if not candidate_replicas:
            return []
        target = pending_request.metadata.multiplexed_model_id if pending_request else ""
        for replica in candidate_replicas:
            if replica.replica_id.unique_id == target:
                return [[replica]]
        chosen = min(candidate_replicas, key=lambda one: self._given.get(one.replica_id, 0))
        if not target:
            self._loads += 1
            self._given[chosen.replica_id] = self._loads
        return [[chosen]]

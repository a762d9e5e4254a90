"""Serve's request router for formats with several replicas: a request goes where its model is."""

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica


class ResidencyRouter(RequestRouter):
    """Sends a request to the replica that its handle names in place of a multiplexed model.

    What names none is a load: it goes to the replica that was given one longest ago.  A replica
    that is gone is replaced by another one, which answers that the model is not resident there.
    Runs in the process of the handle.  Source: Ray Serve 2.60, `RequestRouter.choose_replicas`.
    """

    def initialize_state(self, **kwargs: object) -> None:
        """Begin without any load given."""
        del kwargs
        self._loads = 0
        self._given: dict[ReplicaID, int] = {}

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return one rank that holds one replica; none where there is none."""
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

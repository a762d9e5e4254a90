"""Chooses the handle that reaches the replica where a model is resident."""

from collections.abc import Mapping

from deployments.messages import Residency
from deployments.serve.handles import Handle


class Targets:
    """Handles whose calls go to the replica that holds a model.

    With one replica per format, these are the formats' own handles.
    """

    def __init__(self, formats: Mapping[str, Handle], *, has_many: bool) -> None:
        self._formats = formats
        self._has_many = has_many
        # A configured handle starts its own request router, so each is created once.
        self._handles: dict[tuple[str, str], Handle] = {}

    def at(self, residency: Residency) -> Handle:
        """Return the handle to a residency's replica; see `deployments.serve.affinity`."""
        handle = self._formats[residency.format]
        if not self._has_many:
            return handle
        key = (residency.format, residency.replica_id)
        if key not in self._handles:
            self._handles[key] = handle.options(multiplexed_model_id=residency.replica_id)
        return self._handles[key]

    def forget(self, residency: Residency) -> None:
        """Drop the handle to a replica that is gone."""
        self._handles.pop((residency.format, residency.replica_id), None)

"""Ray resources that a format's process reserves, so that no machine is overcommitted."""

from collections.abc import Iterable, Mapping
from typing import Any

from core.units import MIB

UNIFIED_MEMORY = "unified_memory"


def reservation(
    process_bytes: int, cluster: Mapping[str, float], all_bytes: Iterable[int]
) -> dict[str, Any]:
    """Return the actor options that reserve `process_bytes`; models are counted by the ledger.

    1. `unified_memory`, in MiB, if the cluster has that resource.
    2. Ray's `memory`, in bytes, if it suffices for the processes of all formats.
    3. Else nothing: a process must not wait forever for a resource that is not tracked.
    """
    if cluster.get(UNIFIED_MEMORY, 0) > 0:  # (1)
        return {"resources": {UNIFIED_MEMORY: -(-process_bytes // MIB)}}
    if cluster.get("memory", 0) >= sum(all_bytes):  # (2)
        return {"memory": process_bytes}
    return {}  # (3)

"""What a format's process reserves with Ray, so that no machine gets more than it holds."""

from collections.abc import Iterable, Mapping
from typing import Any

from core.units import MIB

UNIFIED_MEMORY = "unified_memory"


def reservation(
    process_bytes: int, cluster: Mapping[str, float], all_bytes: Iterable[int]
) -> dict[str, Any]:
    """Return the actor options that reserve `process_bytes`; models are the ledger's business.

    1. `unified_memory`, in MiB, where the cluster has that resource.
    2. Ray's own `memory`, in bytes, where it would hold the processes of all formats.
    3. Else nothing: a process that waits for memory which nobody counts would wait for ever.
    """
    if cluster.get(UNIFIED_MEMORY, 0) > 0:  # (1)
        return {"resources": {UNIFIED_MEMORY: -(-process_bytes // MIB)}}
    if cluster.get("memory", 0) >= sum(all_bytes):  # (2)
        return {"memory": process_bytes}
    return {}  # (3)

"""Opens the store that keeps computed prefixes across unloads and restarts."""

from collections.abc import Sequence
from hashlib import sha256

from backends.prefixes.disk import DiskLimits, PrefixFolder
from backends.prefixes.store import SnapshotPlace, Snapshots
from core.settings import Settings
from deployments.messages import FileMark, LoadRequest


def open_snapshots(settings: Settings) -> Snapshots | None:
    """Return the store of this process; None if both RAM and disk are disabled."""
    if not settings.prefix_ram and not settings.prefix_disk:
        return None
    folder = PrefixFolder(settings.prefix_folder, DiskLimits(settings.prefix_disk))
    return Snapshots(folder, settings.prefix_ram)


def place_of(
    snapshots: Snapshots | None, request: LoadRequest, marks: Sequence[FileMark]
) -> SnapshotPlace | None:
    """Return the model's place in the store: named after the model, versioned by its files."""
    if snapshots is None or not marks:
        return None
    name = sha256(f"{request.info.format}\n{marks[0].path}".encode()).hexdigest()[:32]
    versions = "\n".join(
        f"{mark.path} {mark.size_bytes} {mark.modified_ns} {mark.inode}" for mark in marks
    )
    return SnapshotPlace(snapshots, name, versions)

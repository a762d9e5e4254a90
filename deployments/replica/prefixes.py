"""Opens the store that keeps computed prefixes across unloads and restarts."""

from collections.abc import Sequence
from hashlib import sha256

from backends.prefixes.disk import DiskLimits, PrefixFolder
from backends.prefixes.store import BlockStore, ModelPrefixStore
from core.settings import Settings
from deployments.messages import FileMark, LoadRequest


def open_block_store(settings: Settings) -> BlockStore | None:
    """Return the store of this process; None if both RAM and disk are disabled."""
    if not settings.prefix_ram and not settings.prefix_disk:
        return None
    folder = PrefixFolder(settings.prefix_folder, DiskLimits(settings.prefix_disk))
    return BlockStore(folder, settings.prefix_ram)


def prefix_store_of(
    store: BlockStore | None, request: LoadRequest, marks: Sequence[FileMark]
) -> ModelPrefixStore | None:
    """Return the model's place in the store: named after the model, versioned by its files."""
    if store is None or not marks:
        return None
    name = sha256(f"{request.info.format}\n{marks[0].path}".encode()).hexdigest()[:32]
    versions = "\n".join(
        f"{mark.path} {mark.size_bytes} {mark.modified_ns} {mark.inode}" for mark in marks
    )
    return ModelPrefixStore(store, name, versions)

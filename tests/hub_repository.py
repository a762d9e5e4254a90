"""Repositories of a Hugging Face cache, as `huggingface_hub` writes them."""

import hashlib
import os
from pathlib import Path


class HubRepository:
    """A repository of a Hugging Face cache, with the links and blobs that huggingface_hub makes."""

    def __init__(self, cache: Path, name: str = "org/Nice-Model") -> None:
        self.folder = cache / f"models--{name.replace('/', '--')}"
        (self.folder / "blobs").mkdir(parents=True)

    def snapshot(self, revision: str) -> Path:
        """Return the folder of a revision."""
        return self.folder / "snapshots" / revision

    def add(self, revision: str, source: Path, *names: str) -> Path:
        """Add the files of `source`, or those named, to a revision; return its folder."""
        snapshot = self.snapshot(revision)
        files = [source / name for name in names] or [
            path for path in source.rglob("*") if path.is_file()
        ]
        for path in files:
            data = path.read_bytes()
            blob = self.folder / "blobs" / hashlib.sha256(data).hexdigest()
            if not blob.exists():
                blob.write_bytes(data)
            link = snapshot / path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
        return snapshot

    def set_main(self, revision: str) -> None:
        """Point the main branch to a revision."""
        (self.folder / "refs").mkdir(exist_ok=True)
        (self.folder / "refs" / "main").write_text(revision)

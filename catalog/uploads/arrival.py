"""What a job of an upload or an import is to do; pure, JSON-serializable."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from catalog.uploads.upload import Upload, UploadFile

How: TypeAlias = Literal["upload", "in_place", "clone", "copy"]


@dataclass(frozen=True, slots=True)
class Arrival:
    """A model that is inspected and then becomes the model folder `name`, or stays in place.

    `id` names its folder below `incoming`; `source` is the path of what is imported, and `files`
    are those of an upload.
    """

    id: str
    name: str
    how: How
    source: str = ""
    files: tuple[UploadFile, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Bytes of an upload's files."""
        return sum(file.size_bytes for file in self.files)

    def folder(self, home: Path) -> Path:
        """Return where the model is in the end."""
        if self.how == "in_place":
            return Path(self.source)
        return home / "models" / "uploads" / self.name

    def quarantine(self, home: Path) -> Path:
        """Return where the model is until it has been inspected."""
        if self.how == "in_place":
            return Path(self.source)
        return home / "incoming" / self.id / "model" / self.name

    def to_json(self) -> str:
        """Return it as one line of JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Arrival":
        """Return what `to_json` wrote."""
        values: Mapping[str, Any] = json.loads(text)
        return cls(**{**values, "files": tuple(UploadFile(**file) for file in values["files"])})


def arrival_of(upload: Upload) -> Arrival:
    """Return what is to be done with a finished upload."""
    return Arrival(upload.id, upload.name, "upload", files=upload.files)

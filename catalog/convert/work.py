"""What a conversion job is to do: one model to one format, as a folder; JSON-serializable."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from backends.base import ModelInfo
from catalog.convert.graph import MLX_GROUP_SIZES, check
from core.errors import RequestError

DEFAULT_GROUP_SIZE = 64
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")


@dataclass(frozen=True, slots=True)
class ConversionWork:
    """A conversion of the model `model_id` to the folder `target`, which does not exist before.

    `group_size` is the weights that share a scale in MLX; other formats have no choice.
    `source_bytes` is the size of the model's files, by which progress is counted.  `is_awaited`: a
    request waits for the model, so that its quality is not measured first.
    """

    model_id: str
    target_format: str
    quantization: str
    group_size: int
    target: Path
    source_bytes: int = field(default=0, compare=False)
    is_awaited: bool = field(default=False, compare=False)

    @property
    def kind(self) -> str:
        """The format, the quantization and an unusual group size, such as `mlx-4bit-g32`."""
        return kind_of(self.target_format, self.quantization, self.group_size)

    def is_same_result(self, other: "ConversionWork") -> bool:
        """Whether both make the same of the same model, whatever it is called."""
        return (self.model_id, self.kind) == (other.model_id, other.kind)

    def to_json(self) -> str:
        """Return the work as one line of JSON."""
        return json.dumps({**asdict(self), "target": str(self.target)})

    @classmethod
    def from_json(cls, text: str) -> "ConversionWork":
        """Return the work that `to_json` wrote."""
        values: Mapping[str, Any] = json.loads(text)
        return cls(**{**values, "target": Path(values["target"])})


def kind_of(target_format: str, quantization: str, group_size: int) -> str:
    """Return the name of the folder of results of one kind."""
    kind = f"{target_format}-{quantization}"
    return kind if group_size == DEFAULT_GROUP_SIZE else f"{kind}-g{group_size}"


def planned(
    model_id: str,
    info: ModelInfo,
    models: Path,
    target_format: str,
    *,
    quantization: str = "",
    group_size: int | None = None,
    name: str = "",
) -> ConversionWork:
    """Return the work for a user's choices; its target is in the folder `models`.

    What is empty or None is chosen.  Raises RequestError for choices that do not exist,
    UnsupportedCapability with the reason for a conversion that is not possible.
    """
    size = DEFAULT_GROUP_SIZE if group_size is None else group_size
    if size not in MLX_GROUP_SIZES:
        raise RequestError(
            f"group_size is {size}; MLX supports 32, 64 and 128.", param="group_size"
        )
    if group_size is not None and target_format != "mlx":
        raise RequestError(
            f"group_size is a choice of MLX alone; leave it out for {target_format[:40]}.",
            param="group_size",
        )
    if name and not _NAME.fullmatch(name):
        raise RequestError(
            f"{name[:100]!r} is not a name for a converted model: up to 96 letters, digits, "
            "dots, hyphens and underscores, a letter or digit first.",
            param="name",
        )
    chosen = check(info, target_format, quantization)
    target = models / kind_of(target_format, chosen, size) / (name or info.name)
    return ConversionWork(model_id, target_format, chosen, size, target, info.size_bytes)

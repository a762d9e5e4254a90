"""The file in which a source's distributions and vectors wait for those of the result."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from catalog.convert.quality.figure import Position


@dataclass(slots=True)
class KeptText:
    """A text's tokens, and the source's distributions after its first ones."""

    token_ids: tuple[int, ...]
    positions: list[Position] = field(default_factory=list)


def write_texts(path: Path, texts: Sequence[KeptText]) -> None:
    """Write the texts that have positions; some MB at most."""
    arrays: dict[str, NDArray[np.generic]] = {}
    for number, text in enumerate(each for each in texts if each.positions):
        # An engine's thread may still add to it.
        positions = list(text.positions)
        arrays[f"{number}.tokens"] = np.array(text.token_ids, np.int64)
        arrays[f"{number}.ids"] = np.stack([each.top_ids for each in positions])
        arrays[f"{number}.logprobs"] = np.stack([each.top_logprobs for each in positions])
        numbers = [(each.rest_logprob, each.next_logprob) for each in positions]
        arrays[f"{number}.numbers"] = np.array(numbers, np.float64)
    with path.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def read_texts(path: Path) -> list[KeptText]:
    """Return what `write_texts` wrote."""
    texts = []
    with np.load(path, allow_pickle=False) as arrays:
        for number in range(len(arrays.files) // 4):
            tokens, ids, logprobs, numbers = (
                arrays[f"{number}.{name}"] for name in ("tokens", "ids", "logprobs", "numbers")
            )
            positions = [
                Position(ids[row], logprobs[row], float(rest), float(following))
                for row, (rest, following) in enumerate(numbers)
            ]
            texts.append(KeptText(tuple(tokens.tolist()), positions))
    return texts


def write_vectors(path: Path, vectors: Sequence[NDArray[np.float32]]) -> None:
    """Write one vector for each text."""
    with path.open("wb") as file:
        np.savez(file, vectors=np.array(vectors, np.float32))


def read_vectors(path: Path) -> NDArray[np.float32]:
    """Return what `write_vectors` wrote, (texts, dimension)."""
    with np.load(path, allow_pickle=False) as arrays:
        return np.asarray(arrays["vectors"], np.float32)

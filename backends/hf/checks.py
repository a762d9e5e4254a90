"""Checks that a Hugging Face folder has a tokenizer and needs no custom code."""

import importlib.util
from functools import cache
from pathlib import Path

from backends.hf.config import HfFolder
from backends.hf.header import broken

# Each of these is a complete vocabulary; vocab.json also needs merges.txt.
_VOCABULARIES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "vocab.txt",
)


def check_folder(folder: HfFolder, *, is_known: bool) -> None:
    """Raise BrokenModel for a folder that needs its own Python code or has no tokenizer.

    `is_known` says whether a runtime implements the architecture.
    """
    config = folder.path / "config.json"
    if folder.config.get("model_file") is not None:
        reason = "it needs its own Python code (model_file), and a model's own code is never run"
        raise broken(config, reason)
    if folder.has_custom_code and not is_known:
        reason = (
            f"only its own Python code (auto_map) implements the architecture "
            f"{folder.model_type[:60]!r}, and a model's own code is never run"
        )
        raise broken(config, reason)
    if not _has_tokenizer(folder.path):
        raise broken(
            config, "there is no tokenizer.json (or tokenizer.model) beside it; download it too"
        )


def _has_tokenizer(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _VOCABULARIES):
        return True
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


@cache
def transformers_knows(model_type: str) -> bool:
    """Whether the installed transformers implements this `model_type`; does not import it."""
    spec = importlib.util.find_spec("transformers")
    places = (spec.submodule_search_locations or ()) if spec else ()
    name = model_type.replace("-", "_")
    return name.isidentifier() and any(
        (Path(place) / "models" / name / "__init__.py").is_file() for place in places
    )

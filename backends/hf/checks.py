"""What a Hugging Face folder must have, and must not want, before it is a model to us."""

import importlib.util
from functools import cache
from pathlib import Path

from backends.hf.config import HfFolder
from backends.hf.header import broken

# Any of these is a whole vocabulary; vocab.json needs its merges.
_VOCABULARIES = (
    "tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.txt",
)  # fmt: skip


def check_folder(folder: HfFolder, *, is_known: bool) -> None:
    """Refuse a folder without a tokenizer, or whose architecture is code of its own.

    `is_known` says whether a runtime has code for the architecture.  Raises BrokenModel.
    """
    config = folder.path / "config.json"
    if folder.config.get("model_file") is not None:
        reason = "it names Python code to run (model_file), and a model's own code is never run"
        raise broken(config, reason)
    if folder.has_custom_code and not is_known:
        reason = (
            f"the architecture {folder.model_type[:60]!r} is known to its own Python code only "
            "(auto_map), and a model's own code is never run"
        )
        raise broken(config, reason)
    if not _has_tokenizer(folder.path):
        raise broken(config, "there is no tokenizer.json (or tokenizer.model) beside it")


def _has_tokenizer(folder: Path) -> bool:
    if any((folder / name).is_file() for name in _VOCABULARIES):
        return True
    return (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file()


@cache
def transformers_knows(model_type: str) -> bool:
    """Whether transformers has a folder for this `model_type`; imports nothing of it.

    False where transformers is missing.
    """
    spec = importlib.util.find_spec("transformers")
    places = (spec.submodule_search_locations or ()) if spec else ()
    name = model_type.replace("-", "_")
    return name.isidentifier() and any(
        (Path(place) / "models" / name / "__init__.py").is_file() for place in places
    )

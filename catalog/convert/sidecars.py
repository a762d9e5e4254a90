"""Carries a model's tokenizer, chat templates and generation settings over, byte for byte.

Exporters save these files again through a class of the architecture, which drops or changes
tokens, templates and settings.  So their copies are replaced by the source's own.
"""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from core.files import visible_files
from core.units import MIB

_MAX_BYTES = 256 * MIB
# The vocabulary, its special tokens, and how a conversation becomes text.
_TOKENIZER = re.compile(
    r"tokenizer.*\.json|tokenizer\.model.*|.*\.tiktoken|tiktoken\.model|tekken\.json"
    r"|special_tokens_map\.json|added_tokens\.json|vocab\.(?:json|txt)|merges\.txt|spiece\.model"
    r"|sentencepiece\.bpe\.model|chat_template\.(?:jinja|json)"
)
_SETTINGS = re.compile(
    r"generation_config\.json|modules\.json|sentence_bert_config\.json"
    r"|config_sentence_transformers\.json"
)
_PAPERS = re.compile(
    r"(?:LICENSE|LICENCE|NOTICE|README|USE_POLICY)(?:\.(?:md|txt))?", re.IGNORECASE
)
TEMPLATES_FOLDER = "additional_chat_templates"
# Folders of sentence-transformers, such as `1_Pooling`.
_MODULE = re.compile(r"\d{1,2}_[A-Za-z]\w{0,40}")


def sidecar_files(folder: Path) -> dict[Path, Path]:
    """Return the files in `folder` that conversions copy, by their path below it.

    config.json is not among them, because conversions change it; nor are weights and code.
    """
    found: dict[Path, Path] = {}
    for path in sorted(folder.iterdir()):
        if _is_kept(path):
            found[Path(path.name)] = path
        elif path.is_dir() and (path.name == TEMPLATES_FOLDER or _MODULE.fullmatch(path.name)):
            found |= {Path(path.name, inner.name): inner for inner in _inside(path)}
    return found


def _is_kept(path: Path) -> bool:
    patterns = (_TOKENIZER, _SETTINGS, _PAPERS)
    is_known = any(pattern.fullmatch(path.name) for pattern in patterns)
    return is_known and _is_small_file(path)


def _inside(folder: Path) -> Iterator[Path]:
    for path in visible_files(folder, "*"):
        is_wanted = (
            path.suffix == ".jinja" if folder.name == TEMPLATES_FOLDER else path.suffix != ".py"
        )
        if is_wanted and _is_small_file(path):
            yield path


def _is_small_file(path: Path) -> bool:
    return path.is_file() and path.stat().st_size <= _MAX_BYTES


def copy_sidecars(source: Path, output: Path) -> None:
    """Copy the source's sidecars to `output`; an exporter's own versions of them are removed.

    Links are followed, as in a Hugging Face cache.
    """
    remove_tokenizer(output)
    for name, file in sidecar_files(source).items():
        target = output / name
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        shutil.copyfile(file, target)


def remove_tokenizer(folder: Path) -> None:
    """Remove all files of a tokenizer: those that the source does not have would win."""
    for path in list(folder.iterdir()):
        if _TOKENIZER.fullmatch(path.name) or path.name == "generation_config.json":
            path.unlink()
        elif path.name == TEMPLATES_FOLDER:
            shutil.rmtree(path)

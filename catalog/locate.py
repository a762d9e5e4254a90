"""Finds the files of a model that is missing where the user says that they are now."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from catalog.changes import size_of
from catalog.models import CONTENT, ModelRecord
from core.errors import ModelNotFound, RequestError


def find_moved(
    model_id: str, path: Path, records: Sequence[ModelRecord], folders: Iterable[Path]
) -> ModelRecord:
    """Return the record of the files at `path`, as the last scan found them; blocks briefly.

    `path` is a model's file or folder inside `folders`.  The files must be those of the missing
    model, by their sizes and samples of their content.  Returns the model's own record if a scan
    has found its files meanwhile.  Raises ModelNotFound, and RequestError with what is wrong.
    """
    record = next((one for one in records if one.id == model_id), None)
    if record is None:
        raise ModelNotFound.of(model_id, [one.id for one in records])
    target = _checked(path, folders)
    at_place = [one for one in records if one.state == "ok" and _is_at(one, target)]
    if record in at_place:
        return record
    if record.state != "missing":
        raise RequestError(
            f"{model_id} is not missing: its file is {record.key}. Only a model whose files are "
            "gone can be given others.",
            param="model",
        )
    if not at_place:
        raise RequestError(
            f"path: the server finds no model at {path} that it can use. Name the model's file or "
            "folder; GET /api/models tells why a file is refused.",
            param="path",
        )
    same = [one for one in at_place if _is_same(record, one)]
    if len(same) != 1:
        others = ", ".join(one.id for one in at_place[:3])
        what = f"several copies of {model_id}" if same else f"another model ({others})"
        raise RequestError(
            f"path: {path} has {what}; name the file that {model_id} had.", param="path"
        )
    return same[0]


def _checked(path: Path, folders: Iterable[Path]) -> Path:
    """Return the path without links.  Raises RequestError unless it exists inside `folders`."""
    if "\0" in str(path) or not path.is_absolute():
        raise RequestError("path: must be an absolute path.", param="path")
    target = Path(os.path.realpath(path))
    roots = [Path(os.path.realpath(folder)) for folder in folders]
    if not any(target.is_relative_to(root) for root in roots):
        raise RequestError(
            f"path: {path} is not in a model folder ({', '.join(map(str, roots))}). Move it into "
            "one of them, or add its folder to IMPETUS_MODELS_PATH.",
            param="path",
        )
    if not target.exists():
        raise RequestError(f"path: {path} does not exist.", param="path")
    return target


def _is_at(record: ModelRecord, target: Path) -> bool:
    """Whether `target` is one of the model's files, or a folder that has its first one."""
    files = [Path(os.path.realpath(file)) for file in record.info.files]
    return target in files or any(target in file.parents for file in files[:1])


def _is_same(missing: ModelRecord, found: ModelRecord) -> bool:
    known = missing.info.details.get(CONTENT)
    if known:
        return known == found.info.details.get(CONTENT)
    sizes = [[size_of(each) for each in one.signatures] for one in (missing, found)]
    return bool(sizes[0]) and sizes[0] == sizes[1] and missing.info.format == found.info.format

"""Lets a download use what another one into the same folder left, if it is the same files."""

import hashlib
import os
from pathlib import Path

from catalog.hub.download.job import DownloadJob, partial_folder
from catalog.hub.download.transfer import has_stated_hash
from core.files import write_atomically

# Which download the work folder is of: a hash, as addresses may have secrets.
_NOTE = "of"


def claim_work(job: DownloadJob) -> None:
    """Remove from the work folder what is not of this download; blocks while files are hashed.

    Files of another commit often have the same names and sizes.  Called with the lock held.
    Raises OSError.
    """
    note = partial_folder(job.work) / _NOTE
    if note.exists() and is_claimed_by(job):
        return
    wanted = {job.work / file.path: file for file in job.files}
    for path in _files(job.work):
        file = wanted.get(path)
        if file is None or path.is_symlink() or not has_stated_hash(file, path):
            path.unlink()
    write_atomically(note, _identity(job), is_durable=False)


def is_claimed_by(job: DownloadJob) -> bool:
    """Whether the work folder is of this download, or of nobody's; blocks briefly."""
    try:
        return (partial_folder(job.work) / _NOTE).read_bytes() == _identity(job)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def _identity(job: DownloadJob) -> bytes:
    text = "\0".join((job.endpoint, job.repository, job.commit, job.url))
    return hashlib.sha256(text.encode()).hexdigest().encode()


def _files(work: Path) -> list[Path]:
    """Return the files and links of a work folder without its unfinished ones."""
    found: list[Path] = []
    for place, folders, names in os.walk(work):
        if Path(place) == work:
            folders[:] = [name for name in folders if name != partial_folder(work).name]
        linked = [name for name in folders if os.path.islink(os.path.join(place, name))]
        found += [Path(place) / name for name in (*names, *linked)]
    return found

"""Sends a model to a server in chunks, and goes on with an unfinished upload of the same files."""

import base64
import hashlib
import time
from collections.abc import Mapping, Sequence
from typing import Any

from scripts.models_lib import local_files
from scripts.models_lib.context import Context
from scripts.models_lib.local_files import LocalFile
from scripts.models_lib.problems import CommandFailed, StillRunning
from scripts.models_lib.progress import View, open_view
from scripts.server_lib.client import ServerRefused, ServerUnreachable, path_of

_CONFLICT = "upload_conflict"
# How long a server or a network that is away is asked again.
_SILENCE_LIMIT_S = 60.0
_PAUSE_S = 1.0


def send(context: Context, files: Sequence[LocalFile], name: str | None) -> Mapping[str, Any]:
    """Send the files; return the job that inspects them.

    Raises StillRunning after Ctrl-C, CommandFailed, and the client's errors.
    """
    title = name or files[0].path.partition("/")[0]
    try:
        with open_view(context.screen, title) as view:
            hashes = _hashes(view, title, files)
            upload = _unfinished(context, files, hashes, name) or _begin(
                context, files, hashes, name
            )
            _Sender(context, view, title, upload, files).run()
    except KeyboardInterrupt:
        raise StillRunning(
            f"What was sent of {title} is kept; the same command goes on with it."
        ) from None
    return context.client.send("POST", path_of("uploads", upload["id"], "finish"))


def _hashes(view: View, title: str, files: Sequence[LocalFile]) -> Sequence[str]:
    progress = _Progress(view, title, sum(file.size_bytes for file in files), "reading")
    return [local_files.checksum(file, progress.add) for file in files]


def _begin(
    context: Context, files: Sequence[LocalFile], hashes: Sequence[str], name: str | None
) -> Mapping[str, Any]:
    announced = [
        {"path": file.path, "size_bytes": file.size_bytes, "sha256": digest}
        for file, digest in zip(files, hashes, strict=True)
    ]
    body = {"files": announced, **({"name": name} if name else {})}
    upload = context.client.send("POST", path_of("uploads"), body)
    for path in upload["ignored"]:
        context.screen.note(f"Not part of the model: {path}")
    return upload


def _unfinished(
    context: Context, files: Sequence[LocalFile], hashes: Sequence[str], name: str | None
) -> Mapping[str, Any] | None:
    """Return an upload of exactly these files that an earlier run left, None without one."""
    wanted = {
        (number, file.size_bytes, digest)
        for number, (file, digest) in enumerate(zip(files, hashes, strict=True))
    }
    for upload in context.client.get(path_of("uploads"))["uploads"]:
        known = {(one["number"], one["size_bytes"], one["sha256"]) for one in upload["files"]}
        is_named = name is None or upload["name"] == name
        if not upload["is_finished"] and is_named and known and known <= wanted:
            # What the server does not take, such as files of a system, is in no upload.
            taken = len(known) + len(upload["ignored"]) == len(wanted)
            if taken and all(_is_same_path(one, files) for one in upload["files"]):
                found: Mapping[str, Any] = upload
                return found
    return None


def _is_same_path(file: Mapping[str, Any], files: Sequence[LocalFile]) -> bool:
    """Whether a file has the same name; the server leaves out the folder around all files."""
    path = files[file["number"]].path
    return file["path"] in (path, path.partition("/")[2])


class _Progress:
    """Counts bytes and their speed since this run began."""

    def __init__(self, view: View, title: str, total_bytes: int, doing: str = "") -> None:
        self._view = view
        self._title = title
        self._total = total_bytes
        self._doing = doing
        self._begun = time.monotonic()
        self._counted = 0
        self.done = 0

    def add(self, count: int) -> None:
        """Count bytes that were read or sent now."""
        self.done += count
        self._counted += count
        self.show()

    def show(self, problem: str = "") -> None:
        """Draw how far it is."""
        passed = time.monotonic() - self._begun
        speed = self._counted / passed if passed > 0 else 0.0
        remaining = (self._total - self.done) / speed if speed else None
        job = {
            "title": self._title,
            "state": "running",
            "reason": "",
            "done_bytes": self.done,
            "total_bytes": self._total,
            "bytes_per_s": speed,
            "remaining_s": remaining,
            "stalled_s": 0.0,
        }
        self._view.show(job, problem or self._doing)


class _Sender:
    """Sends what the server does not have of an upload."""

    def __init__(
        self,
        context: Context,
        view: View,
        title: str,
        upload: Mapping[str, Any],
        files: Sequence[LocalFile],
    ) -> None:
        self._client = context.client
        self._upload = upload
        self._files = files
        self._progress = _Progress(view, title, upload["total_bytes"])
        self._progress.done = upload["done_bytes"]

    def run(self) -> None:
        """Send all files."""
        for one in self._upload["files"]:
            self._send_file(one)

    def _send_file(self, one: Mapping[str, Any]) -> None:
        file = self._files[one["number"]]
        place = path_of("uploads", self._upload["id"], str(one["number"]))
        offset, silent_since = one["offset"], None
        while offset < one["size_bytes"]:
            data = next(local_files.pieces(file, offset, self._upload["chunk_bytes"]), b"")
            if not data:
                raise CommandFailed(f"{str(file.place)!r} became shorter while it was sent.")
            try:
                offset = self._put(place, offset, data)
                silent_since = None
            except (ServerUnreachable, ServerRefused) as problem:
                now = time.monotonic()
                silent_since = now if silent_since is None else silent_since
                _check_silence(problem, now - silent_since)
                self._progress.show("waiting for the server to answer")
                time.sleep(_PAUSE_S)

    def _put(self, place: str, offset: int, data: bytes) -> int:
        """Send a chunk; return the offset of the next one, which the server may know better."""
        digest = base64.b64encode(hashlib.sha256(data).digest()).decode()
        headers = {
            "content-type": "application/octet-stream",
            "content-digest": f"sha-256=:{digest}:",
            "upload-offset": str(offset),
        }
        try:
            after = int(self._client.put_bytes(place, data, headers)["offset"])
        except ServerRefused as refusal:
            known = refusal.headers.get("upload-offset", "")
            if refusal.code != _CONFLICT or not known.isdecimal():
                raise
            after = int(known)
            if after == offset:
                raise
        self._progress.add(after - offset)
        return after


def _check_silence(problem: ServerUnreachable | ServerRefused, silence_s: float) -> None:
    is_passing = isinstance(problem, ServerUnreachable) or problem.status == 503
    if not is_passing:
        raise problem
    if silence_s >= _SILENCE_LIMIT_S:
        raise ServerUnreachable(
            f"{problem} What was sent is kept; run the same command again to go on with it."
        ) from problem

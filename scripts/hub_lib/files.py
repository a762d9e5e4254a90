"""The test hub's answers for files: redirects to the other origin, Range, If-Range, ETag."""

import re
from collections.abc import Mapping
from urllib.parse import quote

from scripts.hub_lib.answers import Answer, FileBody, Request, error, web_page
from scripts.hub_lib.describe import stated_sha256, stated_size
from scripts.hub_lib.faults import Fault
from scripts.hub_lib.repositories import Commit, HubFile, Repository

# Faults of the answer that says where a file is, and those of its content.
RESOLVE = frozenset({"size", "hash", "redirect"})
CONTENT = frozenset({
    "stall", "slow", "truncate", "corrupt", "ignore-range", "wrong-range", "html", "etag",
})  # fmt: skip
_RANGE = re.compile(r"bytes=(\d+)-(\d*)")


class FileAnswers:
    """Answers for the files of commits; those in LFS are on the origin `cdn_origin`."""

    def __init__(self, cdn_origin: str) -> None:
        self._cdn_origin = cdn_origin

    def resolve(
        self, repository: Repository, commit: Commit, faults: Mapping[str, Fault], path: str
    ) -> Answer:
        """Return the answer of `/ID/resolve/REVISION/FILE`: a redirect, as the Hub gives it.

        To the other origin for a file in LFS, else to a path of this one.
        """
        revision = {"X-Repo-Commit": commit.sha}
        file = commit.files.get(path)
        if file is None:
            return error(404, "Entry not found", "EntryNotFound", revision)
        target = f"/api/resolve-cache/models/{repository.id}/{commit.sha}/{quote(path)}"
        headers = {**revision, "ETag": f'"{file.etag}"', "Accept-Ranges": "bytes"}
        if file.is_lfs:
            sha256 = stated_sha256(file, faults)
            target = (
                f"{self._cdn_origin}/repos/{repository.id}/{file.sha256}/{quote(path)}"
                "?Expires=4102444800&Signature=test"
            )
            headers |= {
                "X-Linked-Etag": f'"{sha256}"',
                "X-Linked-Size": str(stated_size(file, faults)),
            }
        if "redirect" in faults:
            loop = f"/{repository.id}/resolve/{commit.sha}/{quote(path)}"
            value = faults["redirect"].value
            target = loop if value == "loop" else value
        return Answer(302 if file.is_lfs else 307, {**headers, "Location": target})

    def content(
        self, request: Request, file: HubFile, faults: Mapping[str, Fault], commit: Commit | None
    ) -> Answer:
        """Return the file's bytes, or those of the Range that was asked for."""
        if "html" in faults:
            return web_page()
        etag = f'"{file.etag[::-1] if "etag" in faults else file.etag}"'
        headers = {
            "ETag": etag,
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
        }
        headers |= {"X-Repo-Commit": commit.sha} if commit else {}
        wanted = _RANGE.fullmatch(request.headers.get("range", ""))
        is_same = request.headers.get("if-range", etag) == etag
        if wanted is None or not is_same or "ignore-range" in faults:
            return Answer(200, headers, FileBody(file.source, 0, file.size), faults)
        start, end = int(wanted[1]), min(int(wanted[2] or file.size), file.size - 1)
        if start > end:
            return error(
                416, "Range Not Satisfiable", "", {"Content-Range": f"bytes */{file.size}"}
            )
        if "wrong-range" in faults:
            start, end = 0, end - start
        headers["Content-Range"] = f"bytes {start}-{end}/{file.size}"
        return Answer(206, headers, FileBody(file.source, start, end - start + 1), faults)

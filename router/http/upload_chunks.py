"""Tells the one route whose bodies are bytes: chunks of uploads, which have limits of their own."""

import re

from starlette.types import Scope

from core.units import MIB

CHUNK_BYTES = 8 * MIB
CHUNK_TYPE = b"application/octet-stream"
_CHUNK_PATH = re.compile(r"/api/uploads/[0-9a-f]{32}/[0-9]{1,4}")


def is_chunk(scope: Scope) -> bool:
    """Whether a request is a chunk of an upload.

    A web page cannot send a PUT to another site without its consent, whatever the content type.
    """
    return scope["method"] == "PUT" and _CHUNK_PATH.fullmatch(scope["path"]) is not None

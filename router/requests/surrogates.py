r"""Replaces half surrogate pairs in JSON bodies by U+FFFD, as Go's and .NET's decoders do.

Clients in JavaScript cut text in the middle of an emoji; the half stays in the session, and
a refusal would end it.
"""

import re

# RFC 8259, section 7; alternatives of a fixed width, so that no callback runs for a match.
_LONE = re.compile(
    rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F][0-9a-fA-F]{2})"
    rb"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F][0-9a-fA-F]{2}"
)
# UTF-8 of a surrogate, as Python writes it with `surrogatepass`.
_LONE_BYTES = re.compile(rb"\xed[\xa0-\xbf][\x80-\xbf]")
_REPLACEMENT_ESCAPE = rb"\\ufffd"
_REPLACEMENT = "�".encode()
_BACKSLASHES, _MASK = rb"\\", b"\x00\x00"


def without_lone_surrogates(body: bytes) -> bytes:
    """Return JSON text of the same length with U+FFFD for each lone surrogate; takes linear time.

    Text that contains NUL is returned unchanged: it is not valid JSON.
    """
    if b"\x00" in body:
        return body
    # An escaped backslash may stand before the letter u.
    masked = body.replace(_BACKSLASHES, _MASK)
    masked = _LONE.sub(_REPLACEMENT_ESCAPE, masked)
    return _LONE_BYTES.sub(_REPLACEMENT, masked.replace(_MASK, _BACKSLASHES))

"""Makes a repository's README safe to show: no HTML, no images, no odd links; pure."""

import html
import re
from collections.abc import Iterator
from itertools import chain

from markdown_it import MarkdownIt

MAX_CHARACTERS = 60_000
_PARSER = MarkdownIt("commonmark", {"html": True})
_FRONT_MATTER = re.compile(r"\A\ufeff?---\r?\n.*?\r?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_FENCE = re.compile(r" {0,3}(`{3,}|~{3,})")
_INLINE_CODE = re.compile(r"(`+)(?!`).*?(?<!`)\1(?!`)")
_DROPPED = re.compile(
    r"<!--.*?(?:-->|\Z)|<(script|style|iframe|object|svg|math)\b.*?(?:</\1\s*>|\Z)",
    re.DOTALL | re.IGNORECASE,
)
_BREAK = re.compile(r"<br\s*/?>|</(?:p|div|tr|li|h\d)\s*>", re.IGNORECASE)
_TAG = re.compile(r"</?[a-zA-Z][^<>]*>")
_AUTOLINK = re.compile(r"<(https?://[^\s<>\"']+)>")
_IMAGE = re.compile(r"!\[([^\[\]]*)\](?:\([^()]*\)|\[[^\[\]]*\])")
_LINK = re.compile(r"\[([^\[\]]*)\]\(\s*<?([^()\s<>]*)>?(?:\s+[\"'(][^)]*)?\)")
_DEFINITION = re.compile(r"^ {0,3}\[[^\]]+\]:.*$", re.MULTILINE)
_ALLOWED = re.compile(r"(?:https?://|mailto:)[^\s]+", re.IGNORECASE)
_SCHEME = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]*:")
_KEPT_CODE = re.compile("\0(\\d+)\0")


def sanitize(text: str, base: str) -> str:
    """Return `text` as Markdown that no renderer makes HTML, images or scripts of.

    Links stay if they lead to http, https or mailto; relative ones are put below `base`, the
    address of the repository's files.  Images become their texts.  Code stays as it is.
    """
    text = _FRONT_MATTER.sub("", text[:MAX_CHARACTERS]).replace("\0", "")
    shown = "".join(part if is_code else _prose(part, base) for part, is_code in _parts(text))
    if not _is_inert(shown):
        # What is code to a whole parser is not what the lines above took for it.
        shown = _DEFINITION.sub("", shown).replace("<", "&lt;").replace("](", "] (")
    if not _is_inert(shown):
        # Definitions of links in quotes and lists, and whatever else makes one.
        shown = shown.replace("[", "&#91;")
    return shown.strip()


def _is_inert(text: str) -> bool:
    """Whether a parser of Markdown finds no HTML, no image and no link to another scheme."""
    blocks = _PARSER.parse(text)
    inside = chain.from_iterable(token.children or () for token in blocks)
    for token in (*blocks, *inside):
        if token.type in ("html_block", "html_inline", "image"):
            return False
        if token.type == "link_open" and not _ALLOWED.fullmatch(str(token.attrGet("href"))):
            return False
    return True


def _parts(text: str) -> Iterator[tuple[str, bool]]:
    """Yield prose and fenced code, each with whether it is code."""
    lines: list[str] = []
    fence = ""
    for line in text.splitlines(keepends=True):
        match = _FENCE.match(line)
        if not fence and match:
            yield "".join(lines), False
            lines, fence = [line], match[1]
        elif fence and match and match[1].startswith(fence) and not line[match.end() :].strip():
            yield "".join([*lines, line]), True
            lines, fence = [], ""
        else:
            lines.append(line)
    # A fence that nobody closed holds code to the end, as Markdown says.
    yield "".join(lines), bool(fence)


def _prose(text: str, base: str) -> str:
    """Return Markdown outside of fenced code without HTML and with safe links."""
    codes: list[str] = []

    def keep(match: re.Match[str]) -> str:
        codes.append(match[0])
        return f"\0{len(codes) - 1}\0"

    text = _INLINE_CODE.sub(keep, text)
    text = _AUTOLINK.sub(r"\1", _DROPPED.sub("", text))
    text = _TAG.sub("", _BREAK.sub("\n", text)).replace("<", "&lt;")
    text = _DEFINITION.sub("", text)
    text = _IMAGE.sub(lambda match: match[1] or "image", text)
    text = _LINK.sub(lambda match: _link(match, base), text)
    # What is left of targets that were not read above is no link.
    text = re.sub(r"\]\((?!https?://|mailto:)", "] (", text)
    return _KEPT_CODE.sub(lambda match: codes[int(match[1])], text)


def _link(match: re.Match[str], base: str) -> str:
    label, target = match[1], html.unescape(match[2])
    target = "".join(char for char in target if char.isprintable() and not char.isspace())
    if target.startswith("#"):
        return label
    if not _SCHEME.match(target) and not target.startswith("//"):
        target = f"{base}/{target.removeprefix('./').lstrip('/')}"
    if not _ALLOWED.fullmatch(target):
        return label
    return f"[{label}]({target})"

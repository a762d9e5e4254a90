"""READMEs of repositories, which anybody can write, are shown without anything active."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt

from catalog.hub.readme import MAX_CHARACTERS, sanitize

BASE = "https://hub.test/org/name/resolve/abc"
ATTACKS = [
    "<script>alert(1)</script>",
    "<scr<script>x</script>ipt>alert(1)</script>",
    "<img src=x onerror=alert(1)>",
    "<img src=x onerror=alert(1)",
    "<svg/onload=alert(1)>",
    "<svg><style><!--</style><img src=x onerror=alert(1)>",
    "<!-- <b> --><iframe src=javascript:alert(1)></iframe>",
    "[a](javascript:alert(1))",
    "[a]( JaVaScRiPt:alert%281%29 )",
    "[a](java\nscript:x)",
    "[a](&#106;avascript:x)",
    "[a](\x01javascript:x)",
    "[a](<javascript:x>)",
    "[a](data:text/html,x)",
    "[a](vbscript:x)",
    "[a][b]\n\n[b]: javascript:x",
    "[b]: <javascript:x> 'title'\n[b]",
    "<javascript:alert(1)>",
    "![a](http://evil.test/pixel.png)",
    "![a][b]\n\n[b]: http://evil.test/pixel.png",
    "[![a](http://evil.test/i.png)](javascript:x)",
    "`` ` `` <img src=x onerror=alert(1)> `",
    "```\ncode\n```\n<img src=x onerror=alert(1)>",
    "~~~\n```\n~~~\n<img src=x onerror=alert(1)>",
    "- ```\n  x\n<img src=x onerror=alert(1)>",
    "> ```\n<img src=x onerror=alert(1)>",
    "- ```\n  x\n  ```\n<img src=x onerror=alert(1)>",
    "<script>x</script>```\ncode\n```\n<img src=x onerror=alert(1)>",
    ">[b]: <javascript:x> 'title'\n[b]",
    "- [b]: javascript:x\n\n[b]",
    "> - [b]: <javascript:x>\n> - [b][]",
    "<a href='x' title='>'><img src=x onerror=alert(1)>",
]


def active(markdown: str) -> list[str]:
    """Return what a renderer that lets HTML through would make active."""
    page = MarkdownIt("commonmark", {"html": True}).render(markdown)
    tags = re.findall(r"<(script|img|svg|iframe|object|style|form|input)\b", page, re.IGNORECASE)
    links = re.findall(r"(?:href|src)=\"([^\"]*)\"", page)
    return tags + [link for link in links if not re.match(r"(https?://|mailto:)", link)]


@pytest.mark.parametrize("text", ATTACKS)
def test_hub_readme_has_nothing_active(text: str) -> None:
    assert active(sanitize(text, BASE)) == []
    assert active(sanitize(f"a {text} b\n\n{text}", BASE)) == []


@given(
    st.lists(st.sampled_from([*ATTACKS, "`", "```\n", "<", ">", "[", "](", ")", "\n", "!", "\\"]))
)
def test_hub_readme_of_mixed_pieces_has_nothing_active(pieces: list[str]) -> None:
    assert active(sanitize("".join(pieces), BASE)) == []


def test_hub_readme_keeps_what_people_read() -> None:
    text = (
        "---\nlicense: mit\n---\n# Title\n<p align='center'>Hello<br>world</p>\n"
        "[page](https://x.test/a?b=1) [file](./docs/a.md) [top](#top) <https://y.test/z>\n"
        "`a < b` and 1 < 2\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
        "```python\nif a < b: <b>x</b>\n```\n"
    )
    assert sanitize(text, BASE) == (
        "# Title\nHello\nworld\n\n"
        f"[page](https://x.test/a?b=1) [file]({BASE}/docs/a.md) top https://y.test/z\n"
        "`a < b` and 1 &lt; 2\n\n| a | b |\n|---|---|\n| 1 | 2 |\n\n"
        "```python\nif a < b: <b>x</b>\n```"
    )


def test_hub_readme_is_cut_and_costs_little() -> None:
    for text in ("<" * MAX_CHARACTERS, "[" * MAX_CHARACTERS, "`" * MAX_CHARACTERS, "<!--" * 15_000):
        assert len(sanitize(text, BASE)) <= 5 * MAX_CHARACTERS
    assert sanitize("x" * (2 * MAX_CHARACTERS), BASE) == "x" * MAX_CHARACTERS

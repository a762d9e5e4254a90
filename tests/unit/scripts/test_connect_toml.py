"""Tests of edits of TOML: comments, order and layout of everything else stay."""

import tomllib
from typing import Any

import pytest

from router.clients.problems import ConnectError
from router.clients.toml import changed_toml

CODEX = '''\
# My Codex
model = "gpt-5.6"   # the old one
approval_policy = "on-request"
notify = [
  "notify-send", # a program
  "# no comment",
]
instructions = """
[model_providers.impetus]
model = "a text"
"""

# Servers
[mcp_servers.docs]
command = 'npx'
env = { TOKEN = "x" }

[model_providers.other]
name = "Other"

[[hooks]]
event = "stop"
'''


def configure(data: Any) -> None:
    data["model"] = 'new "ö"'
    data["model_provider"] = "impetus"
    data["model_context_window"] = 32_768
    provider = data.setdefault("model_providers", {}).setdefault("impetus", {})
    provider["base_url"] = "http://127.0.0.1:8000/v1"
    provider["is_local"] = True


NEW = """
[model_providers.impetus]
base_url = "http://127.0.0.1:8000/v1"
is_local = true
"""


def test_only_what_is_new_is_written() -> None:
    after = changed_toml(CODEX, configure)
    assert after == (
        CODEX.replace('"gpt-5.6"   #', '"new \\"ö\\""   #').replace(
            '"a text"\n"""\n',
            '"a text"\n"""\nmodel_provider = "impetus"\nmodel_context_window = 32768\n',
        )
        + NEW
    )
    assert changed_toml(after, configure) == after


@pytest.mark.parametrize(
    ("before", "head"),
    [
        (None, ""),
        ("# heading\n", "# heading\n\n"),
        ("# heading\n\n[a]\nb = 1", "# heading\n\n"),
        ("[a]\nb = 1\n", ""),
        ("# of a\n[a]\n", ""),
    ],
)
def test_keys_of_the_root_stand_before_the_first_table(before: str | None, head: str) -> None:
    after = changed_toml(before, configure)
    assert after.startswith(f'{head}model = "new \\"ö\\""\nmodel_provider = "impetus"\n')
    assert after.endswith(NEW)
    assert tomllib.loads(after)["model_providers"]["impetus"]["is_local"] is True


def test_an_entry_is_renewed_in_its_place() -> None:
    text = (
        '[model_providers."impetus"] # mine\n'
        "base_url = '''\nold''' # where\n"
        'env_key = "K"\n'
        "# the end\n\n"
        "[z]\n"
    )

    def renew(data: Any) -> None:
        provider = data["model_providers"]["impetus"]
        del provider["env_key"]
        provider.update(base_url="u#1", name="I")

    assert changed_toml(text, renew) == (
        '[model_providers."impetus"] # mine\n'
        'base_url = "u#1" # where\n'
        'name = "I"\n'
        "# the end\n\n"
        "[z]\n"
    )


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("model = \n", "not valid TOML"),
        ('model = "a"\nmodel = "b"\n', "not valid TOML"),
        ('model_providers = { other = { name = "x" } }\n', "could not be extended"),
        ('model_providers.impetus.name = "x"\n', "could not be extended"),
        ('model_providers = "x"\n', "not the one that the client writes"),
        ('[[model_providers]]\nname = "x"\n', "not the one that the client writes"),
    ],
)
def test_what_cannot_be_edited_is_refused(text: str, reason: str) -> None:
    with pytest.raises(ConnectError, match=reason):
        changed_toml(text, configure)


def test_characters_that_only_look_like_line_ends_split_nothing() -> None:
    text = '# a\u2028b\nmodel = "x\u0085[y]" # c\u2028[d]\n'
    after = changed_toml(text, lambda data: data.update(model="m"))
    assert after == '# a\u2028b\nmodel = "m" # c\u2028[d]\n'


def test_a_text_without_a_change_stays_byte_for_byte() -> None:
    assert changed_toml("a=1  ", lambda _: None) == "a=1  "


def test_keys_that_need_quotes_get_them() -> None:
    after = changed_toml("", lambda data: data.update({"a.b": {"c d": "\x7f\n"}}))
    assert after == '["a.b"]\n"c d" = "\\u007f\\n"\n'

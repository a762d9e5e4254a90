"""`scripts/keys`: keys are listed, created and revoked without a server."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from catalog.key_store import KeyStore
from core.keys import api_key_id
from scripts.keys_lib.__main__ import main

ROOT = Path(__file__).parents[4]
DATABASE = Path("keys") / "api_keys.sqlite"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data folder."""
    monkeypatch.setenv("IMPETUS_HOME", str(tmp_path))
    monkeypatch.delenv("IMPETUS_API_KEY", raising=False)
    return tmp_path


def test_a_key_is_created_listed_and_revoked(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["list"]) == 0
    assert capsys.readouterr().out == "There are no API keys.\n"
    arguments = ["--scope", "read", "--scope", "manage", "--expires-in-days", "2"]
    assert main(["create", "my laptop", *arguments]) == 0
    shown = capsys.readouterr()
    key_id = api_key_id(shown.out.strip().encode())
    assert key_id is not None
    assert "every request needs a key" in shown.err
    store = KeyStore(data / DATABASE)
    (stored,) = store.stored()
    store.close()
    assert stored.key.scopes == {"read", "manage"}
    assert stored.key.expires_at == pytest.approx(stored.key.created_at + 2 * 24 * 3600)
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["ID", "NAME", "SCOPES", "EXPIRES", "LAST", "USE"]
    assert lines[1].split()[:4] == [key_id, "my", "laptop", "manage,read"]
    assert main(["revoke", key_id]) == 0
    assert "It was the last one" in capsys.readouterr().out
    assert main(["revoke", key_id]) == 1
    assert key_id in capsys.readouterr().err


def test_json_has_the_same_fields_as_the_api(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert (data / DATABASE).exists() is False
    assert main(["--json", "create", "a"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made.pop("key").startswith(f"imp-{made['id']}-")
    assert made["scopes"] == ["inference"]
    assert main(["--json", "list"]) == 0
    assert json.loads(capsys.readouterr().out) == {"keys": [made]}
    assert main(["--json", "revoke", made["id"]]) == 0
    assert json.loads(capsys.readouterr().out) == {"revoked": made["id"]}


@pytest.mark.parametrize(
    "arguments",
    [
        ["create"],
        ["create", "a", "--scope", "root"],
        ["create", "a", "--expires-in-days", "0"],
        ["create", "a", "--expires-in-days", "nan"],
        ["revoke"],
        [],
    ],
    ids=str,
)
def test_wrong_arguments_are_refused(data: Path, arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    assert list(data.iterdir()) == []


def test_a_damaged_database_is_told_in_a_sentence(
    data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data / DATABASE).parent.mkdir()
    (data / DATABASE).write_bytes(b"damaged" * 1000)
    assert main(["list"]) == 1
    assert "cannot be opened" in capsys.readouterr().err


def test_it_runs_as_a_program_and_prints_the_key_alone(data: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "scripts.keys_lib", "create", "a"],
        cwd=ROOT,
        env={**os.environ, "IMPETUS_HOME": str(data)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert api_key_id(done.stdout.strip().encode()) is not None


def test_a_link_signs_in_once(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["link"]) == 0
    address, code = capsys.readouterr().out.strip().split("?code=")
    assert address == "http://127.0.0.1:8000/session"
    store = KeyStore(data / DATABASE)
    assert store.open_session(code, now=time.time()) is not None
    assert store.open_session(code, now=time.time()) is None
    store.close()

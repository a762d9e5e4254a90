"""A repository's page: its models, files with hashes, safety, and what a lying hub lists."""

import hashlib
from pathlib import Path
from typing import Any

import pytest

from catalog.hub.client import HubClient, JsonAnswer
from catalog.hub.repository import MAX_FILES, read_readme, read_repository
from core.errors import HubAnswerInvalid, HubNotFound
from scripts.hub_lib.server import Hub
from tests.gguf_raw import minimal_gguf

SHA = "c" * 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The files of `org/tiny`."""
    made = tmp_path / "tiny"
    made.mkdir()
    minimal_gguf(made / "tiny-q8_0.gguf")
    (made / "pytorch_model.bin").write_bytes(b"pickle")
    (made / "README.md").write_text(
        "---\nlicense: other\nlicense_name: own\n---\n# Tiny <b>x</b>\n"
    )
    (made / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoModel": "m.X"}}')
    (made / "modeling_x.py").write_text("raise SystemExit")
    return made


def test_hub_repository_is_described(hub: Hub, client: HubClient, folder: Path) -> None:
    scan = {"status": "unsafe", "avScan": None, "pickleImportScan": None}
    security = {"pytorch_model.bin": scan}
    hub.publish("org/tiny", folder, SHA, gated="auto", security=security)
    found = read_repository(client, "org/tiny")
    assert (found.commit, found.model.gated, found.model.licence) == (SHA, "auto", "own")
    assert [entry.name for entry in found.entries] == ["tiny-q8_0.gguf", "pytorch_model.bin"]
    (weights,) = found.entries[0].weights
    data = (folder / "tiny-q8_0.gguf").read_bytes()
    assert (weights.size_bytes, weights.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert found.safety.pickles == ("pytorch_model.bin",)
    assert found.safety.remote_code == ("modeling_x.py", "auto_map: AutoModel")
    assert found.safety.findings == (("pytorch_model.bin", "unsafe"),)
    assert found.safety.is_scanned
    assert found.has_readme


def test_hub_readme_is_read_at_the_commit(hub: Hub, client: HubClient, folder: Path) -> None:
    hub.publish("org/tiny", folder, SHA)
    found = read_repository(client, "org/tiny", "main")
    hub.move("org/tiny")
    hub.forget_requests()
    assert read_readme(client, found) == "# Tiny x"
    assert f"/resolve/{SHA}/README.md" in hub.requests[0].target
    (folder / "README.md").unlink()
    hub.publish("org/bare", folder)
    bare = read_repository(client, "org/bare")
    assert not bare.has_readme
    assert read_readme(client, bare) == ""


def test_hub_revision_with_slashes(hub: Hub, client: HubClient, folder: Path) -> None:
    hub.publish("org/tiny", folder, SHA, refs={"refs/pr/1": SHA})
    hub.move("org/tiny")
    assert read_repository(client, "org/tiny", "refs/pr/1").commit == SHA
    with pytest.raises(HubNotFound, match="no such revision of org/tiny"):
        read_repository(client, "org/tiny", "refs/pr/2")


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([], "stated no commit"),
        ({"sha": "x" * 40}, "stated no commit"),
        ({"sha": SHA, "siblings": [{"rfilename": "../../x"}]}, "is not the path of a file"),
        ({"sha": SHA, "siblings": [{"rfilename": "/etc/x"}]}, "is not the path of a file"),
        ({"sha": SHA, "siblings": [{"rfilename": "a\\..\\b"}]}, "is not the path of a file"),
        ({"sha": SHA, "siblings": [{"rfilename": "a\0"}]}, "is not the path of a file"),
        (
            {
                "sha": SHA,
                "siblings": [{"rfilename": "a", "size": 1}, {"rfilename": "a", "size": 1}],
            },
            "twice",
        ),
        ({"sha": SHA, "siblings": [{"rfilename": None, "size": 1}]}, "without name"),
        ({"sha": SHA, "siblings": [{}] * (MAX_FILES + 1)}, "20,001 files"),
        ({"sha": SHA, "siblings": [{"rfilename": "a"}]}, "states no size of 'a'"),
        ({"sha": SHA, "siblings": [{"rfilename": "a", "size": -1}]}, "states no size of 'a'"),
    ],
)
def test_hub_that_lists_impossible_files_is_refused_d10(answer: Any, said: str) -> None:
    """D10: names that would leave the folder, and too many of them."""

    class Lying(HubClient):
        def get_json(self, *_: Any, **__: Any) -> JsonAnswer:
            return JsonAnswer(answer)

    with pytest.raises(HubAnswerInvalid, match=said):
        read_repository(Lying("http://hub.test", ""), "org/tiny")


def test_hub_files_with_names_that_no_mac_has_are_left_out() -> None:
    """Windows leaves `NAME:Zone.Identifier` beside what it downloaded."""
    siblings = [
        {"rfilename": "m-Q8_0.gguf", "size": 5},
        {"rfilename": "m-Q8_0.gguf:Zone.Identifier", "size": 1},
        {"rfilename": "logs/12:30:01/x.json"},
    ]

    class Odd(HubClient):
        def get_json(self, *_: Any, **__: Any) -> JsonAnswer:
            return JsonAnswer({"sha": SHA, "siblings": siblings})

    found = read_repository(Odd("http://hub.test", ""), "org/tiny")
    assert [file.path for file in found.files] == ["m-Q8_0.gguf"]
    siblings.append({"rfilename": "../a:b", "size": 1})
    with pytest.raises(HubAnswerInvalid, match="is not the path of a file"):
        read_repository(Odd("http://hub.test", ""), "org/tiny")

"""The test hub's search, model information and listings, read by huggingface_hub itself."""

import hashlib
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    BadRequestError,
    DisabledRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from scripts.hub_lib.faults import Fault
from scripts.hub_lib.server import Hub
from tests.unit.catalog.scan.folders import write_weights

SHA = "a" * 40


def ids(found: object) -> list[str]:
    assert hasattr(found, "__iter__")
    return [each.id for each in found]


def test_hub_search_filters_and_sorts(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.publish("org/tiny", folder, likes=3, downloads=1, trending=1)
    plain = shutil.copytree(folder, folder.with_name("plain"))
    (plain / "tiny-q8_0.gguf").unlink()
    hub.publish("other/Tiny-Large", plain, likes=1, downloads=9, trending=5, gated="manual")
    hub.publish("other/hidden", folder, is_private=True)
    assert ids(api.list_models()) == ["other/Tiny-Large", "org/tiny"]
    assert ids(api.list_models(sort="likes")) == ["org/tiny", "other/Tiny-Large"]
    assert ids(api.list_models(search="large")) == ["other/Tiny-Large"]
    assert ids(api.list_models(author="org")) == ["org/tiny"]
    assert ids(api.list_models(filter=["gguf", "conversational"])) == [
        "other/Tiny-Large",
        "org/tiny",
    ]
    assert ids(api.list_models(filter="license:mit")) == []
    assert ids(api.list_models(gated=True)) == ["other/Tiny-Large"]
    assert ids(api.list_models(pipeline_tag="text-generation", limit=1)) == ["other/Tiny-Large"]
    assert ids(api.list_models(num_parameters="max:1M")) == ["org/tiny"]
    assert ids(api.list_models(num_parameters="min:1M")) == []
    with pytest.raises(BadRequestError):
        list(api.list_models(sort="nonsense"))


def test_hub_search_goes_on_with_the_link_of_each_page(hub: Hub, api: HfApi, folder: Path) -> None:
    for number in range(5):
        hub.publish(f"org/model-{number}", folder, trending=number)
    hub.set_pages(repositories=2, entries=2)
    names = [f"org/model-{number}" for number in (4, 3, 2, 1, 0)]
    assert ids(api.list_models(filter="gguf")) == names
    pages = [logged.target for logged in hub.requests]
    assert len(pages) == 3
    assert all("filter=gguf" in target for target in pages)
    tree = api.list_repo_tree("org/model-0", recursive=True)
    assert [each.path for each in tree] == [
        *("README.md", "config.json", "large.bin", "sub", "sub/notes.txt", "tiny-q8_0.gguf")
    ]


def test_hub_entries_of_a_search_have_what_was_asked_for(
    hub: Hub, api: HfApi, folder: Path
) -> None:
    hub.publish("org/tiny", folder)
    (plain,) = api.list_models()
    assert (plain.sha, plain.siblings, plain.library_name) == (None, None, "gguf")
    (full,) = api.list_models(full=True, cardData=True, fetch_config=True)
    assert full.author == "org"
    assert full.siblings is not None
    assert full.card_data is not None
    assert full.card_data.license == "apache-2.0"
    assert full.config == {"model_type": "llama", "architectures": ["Llama"]}
    (expanded,) = api.list_models(expand=["gguf", "siblings", "gated"])
    assert expanded.gguf is not None
    assert expanded.gguf["architecture"] == "llama"
    assert expanded.gguf["context_length"] == 2048
    assert expanded.tags is None


def test_hub_model_information_has_hashes_and_sizes(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.publish("org/tiny", folder, SHA)
    info = api.model_info("org/tiny", files_metadata=True, securityStatus=True)
    assert (info.sha, info.gated, info.private) == (SHA, False, False)
    assert info.tags is not None
    assert {"gguf", "license:apache-2.0", "base_model:org/base"} <= set(info.tags)
    assert info.siblings is not None
    files = {file.rfilename: file for file in info.siblings}
    large, small = files["large.bin"], files["sub/notes.txt"]
    assert large.lfs is not None
    assert large.lfs.sha256 == hashlib.sha256((folder / "large.bin").read_bytes()).hexdigest()
    assert large.size == large.lfs.size == 700_000
    # What `git hash-object` says of a file with these five bytes.
    assert (small.size, small.lfs) == (5, None)
    assert small.blob_id == hashlib.sha1(b"blob 5\0notes").hexdigest()
    assert info.security_repo_status == {"scansDone": True, "filesWithIssues": []}


def test_hub_listing_agrees_with_the_model_information(hub: Hub, api: HfApi, folder: Path) -> None:
    scan = {"status": "unsafe", "avScan": None, "pickleImportScan": {"highestSafetyLevel": "x"}}
    hub.publish("org/tiny", folder, security={"large.bin": scan})
    info = api.model_info("org/tiny", files_metadata=True)
    assert info.siblings is not None
    stated = {file.rfilename: (file.size, file.blob_id, file.lfs) for file in info.siblings}
    tree = list(api.list_repo_tree("org/tiny", recursive=True, expand=True))
    found = {each.path: each for each in tree if hasattr(each, "size")}
    assert {path: (file.size, file.blob_id, file.lfs) for path, file in found.items()} == stated
    assert found["large.bin"].security is not None
    assert not found["large.bin"].security.safe
    assert found["README.md"].security is not None
    assert found["README.md"].security.safe
    top = {each.path for each in api.list_repo_tree("org/tiny")}
    assert top == {"README.md", "config.json", "large.bin", "sub", "tiny-q8_0.gguf"}


def test_hub_counts_the_parameters_of_safetensors(hub: Hub, api: HfApi, tmp_path: Path) -> None:
    made = tmp_path / "folder"
    made.mkdir()
    write_weights(made / "model.safetensors")
    hub.publish("org/weights", made)
    info = api.model_info("org/weights")
    assert info.safetensors is not None
    assert info.safetensors.total == sum(info.safetensors.parameters.values()) > 0
    assert "safetensors" in (info.tags or ())


def test_hub_refuses_as_the_hub_does(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.add_user("me", "hf_mine")
    hub.publish("org/hidden", folder, is_private=True, readers=frozenset({"me"}))
    hub.publish("org/off", folder, is_disabled=True)
    for name in ("org/hidden", "org/none"):
        with pytest.raises(RepositoryNotFoundError):
            api.model_info(name)
    with pytest.raises(RepositoryNotFoundError) as not_found:
        api.model_info("org/none", token="hf_mine")
    assert not_found.value.response.status_code == 404
    assert api.model_info("org/hidden", token="hf_mine").private
    with pytest.raises(RevisionNotFoundError):
        api.model_info("org/hidden", revision="none", token="hf_mine")
    with pytest.raises(DisabledRepoError):
        api.model_info("org/off")
    with pytest.raises(HfHubHTTPError, match="Invalid credentials") as stale:
        api.model_info("org/off", token="hf_stale")
    assert stale.value.response.status_code == 401
    assert api.whoami("hf_mine")["name"] == "me"


def test_hub_too_many_requests_tells_when_to_try_again(hub: Hub, api: HfApi, folder: Path) -> None:
    hub.publish("org/tiny", folder)
    hub.faults.add(Fault("status", value="429", seconds=7, times=1))
    with pytest.raises(HfHubHTTPError, match="Retry after 7 seconds") as refused:
        api.model_info("org/tiny")
    assert refused.value.response.headers["Retry-After"] == "7"
    assert api.model_info("org/tiny").id == "org/tiny"

"""The folders of other programs: where each keeps its models, by variables and by default."""

import json
from collections.abc import Mapping
from pathlib import Path

import pytest

from catalog.scan.places import model_folders
from core.settings import DISCOVERED, Settings


def made(home: Path, *names: str) -> None:
    for name in names:
        (home / name).mkdir(parents=True)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "user"


@pytest.fixture(autouse=True)
def own_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMPETUS_DISCOVER")


def found(
    home: Path, environment: Mapping[str, str] = {}, platform: str = "linux", **settings: list[str]
) -> list[str]:
    """Return the folders besides the server's own, below the user's home."""
    chosen = Settings(home=home / "server", **settings)  # type: ignore[arg-type]
    folders = model_folders(chosen, environment, home, platform)
    assert folders[0] == home / "server" / "models"
    return [str(folder.relative_to(home)) for folder in folders[1:]]


def test_each_program_s_usual_folder_is_found_where_it_exists(home: Path) -> None:
    assert found(home) == []
    usual = [".cache/huggingface/hub", ".lmstudio/models", ".cache/lm-studio/models"]
    usual += [".ollama/models", ".cache/llama.cpp"]
    made(home, *usual)
    assert found(home) == usual
    assert found(home, discover=["ollama"]) == [".ollama/models"]
    assert found(home, discover=[]) == []


def test_lm_studio_s_home_is_where_its_variable_or_its_pointer_says(home: Path) -> None:
    made(home, ".lmstudio/models", "moved/models", "disk/models", "disk/named")
    (home / ".lmstudio-home-pointer").write_text(f"{home / 'moved'}\n")
    assert found(home) == ["moved/models", ".lmstudio/models"]
    (home / "disk" / "settings.json").write_text(
        json.dumps({"downloadsFolder": str(home / "disk" / "named")})
    )
    assert found(home, {"LMSTUDIO_HOME": str(home / "disk")}) == [
        "disk/named",
        "disk/models",
        ".lmstudio/models",
    ]
    for text in ("relative/path", "\0", "x" * 10_000, ""):
        (home / ".lmstudio-home-pointer").write_text(text)
        assert found(home) == [".lmstudio/models"]


def test_a_mac_has_llama_cpp_s_cache_in_its_library(home: Path) -> None:
    made(home, "Library/Caches/llama.cpp", ".cache/llama.cpp")
    assert found(home, platform="darwin") == ["Library/Caches/llama.cpp"]


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"HF_HOME": "a"}, "a/hub"),
        ({"HF_HUB_CACHE": "b", "HF_HOME": "a"}, "b"),
        ({"HUGGINGFACE_HUB_CACHE": "c"}, "c"),
        ({"XDG_CACHE_HOME": "d"}, "d/huggingface/hub"),
        ({"OLLAMA_MODELS": "e"}, "e"),
        ({"LLAMA_CACHE": "f"}, "f"),
    ],
)
@pytest.mark.parametrize("form", ["{home}/{path}", "~/{path}"])
def test_variables_say_where_else_they_are(
    home: Path, environment: dict[str, str], expected: str, form: str
) -> None:
    made(home, "a/hub", "b", "c", "d/huggingface/hub", "e", "f")
    made(home, ".cache/huggingface/hub", ".ollama/models", ".cache/llama.cpp")
    given = {name: form.format(home=home, path=path) for name, path in environment.items()}
    folders = found(home, given)
    assert expected in folders
    usual = {"H": ".cache/huggingface/hub", "O": ".ollama/models", "L": ".cache/llama.cpp"}
    assert usual.get(next(iter(environment))[0], ".cache/huggingface/hub") not in folders


def test_lm_studio_s_settings_name_its_folder(home: Path) -> None:
    made(home, ".lmstudio/models", "elsewhere")
    settings = home / ".lmstudio" / "settings.json"
    settings.write_text(json.dumps({"downloadsFolder": str(home / "elsewhere")}))
    assert found(home) == ["elsewhere", ".lmstudio/models"]
    for text in ("", "[]", '{"downloadsFolder": 3}', '{"downloadsFolder": "../x"}', "[" * 9999):
        settings.write_text(text)
        assert found(home) == [".lmstudio/models"]


def test_the_user_s_own_folder_is_listed_once_and_unset_variables_change_nothing(
    home: Path,
) -> None:
    made(home, ".ollama/models")
    own = home / ".ollama" / "models"
    environment = {"OLLAMA_MODELS": "", "HF_HOME": "relative"}
    assert found(home, environment, models_path=[own]) == [".ollama/models"]  # type: ignore[list-item]
    assert Settings().discover == list(DISCOVERED)

"""Names of uploaded files: nothing leaves its folder, nothing overwrites another (P1, M12)."""

import unicodedata

import pytest

from catalog.uploads.names import MAX_NAME_BYTES, MAX_PATH_BYTES
from catalog.uploads.upload import MAX_BYTES, MAX_FILES, Announced, Upload, announced
from core.errors import BodyTooLarge, RequestError

ID = "0" * 32
TRICKS = [
    "../evil.gguf",
    "a/../../evil.gguf",
    "/etc/passwd",
    "a//b.gguf",
    "./a.gguf",
    "a/./b.gguf",
    "..",
    "",
    "C:/a.gguf",
    "a\\..\\b.gguf",
    "a\0.gguf",
    "a\n.gguf",
    "a\u2028.gguf",
    "\ud800.gguf",
    " a.gguf",
    "a /b.gguf",
    "a/b/c/d/e/f/g.gguf",
    "x" * (MAX_NAME_BYTES + 1),
    "é" * 128 + ".gguf",
    "/".join(["a" * 200] * (MAX_PATH_BYTES // 200 + 1)),
]


def of(*paths: str, name: str = "") -> Upload:
    return announced(ID, [Announced(path, 1) for path in paths], name, 0.0)


@pytest.mark.parametrize("path", TRICKS)
def test_paths_that_lead_elsewhere_are_refused_p1(path: str) -> None:
    """P1: traversal in the relative paths of a folder."""
    with pytest.raises(RequestError, match="cannot be the path"):
        of("good/config.json", path)


@pytest.mark.parametrize("name", [*TRICKS[:3], "a/b", ".hidden", "__MACOSX", ".."])
def test_names_of_models_that_lead_elsewhere_are_refused_p1(name: str) -> None:
    """P1: traversal in the name of the model."""
    with pytest.raises(RequestError, match="cannot be the"):
        of("a.gguf", name=name)


@pytest.mark.parametrize(
    ("paths", "name", "stored"),
    [
        (("tiny-Q4_0.gguf",), "tiny-Q4_0", ["tiny-Q4_0.gguf"]),
        (("m/config.json", "m/model.safetensors"), "m", ["config.json", "model.safetensors"]),
        (("config.json", "a.safetensors"), "config", ["config.json", "a.safetensors"]),
        (
            ("P.mlpackage/Manifest.json", "P.mlpackage/Data/com.apple.CoreML/model.mlmodel"),
            "P.mlpackage",
            ["Manifest.json", "Data/com.apple.CoreML/model.mlmodel"],
        ),
        (
            ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf"),
            "m",
            ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"],
        ),
        (("🦙 lama:7b.gguf",), "🦙 lama:7b", ["🦙 lama:7b.gguf"]),
        ((unicodedata.normalize("NFD", "Modèle/é.gguf"),), "Modèle", ["é.gguf"]),
    ],
)
def test_folder_around_all_files_names_the_model(
    paths: tuple[str, ...], name: str, stored: list[str]
) -> None:
    upload = of(*paths)
    assert upload.name == unicodedata.normalize("NFC", name)
    assert [file.path for file in upload.files] == stored
    assert Upload.from_json(upload.to_json()) == upload


def test_name_that_scans_take_for_a_download_is_refused() -> None:
    with pytest.raises(RequestError, match="take it for an unfinished download"):
        of("m.part/a.gguf")


def test_what_systems_leave_is_not_taken_and_numbers_stay() -> None:
    junk = ["m/.DS_Store", "__MACOSX/m/._a.gguf", "m/Thumbs.db", "m/.git/config"]
    upload = of(junk[0], "m/a.gguf", *junk[1:], "m/b.gguf")
    assert [(file.number, file.path) for file in upload.files] == [(1, "a.gguf"), (5, "b.gguf")]
    assert sorted(upload.ignored) == sorted(junk)
    with pytest.raises(RequestError, match="hidden or left by a system"):
        of("m/.DS_Store")


@pytest.mark.parametrize(
    ("paths", "reason"),
    [
        (("model.zip",), "is an archive; unpack it"),
        (("m/a.gguf", "m/b.TAR.GZ"), "is an archive"),
        (("Llama.mlpackage",), "choose the whole folder"),
        (("a.gguf.crdownload",), "unfinished download"),
        (("m/a.gguf", "m/A.GGUF"), "same name on some disks"),
        (("m/é.gguf", unicodedata.normalize("NFD", "m/é.gguf")), "same name"),
        (("m/x/a.gguf", "m/X/b.gguf"), "folders 'x' and 'X' have the same name"),
        (("m/x", "m/x/b.gguf"), "of a file and of a folder"),
    ],
)
def test_files_that_are_no_model_or_clash_are_refused(paths: tuple[str, ...], reason: str) -> None:
    with pytest.raises(RequestError, match=reason):
        of(*paths)


def test_numbers_of_files_bytes_and_hashes_are_bounded() -> None:
    with pytest.raises(RequestError, match=r"an upload has 1 to 1,000"):
        of()
    with pytest.raises(RequestError, match="1,001 files"):
        of(*(f"m/{number}" for number in range(MAX_FILES + 1)))
    with pytest.raises(BodyTooLarge):
        announced(ID, [Announced("a", MAX_BYTES), Announced("b", 1)], "m", 0.0)
    with pytest.raises(RequestError, match="64 hexadecimal"):
        announced(ID, [Announced("a", 1, "g" * 64)], "m", 0.0)
    assert announced(ID, [Announced("a", 1, "A" * 64)], "", 0.0).files[0].sha256 == "a" * 64

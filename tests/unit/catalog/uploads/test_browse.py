"""Local folders to choose from: only below the roots, no links out, no pipes (P4)."""

import os
from pathlib import Path

import pytest

from catalog.uploads.browse import MAX_ENTRIES, allowed, browse, browse_root, roots
from core.errors import NotFound, PermissionDenied, RequestError
from core.settings import Settings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "root"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.gguf").write_bytes(b"12345")
    (folder / "Ä 🦙.gguf").write_bytes(b"")
    (folder / ".hidden").write_text("x")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("x")
    (folder / "out").symlink_to(tmp_path / "secret")
    (folder / "out.gguf").symlink_to(tmp_path / "secret" / "key")
    (folder / "in.gguf").symlink_to(folder / "b.gguf")
    os.mkfifo(folder / "pipe.gguf")
    return folder


def test_folders_and_files_that_stay_inside_are_listed_p4(root: Path) -> None:
    """P4: links out of the root and pipes are left out, and nothing is opened."""
    found = browse(str(root), [root])
    assert [(one.name, one.is_folder, one.size_bytes) for one in found.entries] == [
        ("sub", True, 0),
        ("b.gguf", False, 5),
        ("in.gguf", False, 5),
        ("Ä 🦙.gguf", False, 0),
    ]
    assert (found.path, found.parent, found.is_truncated) == (str(root), "", False)
    inner = browse(str(root / "sub"), [root])
    assert (inner.parent, inner.entries) == (str(root), ())


@pytest.mark.parametrize(
    "path", ["{tmp}", "{root}/..", "{root}/../secret", "{root}/out", "{root}/out/key", "/", "/etc",
             "{root}/../none", "{root}x"],
)  # fmt: skip
def test_what_is_outside_of_the_roots_is_refused_p4(root: Path, tmp_path: Path, path: str) -> None:
    """P4: browse outside allowed roots, through dots and links."""
    with pytest.raises(PermissionDenied, match="IMPETUS_BROWSE_PATH"):
        browse(path.format(tmp=tmp_path, root=root), [root])


def test_root_that_is_a_link_shows_its_target_p4(root: Path, tmp_path: Path) -> None:
    """P4: a symlinked root."""
    link = tmp_path / "link"
    link.symlink_to(root)
    assert browse(str(link), [link]).path == str(root)
    assert browse(str(root / "sub"), [link]).path == str(root / "sub")


@pytest.mark.parametrize("path", ["", "relative", "~", "/a\0b", "/" + "x" * 5000])
def test_paths_that_are_not_absolute_are_refused(root: Path, path: str) -> None:
    with pytest.raises(RequestError, match="not an absolute path"):
        allowed(path, [root])


def test_pipe_and_missing_folder_are_told_at_once_p4(root: Path) -> None:
    """P4: a FIFO does not hang."""
    with pytest.raises(RequestError, match="is not a folder"):
        browse(str(root / "pipe.gguf"), [root])
    with pytest.raises(NotFound, match="cannot be looked at"):
        browse(str(root / "none"), [root])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every folder")
def test_unreadable_folder_is_told_p4(root: Path) -> None:
    """P4: a folder without permission."""
    (root / "sub").chmod(0)
    with pytest.raises(PermissionDenied, match="permission was denied"):
        browse(str(root / "sub"), [root])


def test_listing_that_fails_is_told_p4(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """P4: unreadable, as macOS says it of folders that are private."""

    def refuse(_: Path) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr("catalog.uploads.browse.os.scandir", refuse)
    with pytest.raises(PermissionDenied, match=r"permission was denied .*Privacy"):
        browse(str(root), [root])


def test_long_folder_is_cut(root: Path) -> None:
    for number in range(MAX_ENTRIES + 5):
        (root / "sub" / f"{number:05}.gguf").touch()
    found = browse(str(root / "sub"), [root])
    assert (len(found.entries), found.is_truncated) == (MAX_ENTRIES, True)


def test_roots_are_the_scanned_folders_and_those_that_are_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "user"))
    home = tmp_path / "home"
    usual = [tmp_path / "user" / "Downloads", tmp_path / "user" / "Models", home / "models"]
    assert roots(Settings(home=home)) == usual
    named = Settings(home=home, browse_path=[tmp_path / "a"], models_path=[tmp_path / "b"])
    assert roots(named) == [tmp_path / "a", home / "models", tmp_path / "b"]
    assert roots(Settings(home=home, browse_path=[])) == [home / "models"]
    assert browse_root(tmp_path / "a") is None
    (tmp_path / "a").mkdir()
    entry = browse_root(tmp_path / "a")
    assert entry is not None
    assert (entry.name, entry.path) == ("a", str(tmp_path / "a"))

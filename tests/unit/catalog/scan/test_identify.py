"""Tests of asking the backends what a file is."""

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from backends.base import Backend, ModelInfo
from catalog.scan.identify import Refused, Uninspected, Unknown, examine, identify
from core.errors import BrokenModel, NotThisFormat, Unavailable
from tests.gguf_raw import minimal_gguf
from tests.unit.catalog.builders import make_info
from tests.unit.catalog.library import GgufIdentification


class Claims(GgufIdentification):
    """Claims every file."""

    name = "claims"

    def identify(self, path: Path) -> ModelInfo:
        """Say yes."""
        return make_info(str(path), format="claims")


class Breaks(GgufIdentification):
    """A plug-in with a fault."""

    name = "breaks"

    def identify(self, path: Path) -> ModelInfo:
        """Fail."""
        raise ZeroDivisionError(path)


def test_content_decides_not_the_extension(tmp_path: Path) -> None:
    path = minimal_gguf(tmp_path / "model.onnx")
    assert identify(path, [GgufIdentification()]).format == "gguf"


def test_unknown_file_names_every_backends_reason(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_text("not a model")
    with pytest.raises(NotThisFormat, match="gguf: no GGUF magic number"):
        identify(path, [GgufIdentification()])


def test_nothing_is_known_without_backends(tmp_path: Path) -> None:
    with pytest.raises(NotThisFormat):
        identify(minimal_gguf(tmp_path / "a.gguf"), [])


def test_broken_file_is_refused_with_its_format(tmp_path: Path) -> None:
    path = minimal_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:100])
    outcome = examine(path, [GgufIdentification()])
    assert isinstance(outcome, Refused)
    assert outcome.format == "gguf"
    with pytest.raises(BrokenModel, match="missing"):
        identify(path, [GgufIdentification()])


def test_one_claim_wins_over_a_broken_one(tmp_path: Path) -> None:
    path = minimal_gguf(tmp_path / "a.gguf")
    path.write_bytes(path.read_bytes()[:100])
    assert identify(path, [GgufIdentification(), Claims()]).format == "claims"


def test_two_claims_are_refused(tmp_path: Path) -> None:
    path = minimal_gguf(tmp_path / "a.gguf")
    with pytest.raises(BrokenModel, match="formats gguf and claims all recognize"):
        identify(path, [GgufIdentification(), Claims()])


def test_failing_plug_in_hides_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    backends: list[Backend] = [Breaks(), GgufIdentification()]
    path = minimal_gguf(tmp_path / "a.gguf")
    assert identify(path, backends).format == "gguf"
    assert "ZeroDivisionError" in caplog.text
    assert isinstance(examine(path, [Breaks()]), Unknown)


def failing(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def raises_plainly(number: int) -> None:
    raise failing(number)


def raises_broken(number: int) -> None:
    raise BrokenModel("reading it failed") from failing(number)


def raises_other_format(number: int) -> None:
    try:
        raise failing(number)
    except OSError:
        raise NotThisFormat("no header") from None


@pytest.mark.parametrize("raising", [raises_plainly, raises_broken, raises_other_format])
@pytest.mark.parametrize("name", ["EIO", "EACCES", "EMFILE", "ENFILE", "ENOMEM", "ESTALE", "ENXIO"])
def test_an_error_that_may_pass_is_no_verdict(
    name: str, raising: Callable[[int], None], tmp_path: Path
) -> None:
    class Fails(GgufIdentification):
        name = "fails"

        def identify(self, path: Path) -> ModelInfo:
            raising(getattr(errno, name))
            raise AssertionError(path)

    path = minimal_gguf(tmp_path / "a.gguf")
    for backends in ([Fails()], [Fails(), GgufIdentification()], [Fails(), Claims()]):
        outcome = examine(path, backends)
        assert isinstance(outcome, Uninspected)
        assert os.strerror(getattr(errno, name)) in outcome.reason
    with pytest.raises(Unavailable):
        identify(path, [Fails()])


@pytest.mark.parametrize("name", ["ENOENT", "EISDIR", "EINVAL", "ENOTDIR"])
def test_an_error_that_the_content_causes_is_a_verdict(name: str, tmp_path: Path) -> None:
    class Fails(GgufIdentification):
        def identify(self, path: Path) -> ModelInfo:
            raise BrokenModel(path.name) from failing(getattr(errno, name))

    assert isinstance(examine(tmp_path / "a.gguf", [Fails()]), Refused)

"""A process that ends with a model open ends quietly on macOS, whatever native destructors do."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.fake_library import compile_library
from tests.gguf_files import llama_gguf

ROOT = Path(__file__).resolve().parents[3]
# As ggml's Metal devices: aborts when the process ends with models that were not freed.
DEVICES = """
#include <stdlib.h>
__attribute__((destructor)) static void free_devices(void) { abort(); }
"""
ABORTED = -6


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_library(tmp_path_factory.mktemp("library") / "devices.so", DEVICES)


def end_of(
    devices: Path, lines: str, *, system: str = "darwin", imports: str = "core.native_exit"
) -> subprocess.CompletedProcess[str]:
    """Run `lines` beside the library; modules are imported as on this machine."""
    code = (
        f"import ctypes, sys, {imports}\n"
        f"ctypes.CDLL({str(devices)!r}); sys.platform = {system!r}\n"
        f"from core.native_exit import hold, let_go\n{lines}\nprint('ended')"
    )
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100
    )


@pytest.mark.parametrize(
    ("lines", "system", "code"),
    [
        ("hold(7)", "darwin", 0),
        ("hold(7); hold(8); let_go(8)", "darwin", 0),
        # Nothing is left: the destructors run, as they should.
        ("hold(7); let_go(7); let_go(7)", "darwin", ABORTED),
        ("pass", "darwin", ABORTED),
        ("hold(7)", "linux", ABORTED),
    ],
)
def test_destructors_run_only_when_nothing_is_held(
    lines: str, system: str, code: int, devices: Path
) -> None:
    ended = end_of(devices, lines, system=system)
    assert (ended.returncode, ended.stdout) == (code, "ended\n")


def test_an_uncaught_error_still_shows_in_the_exit_code(devices: Path) -> None:
    ended = end_of(devices, "hold(7); raise ValueError('too bad')")
    assert ended.returncode == 1
    assert "too bad" in ended.stderr


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("backends.gguf.model", "GgufModel"),
        ("catalog.convert.steps.gguf_tokenizer", "GgufVocabulary"),
    ],
)
def test_models_and_vocabularies_that_are_open_at_the_end_are_held(
    module: str, name: str, devices: Path, tmp_path: Path
) -> None:
    path = llama_gguf(tmp_path / "tiny-F32.gguf")
    opened = (
        f"from {module} import {name}\nfrom pathlib import Path\n"
        f"model = {name}(Path({str(path)!r}))"
    )
    imports = f"llama_cpp, backends.gguf.model, {module}"
    ended = end_of(devices, opened, imports=imports)
    assert (ended.returncode, ended.stdout) == (0, "ended\n")
    closed = end_of(devices, f"{opened}\nmodel.close()", imports=imports)
    assert (closed.returncode, closed.stdout) == (ABORTED, "ended\n")

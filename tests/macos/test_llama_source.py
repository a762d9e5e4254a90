"""What set-up compiles on a Mac: llama.cpp's source as llama-cpp-python packs it."""

import hashlib
import re
import subprocess
import sys
import tarfile
from pathlib import PurePosixPath

import pytest

from scripts.install import RUNTIME, pinned, read_pins
from tests.cache import cache_folder, locked

METAL = "vendor/llama.cpp/ggml/src/ggml-metal/"
FILES = (
    "CMakeLists.txt",
    "vendor/llama.cpp/ggml/CMakeLists.txt",
    f"{METAL}CMakeLists.txt",
    f"{METAL}ggml-metal.cpp",
    f"{METAL}ggml-metal-device.m",
)


@pytest.fixture(scope="module")
def source() -> dict[str, str]:
    """The files of the pinned source that decide how Macs compile and run it."""
    name = f"{RUNTIME}=={read_pins('darwin')[RUNTIME]}"
    folder = cache_folder("sources", hashlib.sha256(name.encode()).hexdigest())
    with locked(folder):
        if not list(folder.glob("*.tar.gz")):
            command = (sys.executable, "-m", "pip", "--disable-pip-version-check", "download")
            options = ("--no-deps", "--no-binary", RUNTIME, "--dest", str(folder))
            whole = [*command, *pinned(), *options, name]
            done = subprocess.run(whole, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    (archive,) = folder.glob("*.tar.gz")
    found = {}
    with tarfile.open(archive) as packed:
        for member in packed:
            path = str(PurePosixPath(*PurePosixPath(member.name).parts[1:]))
            if path in FILES and (stream := packed.extractfile(member)) is not None:
                found[path] = stream.read().decode()
    assert set(found) == set(FILES)
    return found


def test_the_command_line_tools_are_enough(source: dict[str, str]) -> None:
    """Metal's kernels are embedded as text: `xcrun metal`, their compiler, is in Xcode only."""
    assert re.search(r'set\(GGML_METAL_EMBED_LIBRARY "ON" .* FORCE\)', source["CMakeLists.txt"])
    embedded, _, compiled = source[f"{METAL}CMakeLists.txt"].partition("\nelse()\n")
    assert "if (GGML_METAL_EMBED_LIBRARY)" in embedded
    assert "xcrun" not in embedded
    assert "xcrun" in compiled


def test_set_ups_flags_are_options_of_the_source(source: dict[str, str]) -> None:
    options = source["vendor/llama.cpp/ggml/CMakeLists.txt"]
    for name in ("GGML_METAL", "GGML_OPENMP"):
        assert re.search(rf"^option\({name} ", options, re.MULTILINE)
    _, _, of_macs = source["CMakeLists.txt"].partition("\n    if (APPLE)\n")
    assert 'set(GGML_METAL "ON"' in of_macs
    assert "GGML_OPENMP" not in of_macs


def test_llama_relaxes_the_watchdog_of_the_gpu_by_itself(source: dict[str, str]) -> None:
    """The other runtimes get the variable from scripts/env."""
    assert 'setenv("AGX_RELAX_CDM_CTXSTORE_TIMEOUT", "1"' in source[f"{METAL}ggml-metal.cpp"]


def test_a_process_that_ends_with_a_model_still_aborts(source: dict[str, str]) -> None:
    """Once this assertion is gone, core/native_exit.py is not needed any more."""
    assert "GGML_ASSERT([rsets->data count] == 0)" in source[f"{METAL}ggml-metal-device.m"]

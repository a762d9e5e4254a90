"""Every module can be imported on a Mac, whichever packages are installed there."""

import json
import sys
from pathlib import Path

import pytest

from scripts.install import ROOT
from tests.apple_fm_stand_in.install import sdk_folder
from tests.fake_mac.machine import FakeMac
from tests.fake_mac.process import OWN

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="this is a Mac")

RUNTIMES = ("apple_fm_sdk", "coremltools", "llama_cpp", "mlx", "mlx_lm", "onnxruntime", "torch")
EXTRAS = ("accelerate", "gguf", "onnx", "onnxruntime_genai", "onnxscript", "sentence_transformers")


@pytest.fixture(scope="module")
def mac(tmp_path_factory: pytest.TempPathFactory) -> FakeMac:
    return FakeMac(tmp_path_factory.mktemp("mac"))


def module_names(root: Path = ROOT) -> list[str]:
    """Return the project's modules; programs that run when they are imported are left out."""
    paths = [path.relative_to(root) for room in OWN for path in (root / room).rglob("*.py")]
    names = (".".join(path.with_suffix("").parts) for path in paths if path.stem != "__main__")
    return sorted(name.removesuffix(".__init__") for name in names)


IMPORTS = """
import importlib, json, os, sys, traceback
failed = {}
for name in json.loads(os.environ["FAKE_NAMES"]):
    try:
        importlib.import_module(name)
    except BaseException:
        failed[name] = traceback.format_exc(limit=-1)
result = failed, sys.platform, len(sys.modules)
"""


def imports(names: list[str]) -> str:
    """Return code that imports the modules, by name for what is loaded before, then one by one."""
    return "\n".join(("if False:", *(f"    import {name}" for name in names), IMPORTS))


@pytest.mark.parametrize("absent", [(), (*RUNTIMES, *EXTRAS)], ids=["installed", "absent"])
def test_every_module_can_be_imported(mac: FakeMac, absent: tuple[str, ...]) -> None:
    names = module_names()
    assert len(names) > 400
    failed, system, _ = mac.run(imports(names), names=json.dumps(names), absent=",".join(absent))
    assert (failed, system) == ({}, "darwin")


def test_a_module_that_only_linux_can_import_is_found(mac: FakeMac) -> None:
    code = """
import sys
from pathlib import Path
sys.path.insert(0, str(Path({folder!r})))
names = "import os\\nos.memfd_create", "import ctypes\\nctypes.CDLL(None).prctl", "import torch"
found = []
for number, text in enumerate(names):
    Path({folder!r}, f"of_linux_{{number}}.py").write_text(text)
    try:
        __import__(f"of_linux_{{number}}")
    except (AttributeError, ImportError) as problem:
        found.append(type(problem).__name__)
result = found
"""
    found = mac.run(code.format(folder=str(mac.folder)), absent="torch")
    assert found == ["AttributeError", "AttributeError", "ModuleNotFoundError"]


FORMATS = """
from backends.registry import load_backends
result = {name: each.availability().reason for name, each in load_backends().items()}
"""


def test_every_format_says_what_is_not_installed(mac: FakeMac) -> None:
    found = mac.run(FORMATS, absent=",".join((*RUNTIMES, *EXTRAS)), darwin="25.0.0")
    assert found.pop("echo") == ""
    lacking = {name: reason for name, reason in found.items() if "scripts/setup" not in reason}
    assert lacking == {}
    assert len(found) == 7


@pytest.mark.parametrize(
    ("darwin", "reason"), [("24.6.0", "needs macOS 26 or later; this is 15"), ("25.0.0", "")]
)
def test_every_format_is_there_on_a_mac_that_has_all(
    mac: FakeMac, darwin: str, reason: str
) -> None:
    """Apple's model answers through the SDK's own Python code over a stand-in of its library."""
    code = f"""
import sys
sys.path.insert(0, {str(sdk_folder())!r})
from tests.apple_fm_stand_in import bindings
sys.modules["apple_fm_sdk._ctypes_bindings"] = bindings
{FORMATS}
"""
    found = mac.run(code, darwin=darwin)
    assert reason in found.pop("apple-foundation")
    assert set(found.values()) == {""}

"""Step `packages`: installed versions against the pins, and every import in its own process."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from core.machine import macos_release_of
from scripts.doctor_lib.child import in_order
from scripts.doctor_lib.machine import Machine
from scripts.doctor_lib.row import FAIL, NEEDS_MAC, OK, WARN, Row, judged, skipped

_AGAIN = "scripts/setup torch"
_LIST_LIMIT_S = 30.0
# The first import on a Mac is checked by the system for malware, which takes long.
_IMPORT_LIMIT_S = 60.0
_LANES = 2
# A line of scripts/constraints.txt; some are for one system only.
_PIN = re.compile(
    r"^([\w.-]+)==([^\s;]+)(?:\s*;\s*sys_platform\s*(==|!=)\s*'(\w+)')?\s*$", re.MULTILINE
)
# Prints names and versions, and the tags of mlx-metal's wheel.
_INSTALLED = """
import json
from importlib import metadata
found = {}
for one in metadata.distributions():
    name = one.metadata["Name"]
    if name:
        found[name.lower().replace("_", "-").replace(".", "-")] = one.version
try:
    wheel = metadata.distribution("mlx-metal").read_text("WHEEL") or ""
except metadata.PackageNotFoundError:
    wheel = ""
print(json.dumps({"versions": found, "wheel": wheel}))
"""


@dataclass(frozen=True)
class Import:
    """A package, code that imports it and prints a value, and what it is for.

    `is_needed`: without it the server does not start.  `mac_lacks`: a word of the value that on a
    Mac means that the package cannot use the GPU or its own library.  `absent`: what to say where
    it need not be installed.
    """

    package: str
    code: str
    purpose: str
    is_needed: bool = False
    is_apples: bool = False
    mac_lacks: str = ""
    absent: str = ""


IMPORTS: Sequence[Import] = (
    Import("numpy", "import numpy; print(numpy.__version__)", "everything", is_needed=True),
    Import("ray", "import ray.serve; print(ray.__version__)", "everything", is_needed=True),
    Import(
        "llama_cpp",
        "import llama_cpp as l; print(l.__version__, 'GPU' if l.llama_supports_gpu_offload() else"
        " 'CPU')",
        "GGUF",
        is_needed=True,
        mac_lacks="CPU",
    ),
    Import(
        "mlx.core",
        "import mlx.core as m; print(m.__version__, m.default_device().type.name)",
        "MLX and safetensors",
        mac_lacks="cpu",
    ),
    Import("mlx_lm", "import mlx_lm; print(mlx_lm.__version__)", "MLX and safetensors"),
    Import(
        "onnxruntime",
        "import onnxruntime as o; print(o.__version__, *o.get_available_providers())",
        "ONNX",
    ),
    Import(
        "coremltools",
        "import coremltools as c; from coremltools.models.model import _MLModelProxy as p;"
        "print(c.__version__, 'with' if p else 'without', 'its native library')",
        "Core ML",
        mac_lacks="without",
    ),
    Import(
        "torch",
        "import torch as t; m = t.backends.mps; print(t.__version__,"
        " 'MPS' if m.is_available() else 'CPU, built for MPS' if m.is_built() else 'CPU')",
        "PyTorch and conversions",
        mac_lacks="CPU",
    ),
    Import(
        "sentence_transformers",
        "import sentence_transformers as s; from scripts.doctor_lib.probes import libraries as l;"
        " print(s.__version__, 'with', *l.openmp(l.loaded()))",
        "the tests of embeddings",
        absent="not installed; only the tests need it",
    ),
    Import(
        "apple_fm_sdk",
        "import apple_fm_sdk as a; print(*a.SystemLanguageModel().is_available())",
        "Apple's own model",
        is_apples=True,
        absent="not installed; it needs macOS 26 and Xcode 26",
    ),
)


def rows(machine: Machine) -> Iterator[Row]:
    """Yield the rows of the installation; blocks while each package is imported."""
    if machine.lacks_python:
        yield skipped("packages", machine.lacks_python)
        return
    complete = (machine.root / ".venv" / "installed-runtime").is_file()
    problem = "" if complete else "The installation was interrupted."
    yield judged("set-up", "complete" if complete else "incomplete", problem, _AGAIN)
    done = machine.run_python("-c", _INSTALLED, limit_s=_LIST_LIMIT_S)
    try:
        found = json.loads(done.last_line)
        versions, wheel = dict(found["versions"]), str(found["wheel"])
    except (ValueError, KeyError, TypeError):
        yield judged("versions", "unknown", f"Listing the packages {done.ended}.", _AGAIN)
    else:
        yield _versions(machine, versions)
        yield _metal_wheel(machine, wheel)
    yield _openmp(machine)
    yield from in_order([partial(_import, machine, one) for one in IMPORTS], _LANES)


def _versions(machine: Machine, installed: Mapping[str, str]) -> Row:
    text = (machine.root / "scripts" / "constraints.txt").read_text()
    pins = pinned(text, machine.system)
    wrong = [
        f"{name} {installed[name]} instead of {version}"
        for name, version in pins.items()
        # A build such as 2.13.0+cpu is of the same version.
        if name in installed and installed[name].partition("+")[0] != version
    ]
    value = f"{len(pins.keys() & installed.keys())} pinned packages"
    problem = f"Not as tested: {', '.join(wrong[:5])}." if wrong else ""
    return replace(judged("versions", value, problem, _AGAIN), detail=json.dumps(dict(installed)))


def pinned(constraints: str, system: str) -> dict[str, str]:
    """Return the version of each package that a file of constraints pins on `system`."""
    pins = {}
    for name, version, comparison, named in _PIN.findall(constraints):
        if not comparison or (named == system) is (comparison == "=="):
            pins[name] = version
    return pins


def _metal_wheel(machine: Machine, wheel: str) -> Row:
    """Compare the wheel's system with this one: each macOS has its own build of MLX' kernels."""
    what = "MLX' Metal library"
    if not machine.is_mac:
        return skipped(what, NEEDS_MAC)
    tag = re.search(r"macosx_(\d+)_\d+_arm64", wheel)
    system = macos_release_of(machine.run("uname", "-r").text)
    if tag is None:
        return judged(what, "missing", "MLX has no Metal.", _AGAIN, WARN)
    built = int(tag[1])
    # The newest build is for macOS 26; later systems use it too.
    old = built < min(system, 26)
    problem = f"It is the build for macOS {built}; this is {system}." if old else ""
    return judged(
        what, f"for macOS {built}", problem, "rm -rf .venv, then scripts/setup torch", WARN
    )


def _openmp(machine: Machine) -> Row:
    packages = sorted(
        {
            path.relative_to(site).parts[0]
            for site in (machine.root / ".venv" / "lib").glob("python*/site-packages")
            for depth in ("*", "*/*")
            for name in ("libomp*.dylib", "libiomp5*", "libgomp*")
            for path in site.glob(f"{depth}/{name}")
        }
    )
    several = machine.is_mac and len(packages) > 1
    problem = "Two OpenMP libraries in one process can end it (Error #15)." if several else ""
    value = ", ".join(packages) or "none"
    return judged("OpenMP libraries", value, problem, "uninstall scikit-learn from .venv", WARN)


def _import(machine: Machine, one: Import) -> Row:
    what = f"import {one.package}"
    if one.is_apples and not machine.is_mac:
        return skipped(what, NEEDS_MAC)
    done = machine.run_python("-c", one.code, limit_s=_IMPORT_LIMIT_S)
    if done.code == 0:
        value = f"{done.last_line} ({done.seconds:.1f} s)"
        lacks = (
            machine.is_mac
            and one.mac_lacks
            and one.mac_lacks in re.split(r"[\s,]+", done.last_line)
        )
        problem = f"It was not built for this Mac, so {one.purpose} is slow." if lacks else ""
        return judged(what, value, problem, "rm -rf .venv, then scripts/setup torch", WARN)
    if one.absent and "No module named" in done.text:
        return Row(what, OK, one.absent)
    problem = f"Importing it {done.ended}, so {one.purpose} cannot be used: {done.last_line[-200:]}"
    state = FAIL if one.is_needed else WARN
    return Row(what, state, f"{done.seconds:.1f} s", problem, _AGAIN, done.tail)

"""Names the OpenMP libraries that a process has loaded: two of them can end it on a Mac.

Usage: python -m scripts.doctor_lib.probes.libraries NAME
"""

import ctypes
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

from scripts.doctor_lib.probes.result import Found, print_result
from scripts.doctor_lib.row import WARN

_SYSTEM = "/usr/lib/libSystem.B.dylib"
_MAPS = Path("/proc/self/maps")
_OPENMP = re.compile(r"lib(?:omp|iomp5|gomp)\b[^/]*$")
# Source: https://github.com/pytorch/pytorch/issues/121101
_TWO = "Two OpenMP libraries in one process can end it (Error #15)."


def loaded() -> list[str]:
    """Return the paths of this process's libraries; empty where the system does not tell."""
    if sys.platform == "darwin":
        return images(_SYSTEM)
    try:
        lines = _MAPS.read_text().splitlines()
    except OSError:
        return []
    parts = (line.split(None, 5) for line in lines)
    return sorted({part[5] for part in parts if len(part) == 6 and part[5].startswith("/")})


def images(library: str) -> list[str]:
    """Return what macOS' loader has loaded.

    Source: mach-o/dyld.h, `_dyld_image_count` and `_dyld_get_image_name`; no privilege is needed.
    """
    system = ctypes.CDLL(library)
    system._dyld_image_count.restype = ctypes.c_uint32
    system._dyld_get_image_name.restype = ctypes.c_char_p
    system._dyld_get_image_name.argtypes = [ctypes.c_uint32]
    names = (system._dyld_get_image_name(index) for index in range(system._dyld_image_count()))
    return [name.decode("utf-8", "replace") for name in names if name]


def openmp(paths: Iterable[str]) -> list[str]:
    """Return the OpenMP libraries among `paths`, each as its package or folder and its name."""
    return sorted({_short(path) for path in paths if _OPENMP.search(path)})


def _short(path: str) -> str:
    parts = Path(path).parts
    if "site-packages" in parts:
        return f"{parts[parts.index('site-packages') + 1]}/{parts[-1]}"
    return path


def judged_openmp(names: list[str]) -> Found:
    """Return the result for the OpenMP libraries of a process."""
    problem = _TWO if sys.platform == "darwin" and len(names) > 1 else ""
    cure = "rm -rf .venv, then scripts/setup torch; set no DYLD_ variable"
    return Found(", ".join(names) or "none", problem, cure, WARN)


def of_the_server() -> Found:
    """Import what a process of PyTorch models imports, compute once, and name its OpenMP."""
    import torch

    import backends.embedding.model
    import backends.pytorch.embedding
    import backends.pytorch.rows  # noqa: F401

    a = torch.ones(256, 256)
    (a @ a).sum().item()
    return judged_openmp(openmp(loaded()))


PROBES: Mapping[str, Callable[[], Found]] = MappingProxyType({"loaded OpenMP": of_the_server})

if __name__ == "__main__":
    print_result(PROBES, sys.argv[1])

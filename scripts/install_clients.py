"""Installs the clients that the end-to-end tests use into the user's cache folder."""

import fcntl
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from scripts.install import ROOT, cache_folder

MANIFEST = ROOT / "tests" / "e2e"
MANIFEST_FILES = ("package.json", "package-lock.json")
# The Python clients, by environment: instructor needs an older package than the others do.
REQUIREMENTS = {name: MANIFEST / "clients" / f"{name}.txt" for name in ("python", "instructor")}
OLDEST_NODE = 20
_INSTALL_LIMIT_S = 900.0


class ClientsUnavailable(Exception):
    """This machine cannot run the agents; the text says why."""


def clients_folder() -> Path:
    """Install the agents once per lock file; return the folder that has their `node_modules`.

    Blocks, for a minute the first time; a second caller waits for the first.  Raises
    ClientsUnavailable without Node.js, RuntimeError when npm fails.
    """
    npm = require_node()
    digest = _digest(*(MANIFEST / name for name in MANIFEST_FILES))
    return _installed(digest, lambda target: _install_node(npm, target))


def python_client(name: str) -> Path:
    """Install the Python packages of REQUIREMENTS[name] once; return their environment's python.

    Blocks like `clients_folder`.  Raises RuntimeError when pip fails.
    """
    requirements = REQUIREMENTS[name]
    digest = _digest(requirements, f"{sys.version_info.major}.{sys.version_info.minor}")
    folder = _installed(digest, lambda target: _install_python(requirements, target))
    return folder / "bin" / "python"


def _installed(name: str, install: Callable[[Path], None]) -> Path:
    """Return the folder of this name, made by `install` if it is missing."""
    base = cache_folder().parent / "clients"
    base.mkdir(parents=True, exist_ok=True)
    target = base / name
    with (base / "install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            install(target)
    return target


def require_node() -> str:
    """Return npm's path.  Raises ClientsUnavailable unless Node.js is new enough."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise ClientsUnavailable(f"Node.js {OLDEST_NODE} or newer with npm is not installed")
    done = subprocess.run([node, "--version"], capture_output=True, text=True, check=False)
    found = re.match(r"v(\d+)\.", done.stdout)
    if found is None or int(found[1]) < OLDEST_NODE:
        version = done.stdout.strip() or f"exit code {done.returncode}"
        raise ClientsUnavailable(
            f"Node.js {OLDEST_NODE} or newer is needed; node --version gives {version}"
        )
    return npm


def _digest(*parts: Path | str) -> str:
    """Return a digest of platform, files and texts, which names the installation's folder."""
    digest = hashlib.sha256(f"{sys.platform} {platform.machine()}".encode())
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part.read_bytes())
    return digest.hexdigest()[:16]


def _install_node(npm: str, target: Path) -> None:
    """Install into a temporary folder and rename it to `target` when complete."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "clients"
        folder.mkdir()
        for name in MANIFEST_FILES:
            shutil.copy(MANIFEST / name, folder)
        # The agents' own install scripts are not needed, so they are not run.
        _run(npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error",
             folder=folder)  # fmt: skip
        folder.rename(target)


def _install_python(requirements: Path, target: Path) -> None:
    """Make a virtual environment in a temporary folder and rename it to `target`."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "clients"
        _run(sys.executable, "-m", "venv", "--without-pip", str(folder), folder=target.parent)
        python = str(folder / "bin" / "python")
        _run(sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python,
             "install", "--quiet", "--no-deps", "--requirement", str(requirements),
             folder=target.parent)  # fmt: skip
        folder.rename(target)


def _run(*command: str, folder: Path) -> None:
    """Run an installer in `folder`.  Raises RuntimeError when it fails or takes too long."""
    name = " ".join(Path(part).name for part in command[:3])
    try:
        done = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=_INSTALL_LIMIT_S,
        )
    except subprocess.TimeoutExpired as late:
        raise RuntimeError(
            f"{name} took longer than {_INSTALL_LIMIT_S:g} s; check the network, then retry"
        ) from late
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed with code {done.returncode}:\n{done.stderr[-2000:]}")


def main() -> int:
    """Install all clients and print their folders; a missing Node.js is reported, not a failure."""
    try:
        for name in REQUIREMENTS:
            print(python_client(name).parents[1])
        print(clients_folder())
    except ClientsUnavailable as reason:
        print(f"The agents of the end-to-end tests were not installed: {reason}.")
    except RuntimeError as problem:
        sys.stderr.write(f"{problem}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Installs the coding agents that the end-to-end tests use into the user's cache folder."""

import fcntl
import hashlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from scripts.install import ROOT, cache_folder

MANIFEST = ROOT / "tests" / "e2e"
MANIFEST_FILES = ("package.json", "package-lock.json")
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
    base = cache_folder().parent / "clients"
    base.mkdir(parents=True, exist_ok=True)
    target = base / _key()
    with (base / "install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not target.is_dir():
            _install(npm, target)
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


def _key() -> str:
    """Return a digest of platform and lock file, which names the installation's folder."""
    digest = hashlib.sha256(f"{sys.platform} {platform.machine()}".encode())
    for name in MANIFEST_FILES:
        digest.update((MANIFEST / name).read_bytes())
    return digest.hexdigest()[:16]


def _install(npm: str, target: Path) -> None:
    """Install into a temporary folder and rename it to `target` when complete."""
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        folder = Path(scratch) / "clients"
        folder.mkdir()
        for name in MANIFEST_FILES:
            shutil.copy(MANIFEST / name, folder)
        # The agents' own install scripts are not needed, so they are not run.
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
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
                f"npm ci took longer than {_INSTALL_LIMIT_S:g} s; check the network, then retry"
            ) from late
        if done.returncode != 0:
            raise RuntimeError(f"npm ci failed with code {done.returncode}:\n{done.stderr[-2000:]}")
        folder.rename(target)


def main() -> int:
    """Install the agents and print their folder; a missing Node.js is reported, not a failure."""
    try:
        print(clients_folder())
    except ClientsUnavailable as reason:
        print(f"The agents of the end-to-end tests were not installed: {reason}.")
    except RuntimeError as problem:
        sys.stderr.write(f"{problem}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

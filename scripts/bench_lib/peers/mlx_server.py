"""mlx_lm.server as a child process, with the BLAS that Impetus uses for MLX on Linux.

Prints one JSON line before it loads the model and ends when standard input closes.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import sys
import threading
from importlib import metadata
from pathlib import Path


def lend_blas() -> str:
    """Load PyTorch's BLAS before the one in MLX's Linux wheel; return which one is used."""
    spec = importlib.util.find_spec("torch") if sys.platform == "linux" else None
    for place in (spec.submodule_search_locations or ()) if spec else ():
        library = Path(place) / "lib" / "libtorch_cpu.so"
        if library.is_file():
            ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
            return "PyTorch's BLAS"
    return "MLX's own BLAS"


def main() -> None:
    """Serve the model with mlx_lm.server's defaults until the parent exits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--port", required=True)
    parser.add_argument("--threads", required=True)
    options = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = options.threads
    os.environ["HF_HUB_OFFLINE"] = "1"
    facts = {"version": f"mlx-lm {metadata.version('mlx-lm')}", "system_info": lend_blas()}
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = ["mlx_lm.server", "--model", options.model, "--host", "127.0.0.1"]
    sys.argv += ["--port", options.port]
    from mlx_lm import server

    server.main()


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()

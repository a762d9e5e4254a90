"""llama.cpp's own server as a child process: prints one JSON line when it listens.

It ends when standard input closes, so it cannot outlive the benchmark.
"""

import argparse
import json
import os
import sys
from importlib import metadata


def main() -> None:
    """Load the model and serve it on a free loopback port until the parent exits."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--context", type=int, required=True)
    parser.add_argument("--sequences", type=int, required=True)
    options = parser.parse_args()

    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = options.model
    parameters.model_alias = {"peer"}
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = 0
    parameters.n_ctx = options.context
    parameters.n_parallel = options.sequences
    parameters.kv_unified = True
    parameters.cont_batching = True
    parameters.cache_prompt = True
    parameters.cpuparams.n_threads = options.threads
    parameters.cpuparams_batch.n_threads = options.threads
    parameters.ui = False
    server = xllamacpp.Server(parameters)
    facts = {
        "url": server.listening_address,
        "version": metadata.version("xllamacpp"),
        "system_info": xllamacpp.get_system_info().strip(),
    }
    sys.stdout.write(json.dumps(facts) + "\n")
    sys.stdout.flush()
    sys.stdin.read()
    # The server's native threads do not end on their own.
    os._exit(0)


if __name__ == "__main__":
    main()

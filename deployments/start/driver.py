"""Runs inside `serve run` before Ray starts: checks the start and guards the processes.

`scripts/env` names `prepare_driver` as Ray's hook for runtime environments, which `ray.init` calls
first.  So a `serve run` by hand is checked and guarded as one by `scripts/serve` is.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from core.child import SERVER_ID, die_with_parent
from core.errors import ImpetusError
from core.settings import unknown_variables
from deployments.serve.authentication import check_authentication
from deployments.serve.guard import start_guard
from deployments.serve.processes import new_server_id, owner_of

_IMPORT_PATH = "deployments.app:"
# The port of the discard service: a connection is refused at once.
_NOWHERE = dict.fromkeys(
    ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"),
    "http://127.0.0.1:9",
)


def prepare_driver(runtime_env: Any) -> Any:
    """Prepare this process if it is `serve run` of this project; return `runtime_env` unchanged.

    Raises SystemExit with a message if the server must not start.
    """
    config = _config_of(sys.argv)
    if config is None or _joins_a_cluster(sys.argv):
        return runtime_env
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        # A background job of a shell inherits that, and could never be stopped.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    launcher = owner_of(os.environ.get(SERVER_ID, ""))
    # Without a launcher it is 0, as is the parent of a container's first process.
    if launcher and launcher == os.getppid():
        die_with_parent()
        if os.getppid() != launcher:
            sys.exit("impetus: the launcher has ended")
    else:
        _start_by_hand(config)
    keep_dashboard_on_this_machine()
    return runtime_env


def keep_dashboard_on_this_machine() -> None:
    """Give Ray's dashboard, which this process will start, a proxy that nobody listens on.

    With usage reports off it still asks the metadata services of Azure, Google and AWS which cloud
    it runs in (`ray._common.usage.usage_lib.get_cloud_from_metadata_requests`, Ray 2.60).
    """
    from ray._private import ray_constants, services

    start = services.start_ray_process

    def start_offline(command: Any, process_type: str, *args: Any, **options: Any) -> Any:
        if process_type == ray_constants.PROCESS_TYPE_DASHBOARD:
            options["env_updates"] = {**(options.get("env_updates") or {}), **_NOWHERE}
        return start(command, process_type, *args, **options)

    services.start_ray_process = start_offline


def _start_by_hand(config: Path) -> None:
    from deployments.start.checks import prepare_start
    from deployments.start.environment import complete

    try:
        # Ray has read the mode already, when it was imported.
        check_authentication()
        settings = prepare_start(config)
    except ImpetusError as problem:
        sys.exit(f"impetus: {problem.message}")
    for line in unknown_variables():
        sys.stderr.write(f"impetus: {line}\n")
    complete(os.environ, settings)
    os.environ[SERVER_ID] = new_server_id(os.getpid())
    start_guard(os.getpid(), os.environ[SERVER_ID])


def _joins_a_cluster(arguments: list[str]) -> bool:
    """Return whether the command line names a cluster of the user's own."""
    for word, following in zip(arguments, [*arguments[1:], ""], strict=True):
        name, separator, value = word.partition("=")
        if name in ("--address", "-a"):
            return (value if separator else following) != "local"
    return False


def _config_of(arguments: list[str]) -> Path | None:
    """Return the configuration file in the command line of `serve run`; None if it is another."""
    if Path(arguments[0]).name != "serve" or "run" not in arguments[1:3]:
        return None
    for argument in reversed(arguments[2:]):
        path = Path(argument)
        if path.suffix in (".yaml", ".yml") and path.is_file():
            return path if _IMPORT_PATH in path.read_text(errors="replace") else None
    return None

"""Checks before the server starts: configuration, data folder, address, and former runs."""

import os
import sys
from pathlib import Path

import yaml

from core.errors import ImpetusError
from core.settings import Settings
from deployments.options import check_home, check_settings
from deployments.router.listener import PortInUse, bind, check_exposure
from deployments.start.backups import keep_out_of_backups
from deployments.start.environment import check_ray_environment
from deployments.start.leftovers import end_former_servers, remove_former_folders
from deployments.stored_settings import load_with_stored


def prepare_start(config: Path) -> Settings:
    """Return the settings; end and remove what a killed run of this user's has left.

    Blocks for up to 10 s if processes of a former run have to end.  Raises ImpetusError with a
    sentence for the user.
    """
    check_ray_environment(os.environ)
    settings = read_settings(config)
    check_exposure(settings)
    check_home(settings)
    keep_out_of_backups(settings.home / "cache")
    end_former_servers()
    remove_former_folders()
    check_port(settings)
    return settings


def check_port(settings: Settings) -> None:
    """Raise ImpetusError if the address cannot be listened on."""
    try:
        bind(settings.host, settings.port).close()
    except PortInUse:
        # Processes of a former run that lost their parent need a moment to end by themselves.
        end_former_servers(are_stragglers=True)
        bind(settings.host, settings.port).close()


def read_settings(config: Path) -> Settings:
    """Read the settings that `build` will get.  Raises ImpetusError naming the file or field."""
    try:
        content = yaml.safe_load(config.read_text(encoding="utf-8"))
        application = content["applications"][0]
        arguments = application.get("args")
        has_runtime_env = bool(application.get("runtime_env"))
    except OSError as problem:
        raise ImpetusError(
            f"The configuration file {config} cannot be read: {problem.strerror}. Check its path "
            "and its permissions."
        ) from problem
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as problem:
        raise ImpetusError(
            f"The configuration file {config} is not valid YAML: {_place_of(problem)}."
        ) from problem
    except (LookupError, TypeError, AttributeError) as problem:
        raise ImpetusError(
            f"The configuration file {config} has no application; start from the "
            "serve_config.yaml of this project."
        ) from problem
    if has_runtime_env and " " in sys.executable:
        # Ray puts the path into a shell's command line without quotes.
        raise ImpetusError(
            f"{config} has a runtime_env, with which Ray cannot start {sys.executable}: the path "
            "has a space. Remove runtime_env, or move the project to a path without one."
        )
    settings = load_with_stored(arguments)
    check_settings(settings)
    return settings


def _place_of(problem: Exception) -> str:
    mark = getattr(problem, "problem_mark", None)
    cause = getattr(problem, "problem", None) or "it is not UTF-8 text of a plausible depth"
    return f"{cause}, line {mark.line + 1}" if mark else str(cause)

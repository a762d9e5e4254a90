"""Attaches the project's loggers to Ray Serve's log handlers, and finds their files."""

import logging
from logging.handlers import RotatingFileHandler
from pathlib import Path

PACKAGES = ("backends", "catalog", "core", "deployments", "router", "scheduler")


def attach_logs() -> None:
    """Send our packages' log lines to Serve's handlers; call it once per process."""
    serve_logger = logging.getLogger("ray.serve")
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = list(serve_logger.handlers)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def log_folder() -> Path | None:
    """Return the folder of Serve's log files, in which this process writes one; None: nowhere.

    Source: ray.serve._private.logging_utils, a `RotatingFileHandler` behind a `MemoryHandler`.
    """
    for handler in logging.getLogger("ray.serve").handlers:
        target = getattr(handler, "target", None) or handler
        if isinstance(target, RotatingFileHandler):
            return Path(target.baseFilename).parent
    return None

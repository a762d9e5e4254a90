"""Attaches the project's loggers to Ray Serve's log handlers."""

import logging

PACKAGES = ("backends", "catalog", "core", "deployments", "router", "scheduler")


def attach_logs() -> None:
    """Send our packages' log lines to Serve's handlers; call it once per process."""
    serve_logger = logging.getLogger("ray.serve")
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = list(serve_logger.handlers)
        logger.setLevel(logging.INFO)
        logger.propagate = False

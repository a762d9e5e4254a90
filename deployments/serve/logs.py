"""Our loggers, attached to Ray Serve's handlers in every replica."""

import logging

PACKAGES = ("backends", "catalog", "core", "deployments", "router", "scheduler")


def attach_logs() -> None:
    """Send our packages' log lines where Serve's own go; once per process is enough."""
    serve_logger = logging.getLogger("ray.serve")
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers = list(serve_logger.handlers)
        logger.setLevel(logging.INFO)
        logger.propagate = False

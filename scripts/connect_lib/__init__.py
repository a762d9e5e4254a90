"""Setting clients up for this server."""

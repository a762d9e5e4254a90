"""Transports generation events from replicas to the router: codec, socket, handle stream."""

"""Benchmark peers: other servers, bare loops, and a busy neighbour process."""

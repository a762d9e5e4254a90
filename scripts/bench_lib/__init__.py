"""Benchmarks the server against other servers and bare runtimes, with equal models and threads."""

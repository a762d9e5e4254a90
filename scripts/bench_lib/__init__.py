"""Measures the server beside other servers and bare runtimes on the same models and threads."""

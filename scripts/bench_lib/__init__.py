"""Measures the server beside llama.cpp's own on the same model, threads and context."""

"""Embedding models: batching and pooling for every format."""

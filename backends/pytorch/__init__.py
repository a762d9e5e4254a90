"""PyTorch models by transformers."""

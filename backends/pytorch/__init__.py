"""PyTorch models on transformers."""
